"""A reader of many passages, fine-tuned to measure reuse with (`benchmarks/reader/train.py`, docs/quality-reader.md)."""
