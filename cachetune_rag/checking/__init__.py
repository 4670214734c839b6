"""Checking what callers give, and showing it safely in messages."""
