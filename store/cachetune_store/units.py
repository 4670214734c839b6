"""Byte counts as people write them."""

from __future__ import annotations

import re
from numbers import Integral

from .errors import StoreArgumentError
from .printing import shown

MOST_BYTES = (1 << 63) - 1
NO_LIMIT = 1 << 62
"""A budget that nothing exceeds: a store that is opened with it evicts nothing."""
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_PATTERN = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]{0,3})\s*")


def parse_bytes(value: int | str, name: str = "byte count") -> int:
    """Bytes in `value`: an int, or a string such as "4GiB", "500 MB" or "1048576".

    Raises:
        StoreArgumentError: for anything else; the message names `name` and what is allowed.
    """
    given: object = value
    count = -1
    if not isinstance(given, bool) and isinstance(given, Integral):  # NumPy's as well
        count = int(given)
    elif isinstance(given, str):
        match = _PATTERN.fullmatch(given)
        if match and match[2].upper() in _UNITS:
            count = int(float(match[1]) * _UNITS[match[2].upper()])
    if 0 <= count <= MOST_BYTES:
        return count
    raise StoreArgumentError(
        f"{name} is {shown(value)}; give bytes as an int from 0 to 2**63 - 1, or a string such as '4GiB' or '500MB'"
    )


def format_bytes(count: int) -> str:
    """`count` bytes for a message, such as "1.5 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
