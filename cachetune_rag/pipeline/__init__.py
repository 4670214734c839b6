"""Moving KV from the store into a prompt's buffers."""
