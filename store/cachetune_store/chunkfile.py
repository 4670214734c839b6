"""The chunk file's head: written, and parsed with nothing taken on trust. docs/format.md describes the format."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .buffers import PAGE, memory_of, round_up
from .chunk import Chunk, ChunkHead, as_written, plan_slab
from .errors import DamagedChunkError, StoreArgumentError, UnknownCodecError, UnknownFormatError
from .filetable import (
    DIGEST_BYTES,
    FILE_VERSION,
    Table,
    describes,
    rest_of_header,
    small_tensors,
    spell,
    tail_tensors,
)
from .keys import ChunkKey, Namespace
from .layout import ChunkLayout, LayerSpec
from .printing import shown
from .seals import Seal

__all__ = ["MAX_HEADER", "MAX_TEXT", "SUFFIX", "ParsedHead", "encode_file", "encode_head", "parse_head"]

SUFFIX = ".safetensors"
_KNOWN_VERSIONS = {"1": 1, "2": 2}
MAX_HEADER = 1 << 20
"""Longest JSON header, in bytes, that is written, or read at all."""
MAX_TEXT = 16 << 20
_FIRST = '{"__metadata__":{'
_NAMESPACES: WeakValueDictionary[bytes, Namespace] = WeakValueDictionary()
_DECODER = json.JSONDecoder()
_NUMPY = {"U8": "u1", "I64": "<i8", "U64": "<u8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class ParsedHead:
    """What a file's beginning says.

    Attributes:
        head: the chunk's head.
        rows_start: where the first row lies; the head's length, too.
        deviations: those of a file of format 1, whose head holds them. None where there are none, or where they lie apart.
    """

    head: ChunkHead
    rows_start: int
    deviations: Tensor | None = None

    @property
    def deviations_start(self) -> int:
        """Where deviations lie that are apart: behind the last layer."""
        return self.rows_start + self.head.plan.total


def encode_file(chunk: Chunk, seal: Seal) -> tuple[bytes, list[bytes | memoryview]]:
    """A new file of a chunk, in a store with this seal: up to the first row, and the parts from there on.

    Raises:
        StoreArgumentError: as for `encode_head`.
    """
    head, slab, deviations = as_written(chunk, seal)
    return encode_head(head), [memory_of(slab), deviations, bytes(-len(deviations) % PAGE)]


def encode_head(head: ChunkHead) -> bytes:
    """The file up to the first row, a whole number of pages. The chunk's slab follows it, then the deviations if there are any.

    Raises:
        StoreArgumentError: the text or the header is longer than the format allows.
    """
    text = b"" if head.text is None else head.text.encode("utf-8", "surrogatepass")
    if len(text) > MAX_TEXT:
        raise StoreArgumentError(
            f"chunk text has {len(text)} bytes; at most {MAX_TEXT} can be stored, or pass text=None"
        )
    table, rows_at = small_tensors(head.layout, head.block_rows, len(text), head.has_deviations, head.seal)
    tail = tail_tensors(head.layout, head.has_deviations)
    header = (_FIRST + spell(_metadata(head))[1:] + rest_of_header(head.layout, table, rows_at, tail)).encode()
    # Spaces after the JSON are part of safetensors; with them the tensors begin on a page.
    header = header.ljust(round_up(8 + len(header)) - 8)
    if len(header) > MAX_HEADER:
        raise StoreArgumentError(
            f"the chunk's header has {len(header)} bytes, {MAX_HEADER} are allowed; shorten the tenant name or the lead-ins"
        )
    front = len(header).to_bytes(8, "little") + header
    tensors = head.order.numpy().tobytes() + head.token_ids.numpy().tobytes() + head.checksums.tobytes()
    tensors += head.scores.numpy().tobytes()
    tensors += (b"" if head.deviations_sum is None else head.deviations_sum.tobytes()) + text
    tensors = tensors.ljust(round_up(DIGEST_BYTES + len(tensors)) - DIGEST_BYTES, b"\0")
    digest, small = head.seal.head(head.key, front, tensors)
    return b"".join((front, digest, small))


def parse_head(key: ChunkKey, file_bytes: int, read: Callable[[int], memoryview], seal: Seal) -> ParsedHead:
    """Head of the chunk file of `key`.

    Args:
        key: the key that the file's name says.
        file_bytes: the file's length.
        read: gives the file's first bytes, at least as many as asked for or else all there are.
        seal: the store's. A file that was written with another one is damaged.

    Raises:
        DamagedChunkError: anything is not as the file's format version has it.
        UnknownCodecError: the file needs a codec that isn't registered here.
    """
    try:
        return _parse(key, file_bytes, read, seal)
    except (DamagedChunkError, UnknownCodecError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise DamagedChunkError(f"chunk {key}: the header is not one of this format ({shown(error)})") from error


def _parse(key: ChunkKey, file_bytes: int, read: Callable[[int], memoryview], seal: Seal) -> ParsedHead:
    front = read(8)
    if len(front) < 8:
        raise DamagedChunkError(f"chunk {key}: the file has {file_bytes} bytes, too few for a header")
    start = 8 + int.from_bytes(front[:8], "little")
    if start > min(8 + MAX_HEADER, file_bytes) or start != round_up(start):
        raise DamagedChunkError(f"chunk {key}: header length {start - 8} doesn't fit the format or the file")
    raw = read(start)
    header = str(raw[8:start], "utf-8")
    metadata, rest = _take_metadata(header)
    if metadata["key"] != seal.chunk_name(key):
        raise DamagedChunkError(f"chunk {key}: the file says key {shown(metadata['key'])}")
    version = _KNOWN_VERSIONS.get(metadata["format_version"])
    if version is None:
        raise UnknownFormatError(f"chunk {key}: the file says format version {shown(metadata['format_version'])}")
    file = seal.file(key, metadata)
    layout, block_rows, text_bytes, deviations = _read_layout(metadata["layout"])
    table, small_bytes = small_tensors(layout, block_rows, text_bytes, deviations, file, version)
    tail = tail_tensors(layout, deviations, version)
    end = start + small_bytes
    # As we write it, or the same in other words. Comparing what JSON says of seventy tensors takes longer than reading the head.
    fits = rest == rest_of_header(layout, table, small_bytes, tail) or describes(
        header, metadata, layout, table, small_bytes, tail
    )
    if not fits or end + plan_slab(layout).total + sum(row[3] for row in tail) != file_bytes:
        raise DamagedChunkError(f"chunk {key}: tensors, shapes or offsets don't fit the layout and {file_bytes} bytes")
    raw = read(end)[:end]
    small = file.open_head(key, raw[:start], raw[start : start + DIGEST_BYTES], raw[start + DIGEST_BYTES :])
    if len(raw) != end or small is None:
        raise DamagedChunkError(f"chunk {key}: header checksum mismatch")
    namespace = _read_namespace(file.reveal_namespace(metadata["namespace"]))
    tensors = _read_small(table, small)
    spread = tensors.get("deviations")
    order, text = tensors["order"].copy(), tensors.get("text")
    if not np.array_equal(np.sort(order), np.arange(layout.tokens)):
        raise DamagedChunkError(f"chunk {key}: the row order is not a permutation of the tokens")
    apart = tensors.get("deviations_sum")
    head = ChunkHead(
        key=key,
        namespace=namespace,
        layout=layout,
        token_ids=torch.from_numpy(tensors["token_ids"].copy()),
        order=torch.from_numpy(order),
        scores=torch.from_numpy(tensors["scores"].copy()),
        checksums=tensors["checksums"].copy(),
        text=None if text is None else bytes(text.data).decode("utf-8", "surrogatepass"),
        block_rows=block_rows,
        has_deviations=deviations,
        deviations_sum=None if apart is None else apart.copy(),
        seal=file,
    )
    # Most of the head of format 1: left where it was read, which costs the memory around it and no time.
    return ParsedHead(head, end, None if spread is None else torch.from_numpy(spread))


def _read_small(table: Table, small: memoryview) -> dict[str, npt.NDArray[Any]]:
    """The tensors behind the digest, which stands first, as views of what was read."""
    found, position = {}, 0
    for name, dtype, shape, count in table[1:]:
        numbers = np.frombuffer(small, dtype=_NUMPY[dtype], count=math.prod(shape), offset=position)
        found[name] = numbers.reshape(shape)
        position += count
    return found


def _take_metadata(header: str) -> tuple[dict[str, Any], str]:
    """The header's metadata, and what comes behind them if they come first: they alone say how to read the rest."""
    if header.startswith(_FIRST):
        metadata, end = _DECODER.raw_decode(header, len(_FIRST) - 1)
        return metadata, header[end:].rstrip(" ")
    return json.loads(header)["__metadata__"], ""


