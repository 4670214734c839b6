"""Choosing the recompute ratio for the hardware at hand."""
