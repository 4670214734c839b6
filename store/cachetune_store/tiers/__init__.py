"""Tiers: places that hold chunks, each within a byte budget."""

from ..tier_kinds import KINDS, TierKind
from .base import LastingTier, Pins, Tier
from .device import DeviceReader, DeviceTier
from .disk import DiskTier
from .host import HostTier

__all__ = ["KINDS", "DeviceReader", "DeviceTier", "DiskTier", "HostTier", "LastingTier", "Pins", "Tier", "TierKind"]
