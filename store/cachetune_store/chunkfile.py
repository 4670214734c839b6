"""The chunk file's head: written, and parsed with nothing taken on trust. docs/format.md describes the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash

from .buffers import round_up
from .checksums import update
from .chunk import ChunkHead, plan_slab
from .codecs import Codec, get_codec
from .errors import DamagedChunkError, UnknownCodecError, UnknownFormatError
from .keys import FORMAT_VERSION, ChunkKey, Namespace
from .layout import ChunkLayout, LayerSpec

__all__ = ["MAX_HEADER", "MAX_TEXT", "SUFFIX", "encode_head", "parse_head"]

SUFFIX = ".safetensors"
MAX_HEADER = 1 << 20
"""Longest JSON header, in bytes, that is written, or read at all."""
MAX_TEXT = 16 << 20
_DIGEST = 16
_Table = list[tuple[str, str, list[int], int]]


def encode_head(head: ChunkHead) -> bytes:
    """The file up to the first row, a whole number of pages; the chunk's slab follows it.

    Raises:
        ValueError: the text or the header is longer than the format allows.
    """
    text = b"" if head.text is None else head.text.encode("utf-8", "surrogatepass")
    if len(text) > MAX_TEXT:
        raise ValueError(f"chunk text has {len(text)} bytes; at most {MAX_TEXT} can be stored, or pass text=None")
    table, _ = _tensor_table(head.layout, head.block_rows, len(text), head.deviations is not None)
    document: dict[str, Any] = {"__metadata__": _metadata(head)}
    document |= _offsets(table)
    header = json.dumps(document, separators=(",", ":")).encode()
    # Spaces after the JSON are part of safetensors; with them the tensors begin on a page.
    header = header.ljust(round_up(8 + len(header)) - 8)
    if len(header) > MAX_HEADER:
        raise ValueError(
            f"the chunk's header has {len(header)} bytes, {MAX_HEADER} are allowed; shorten the tenant name or the lead-ins"
        )
    front = len(header).to_bytes(8, "little") + header
    small = head.order.numpy().tobytes() + head.token_ids.numpy().tobytes() + head.checksums.tobytes()
    small += head.scores.numpy().tobytes()
    small += (b"" if head.deviations is None else head.deviations.numpy().tobytes()) + text
    small = small.ljust(round_up(_DIGEST + len(small)) - _DIGEST, b"\0")
    return front + _head_digest(front, small) + small


def parse_head(key: ChunkKey, file_bytes: int, read: Callable[[int], memoryview]) -> tuple[ChunkHead, int]:
    """Head of the chunk file of `key`, and its length in bytes.

    Args:
        key: the key that the file's name says.
        file_bytes: the file's length.
        read: gives the file's first bytes, at least as many as asked for or else all there are.

    Raises:
        DamagedChunkError: anything is not as this format version writes it.
        UnknownCodecError: the file needs a codec that isn't registered here.
    """
    try:
        return _parse(key, file_bytes, read)
    except (DamagedChunkError, UnknownCodecError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise DamagedChunkError(f"chunk {key}: the header is not one of this format ({error!r})") from error


def _parse(key: ChunkKey, file_bytes: int, read: Callable[[int], memoryview]) -> tuple[ChunkHead, int]:
    front = read(8)
    if len(front) < 8:
        raise DamagedChunkError(f"chunk {key}: the file has {file_bytes} bytes, too few for a header")
    start = 8 + int.from_bytes(front[:8], "little")
    if start > min(8 + MAX_HEADER, file_bytes) or start != round_up(start):
        raise DamagedChunkError(f"chunk {key}: header length {start - 8} doesn't fit the format or the file")
    raw = read(start)
    document = json.loads(bytes(raw[8:start]))
    metadata = document.pop("__metadata__")
    if metadata["key"] != key.digest:
        raise DamagedChunkError(f"chunk {key}: the file says key {metadata['key']!r}")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise UnknownFormatError(f"chunk {key}: the file says format version {metadata['format_version']!r}")
    layout, block_rows, text_bytes, deviations = _read_layout(metadata["layout"])
    table, small_bytes = _tensor_table(layout, block_rows, text_bytes, deviations)
    end = start + small_bytes
    if document != _offsets(table) or start + sum(row[3] for row in table) != file_bytes:
        raise DamagedChunkError(f"chunk {key}: tensors, shapes or offsets don't fit the layout and {file_bytes} bytes")
    raw = read(end)[:end]
    small = raw[start + _DIGEST :]
    if len(raw) != end or raw[start : start + _DIGEST] != _head_digest(raw[:start], small):
        raise DamagedChunkError(f"chunk {key}: header checksum mismatch")
    namespace = _read_namespace(metadata["namespace"])
    return _read_small(key, layout, block_rows, text_bytes, deviations, namespace, small), end


def _read_small(
    key: ChunkKey,
    layout: ChunkLayout,
    block_rows: int,
    text_bytes: int,
    deviations: bool,
    namespace: Namespace,
    small: memoryview,
) -> ChunkHead:
    tokens, layers = layout.tokens, len(layout.layers)
    blocks = -(-tokens // block_rows)
    position = 0

    def take(count: int, dtype: str) -> Any:
        nonlocal position
        found = np.frombuffer(small, dtype=dtype, count=count, offset=position).copy()
        position += found.nbytes
        return found

    order, token_ids = take(tokens, "<i8"), take(tokens, "<i8")
    checksums, scores = take(layers * blocks, "<u8").reshape(layers, blocks), take(tokens, "<f4")
    columns = layout.deviation_columns
    spread = torch.from_numpy(take(tokens * columns, "<f2").reshape(tokens, columns)) if deviations else None
    if not np.array_equal(np.sort(order), np.arange(tokens)):
        raise DamagedChunkError(f"chunk {key}: the row order is not a permutation of the tokens")
    text = bytes(small[position : position + text_bytes]).decode("utf-8", "surrogatepass") if text_bytes else None
    return ChunkHead(
        key=key,
        namespace=namespace,
        layout=layout,
        token_ids=torch.from_numpy(token_ids),
        order=torch.from_numpy(order),
        scores=torch.from_numpy(scores),
        checksums=checksums,
        text=text,
        block_rows=block_rows,
        deviations=spread,
    )


def _tensor_table(layout: ChunkLayout, block_rows: int, text_bytes: int, deviations: bool) -> tuple[_Table, int]:
    """All tensors in file order as (name, dtype, shape, bytes), and how many bytes come before the first row."""
    tokens, layers = layout.tokens, len(layout.layers)
    blocks = -(-tokens // block_rows)
    table: _Table = [
        ("digest", "U8", [_DIGEST], _DIGEST),
        ("order", "I64", [tokens], 8 * tokens),
        ("token_ids", "I64", [tokens], 8 * tokens),
        ("checksums", "U64", [layers, blocks], 8 * layers * blocks),
        ("scores", "F32", [tokens], 4 * tokens),
    ]
    if deviations:
        columns = layout.deviation_columns
        table.append(("deviations", "F16", [tokens, columns], 2 * tokens * columns))
    if text_bytes:
        table.append(("text", "U8", [text_bytes], text_bytes))
    small = sum(row[3] for row in table)
    _pad(table, "pad.head", small)
    return [*table, *_row_tensors(get_codec(layout.codec), layout)], round_up(small)


@lru_cache(maxsize=64)  # the same for many chunks, of whose opening it would be half
def _row_tensors(codec: Codec, layout: ChunkLayout) -> _Table:
    table: _Table = []
    tokens = layout.tokens
    for index, (spec, form) in enumerate(zip(layout.layers, plan_slab(layout).rows, strict=True)):
        dtype, shape = codec.declare(tokens, spec, layout.dtype)
        table.append((f"layer.{index}", dtype, shape, form.size(tokens)))
        _pad(table, f"pad.{index}", form.size(tokens))
    return table


def _pad(table: _Table, name: str, used: int) -> None:
    short = -used % 4096
    if short:
        table.append((name, "U8", [short], short))


def _offsets(table: _Table) -> dict[str, Any]:
    """The table as safetensors' header spells it."""
    position = 0
    entries = {}
    for name, dtype, shape, count in table:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    return entries