def _metadata(head: ChunkHead) -> dict[str, str]:
    layout, namespace = head.layout, head.namespace
    shape = {
        "tokens": layout.tokens,
        "dtype": layout.dtype,
        "codec": layout.codec,
        "layers": [[spec.heads, spec.head_dim, spec.v_head_dim] for spec in layout.layers],
        "block_rows": head.block_rows,
        "text_bytes": 0 if head.text is None else len(head.text.encode("utf-8", "surrogatepass")),
        "deviations": head.has_deviations,
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
        "format_version": str(FILE_VERSION),
        "key": head.seal.chunk_name(head.key),
        "layout": spell(shape),
        "namespace": head.seal.hide_namespace(spell(owner)),
    } | dict(head.seal.metadata)


@lru_cache(maxsize=256)
def _read_layout(raw: str) -> tuple[ChunkLayout, int, int, bool]:
    shape = json.loads(raw)
    specs = _read_specs(json.dumps(shape["layers"]))
    layout = ChunkLayout(_count(shape["tokens"]), specs, str(shape["dtype"]), str(shape["codec"]))
    if type(shape["deviations"]) is not bool:
        raise ValueError(f"deviations is {shown(shape['deviations'])}, neither true nor false")
    return layout, _count(shape["block_rows"]), _count(shape["text_bytes"], 0, MAX_TEXT), shape["deviations"]


@lru_cache(maxsize=64)
def _read_specs(raw: str) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(_count(heads), _count(dim), _count(v_dim)) for heads, dim, v_dim in json.loads(raw))


@lru_cache(maxsize=64)  # the same for nearly all files of a store, and lead-ins are long
def _read_namespace(raw: str) -> Namespace:
    digest = hashlib.sha256(raw.encode("utf-8", "surrogatepass")).digest()
    # Those that heads in memory have are used again, however many there are.
    return _NAMESPACES.get(digest) or _NAMESPACES.setdefault(digest, _parse_namespace(raw))


def _parse_namespace(raw: str) -> Namespace:
    owner = json.loads(raw)
    lead_ins = tuple(tuple(_count(token, -(1 << 62)) for token in lead) for lead in owner["lead_ins"])
    return Namespace(owner["model"], owner["tokenizer"], owner["dtype"], lead_ins, owner["tenant"])


def _count(value: Any, least: int = 1, most: int = 1 << 40) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is not a whole number from {least} to {most}")
    return value
