"""Byte counts as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: int | str, name: str = "byte count") -> int:
    """Bytes in `value`: an int, or a string such as "4GiB", "500 MB" or "1048576".

    Raises:
        ValueError: for anything else; the message names `name` and what is allowed.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 0:
            return value
    elif isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        if match and match[2].upper() in _UNITS:
            return int(float(match[1]) * _UNITS[match[2].upper()])
    raise ValueError(f"{name} is {value!r}; give bytes as an int of 0 or more, or a string such as '4GiB' or '500MB'")


def format_bytes(count: int) -> str:
    """`count` bytes for a message, such as "1.5 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