def _head_digest(front: bytes | memoryview, small: bytes | memoryview) -> bytes:
    """xxh3_128 of everything before the first row, except the digest itself."""
    state = xxhash.xxh3_128()
    update(state, front)
    update(state, small)
    return bytes(state.digest())


def _metadata(head: ChunkHead) -> dict[str, str]:
    layout, namespace = head.layout, head.namespace
    shape = {
        "tokens": layout.tokens,
        "dtype": layout.dtype,
        "codec": layout.codec,
        "layers": [[spec.heads, spec.head_dim, spec.v_head_dim] for spec in layout.layers],
        "block_rows": head.block_rows,
        "text_bytes": 0 if head.text is None else len(head.text.encode("utf-8", "surrogatepass")),
        "deviations": head.deviations is not None,
    }
    owner = {
        "model": namespace.model,
        "tokenizer": namespace.tokenizer,
        "dtype": namespace.dtype,
        "lead_ins": [list(lead) for lead in namespace.lead_ins],
        "tenant": namespace.tenant,
    }
    return {
        "format": "cachetune-chunk",
        "format_version": str(FORMAT_VERSION),
        "key": head.key.digest,
        "layout": json.dumps(shape, separators=(",", ":")),
        "namespace": json.dumps(owner, separators=(",", ":")),
    }


def _read_layout(raw: str) -> tuple[ChunkLayout, int, int, bool]:
    shape = json.loads(raw)
    specs = _read_specs(json.dumps(shape["layers"]))
    layout = ChunkLayout(_count(shape["tokens"]), specs, str(shape["dtype"]), str(shape["codec"]))
    if type(shape["deviations"]) is not bool:
        raise ValueError(f"deviations is {shape['deviations']!r}, neither true nor false")
    return layout, _count(shape["block_rows"]), _count(shape["text_bytes"], 0, MAX_TEXT), shape["deviations"]


@lru_cache(maxsize=64)
def _read_specs(raw: str) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(_count(heads), _count(dim), _count(v_dim)) for heads, dim, v_dim in json.loads(raw))


@lru_cache(maxsize=64)  # the same for nearly all files of a store, and lead-ins are long
def _read_namespace(raw: str) -> Namespace:
    owner = json.loads(raw)
    lead_ins = tuple(tuple(_count(token, -(1 << 62)) for token in lead) for lead in owner["lead_ins"])
    return Namespace(owner["model"], owner["tokenizer"], owner["dtype"], lead_ins, owner["tenant"])


def _count(value: Any, least: int = 1, most: int = 1 << 40) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
    return value
