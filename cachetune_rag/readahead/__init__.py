"""Reads chunks from disk into host memory in the background."""
