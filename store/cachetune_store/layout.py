"""Shapes of a stored chunk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from .errors import StoreArgumentError
from .keys import DTYPES
from .printing import shown

__all__ = ["ChunkLayout", "HeadBytes", "LayerSpec", "RowFormat", "dtype_name", "torch_dtype"]

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST = 1 << 40
_NAMES = {value: name for name, value in _TORCH.items()}


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype named `dtype` ("float32", "bfloat16", "float16")."""
    found = _TORCH.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _NAMES:
        raise StoreArgumentError(f"dtype {shown(dtype)} is not stored; allowed: {', '.join(DTYPES)}")
    return found


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of `dtype` as a layout spells it."""
    return _NAMES[torch_dtype(dtype)]


def _check_count(value: Any, what: str, least: int) -> None:
    if type(value) is not int or not least <= value <= _MOST:
        raise StoreArgumentError(f"{what} is {shown(value)}; use an int from {least} to {_MOST}")


@dataclass(frozen=True)
class LayerSpec:
    """Widths of one layer: key/value heads, and the length of a head's key and of its value."""

    heads: int
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "v_head_dim"):
            _check_count(getattr(self, name), f"{name} of a layer", 1)


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one layer lie behind one another, as a codec writes them.

    Rows form groups of `group_rows`, the last of which may be shorter. A group begins with `group_bytes` bytes that its
    rows share (scales, say); its rows follow. So the bytes of any number of first rows are one contiguous range that
    decodes alone.
    """

    row_bytes: int
    group_rows: int = 1
    group_bytes: int = 0

    def __post_init__(self) -> None:
        _check_count(self.row_bytes, "row_bytes", 1)
        _check_count(self.group_rows, "group_rows", 1)
        _check_count(self.group_bytes, "group_bytes", 0)

    def size(self, rows: int) -> int:
        """Bytes of the first `rows` rows, with what they share."""
        return -(-rows // self.group_rows) * self.group_bytes + rows * self.row_bytes

    def span(self, rows: int) -> int:
        """The same with the last group in full: where the next piece begins when several lie in one buffer."""
        groups = -(-rows // self.group_rows)
        return groups * (self.group_bytes + self.group_rows * self.row_bytes)

    def rows(self, size: int) -> int:
        """How many rows `size` bytes hold; size() read backwards."""
        groups, rest = divmod(size, self.group_bytes + self.group_rows * self.row_bytes)
        return groups * self.group_rows + max(0, rest - self.group_bytes) // self.row_bytes


@dataclass(frozen=True)
class HeadBytes:
    """Where some of the heads of a layer lie in its rows, as a codec writes them.

    Attributes:
        row: stretches of a row, each its offset and its length, both in bytes: ascending, and none touches the next.
        group: the same of what a group of rows shares; offsets count from the group's beginning.
    """

    row: tuple[tuple[int, int], ...]
    group: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, row: Iterable[tuple[int, int]], group: Iterable[tuple[int, int]] = ()) -> HeadBytes:
        """Of stretches in any order, which may overlap."""
        return cls(_joined(row), _joined(group))


def _joined(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for start, length in sorted(each for each in stretches if each[1]):
        if found and start <= sum(found[-1]):
            first = found[-1][0]
            found[-1] = first, max(sum(found[-1]), start + length) - first
        else:
            found.append((start, length))
    return tuple(found)


@dataclass(frozen=True)
class ChunkLayout:
    """What a chunk's rows look like: tokens (rows a layer), layers, dtype by name and codec by name."""

    tokens: int
    layers: tuple[LayerSpec, ...]
    dtype: str
    codec: str

    def __post_init__(self) -> None:
        _check_count(self.tokens, "tokens of a chunk", 1)
        if (
            not isinstance(self.layers, tuple)
            or not self.layers
            or not all(isinstance(s, LayerSpec) for s in self.layers)
        ):
            raise StoreArgumentError(
                f"layers of a chunk are {shown(self.layers)}; use a tuple of one LayerSpec at least"
            )
        if not isinstance(self.codec, str) or not isinstance(self.dtype, str):
            raise StoreArgumentError(
                f"dtype and codec are {shown(self.dtype)} and {shown(self.codec)}; use their names"
            )
        torch_dtype(self.dtype)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Layouts are keys of caches that are asked for every chunk, and dozens of layers take as long as reading the chunk's head.
        return hash((self.tokens, self.layers, self.dtype, self.codec))

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings otherwise.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def deviation_columns(self) -> int:
        """Deviations of a token: one for the keys and one for the values of every head of every layer."""
        return 2 * sum(spec.heads for spec in self.layers)
