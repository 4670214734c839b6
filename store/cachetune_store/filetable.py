"""The tensors of a chunk file, and how its header names them. docs/format.md describes the format."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from .buffers import round_up
from .chunk import plan_slab
from .codecs import Codec, get_codec
from .layout import ChunkLayout
from .seals import FileSeal

__all__ = [
    "DIGEST_BYTES",
    "FILE_VERSION",
    "Table",
    "describes",
    "rest_of_header",
    "small_tensors",
    "spell",
    "tail_tensors",
]

FILE_VERSION = 2
"""The format of new files. Those of format 1 are read as well; they have the deviations in the head."""
DIGEST_BYTES = 16
Table = list[tuple[str, str, list[int], int]]
"""Tensors in file order: name, dtype, shape, bytes."""


def _sums_shape(layers: int, blocks: int, seal: FileSeal) -> list[int]:
    return [layers, blocks] if seal.words == 1 else [layers, blocks, seal.words]


def small_tensors(
    layout: ChunkLayout,
    block_rows: int,
    text_bytes: int,
    deviations: bool,
    seal: FileSeal,
    version: int = FILE_VERSION,
) -> tuple[Table, int]:
    """The tensors before the first row in file order as (name, dtype, shape, bytes), and their bytes together."""
    tokens, layers = layout.tokens, len(layout.layers)
    blocks = -(-tokens // block_rows)
    table: Table = [
        ("digest", "U8", [DIGEST_BYTES], DIGEST_BYTES),
        ("order", "I64", [tokens], 8 * tokens),
        ("token_ids", "I64", [tokens], 8 * tokens),
        ("checksums", "U64", _sums_shape(layers, blocks, seal), 8 * layers * blocks * seal.words),
        ("scores", "F32", [tokens], 4 * tokens),
    ]
    if deviations and version == 1:
        table.append(_deviations(layout))
    elif deviations:
        table.append(("deviations_sum", "U64", [seal.words], 8 * seal.words))
    if text_bytes:
        table.append(("text", "U8", [text_bytes], text_bytes))
    small = sum(row[3] for row in table)
    _pad(table, "pad.head", small)
    return table, round_up(small)


def tail_tensors(layout: ChunkLayout, deviations: bool, version: int = FILE_VERSION) -> Table:
    """The tensors behind the last layer, read when they are asked for."""
    table: Table = []
    if deviations and version > 1:
        table.append(_deviations(layout))
        _pad(table, "pad.deviations", table[0][3])
    return table


def _deviations(layout: ChunkLayout) -> tuple[str, str, list[int], int]:
    tokens, columns = layout.tokens, layout.deviation_columns
    return "deviations", "F16", [tokens, columns], 2 * tokens * columns


def _row_tensors(layout: ChunkLayout) -> Table:
    """The tensors from the first row on."""
    table: Table = []
    tokens, codec = layout.tokens, get_codec(layout.codec)
    for index, (spec, form) in enumerate(zip(layout.layers, plan_slab(layout).rows, strict=True)):
        dtype, shape = codec.declare(tokens, spec, layout.dtype)
        table.append((f"layer.{index}", dtype, shape, form.size(tokens)))
        _pad(table, f"pad.{index}", form.size(tokens))
    return table


def _pad(table: Table, name: str, used: int) -> None:
    short = -used % 4096
    if short:
        table.append((name, "U8", [short], short))


def _offsets(table: Table, position: int = 0) -> dict[str, Any]:
    """The table as safetensors' header spells it, from `position` on."""
    entries = {}
    for name, dtype, shape, count in table:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    return entries


def rest_of_header(layout: ChunkLayout, small: Table, rows_at: int, tail: Table) -> str:
    """The header's JSON behind its metadata."""
    behind = f",{spell(_offsets(tail, rows_at + plan_slab(layout).total))[1:-1]}" if tail else ""
    return f",{spell(_offsets(small))[1:-1]},{_spelled_rows(layout, get_codec(layout.codec), rows_at)}{behind}}}"


@lru_cache(maxsize=64)  # the same for many chunks
def _spelled_rows(layout: ChunkLayout, codec: Codec, rows_at: int) -> str:
    return spell(_offsets(_row_tensors(layout), rows_at))[1:-1]


def describes(header: str, metadata: object, layout: ChunkLayout, small: Table, rows_at: int, tail: Table) -> bool:
    """Whether a header holds these metadata and says of the tensors what it must, whatever its spelling."""
    expected = {"__metadata__": metadata} | _offsets(small) | _offsets(_row_tensors(layout) + tail, rows_at)
    return bool(json.loads(header) == expected)


def spell(value: Any) -> str:
    """JSON, as short as it can be."""
    return json.dumps(value, separators=(",", ":"))
