"""Tiers: places that hold chunks, each within a byte budget."""

from .base import Pins, Tier
from .disk import DiskTier
from .host import HostTier

__all__ = ["DiskTier", "HostTier", "Pins", "Tier"]
