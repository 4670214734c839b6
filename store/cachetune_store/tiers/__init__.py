"""Tiers: places that hold chunks, each within a byte budget."""

from .base import Pins, Tier
from .device import DeviceReader, DeviceTier
from .disk import DiskTier
from .host import HostTier

__all__ = ["DeviceReader", "DeviceTier", "DiskTier", "HostTier", "Pins", "Tier"]
