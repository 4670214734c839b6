"""Fixtures of shared places; see `shared_places`."""

from shared_places import folder, network, place, s3_port, valkey_port

__all__ = ["folder", "network", "place", "s3_port", "valkey_port"]
