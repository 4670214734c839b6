"""Torch and transformers themselves: their private names, and their per-thread state."""
