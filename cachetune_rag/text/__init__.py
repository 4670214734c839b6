"""Text to ids and back; knows no model and no store."""
