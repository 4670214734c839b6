"""From text to token ids and back. Nothing here knows a model or a store."""
