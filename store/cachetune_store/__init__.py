"""Tiered store of the keys and values of document chunks."""
