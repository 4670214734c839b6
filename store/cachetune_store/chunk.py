"""A chunk in host memory: its head (everything but the rows) and its rows, laid out as in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .arguments import check_key, check_kind, check_tensor
from .buffers import SlabPool, memory_of, round_up
from .codecs import get_codec
from .errors import NonFiniteError, StoreArgumentError
from .keys import ChunkKey, Namespace, make_key
from .layout import ChunkLayout, LayerSpec, RowFormat, torch_dtype
from .printing import shown
from .seals import CHECKSUMS, FileSeal, Seal

__all__ = [
    "BLOCK_ROWS",
    "Chunk",
    "ChunkHead",
    "SlabPlan",
    "as_written",
    "encode_chunk",
    "in_pool",
    "plan_slab",
    "ranking_order",
]

BLOCK_ROWS = 64
"""Rows of one checksummed block in new files."""


@dataclass(frozen=True)
class SlabPlan:
    """Where the rows of each layer lie in a chunk's slab, which is the tail of its file, byte for byte.

    Attributes:
        rows: how the rows of each layer lie.
        offsets: first byte of each layer, a multiple of the page size.
        total: bytes of the slab, a multiple of the page size.
    """

    rows: tuple[RowFormat, ...]
    offsets: tuple[int, ...]
    total: int


@lru_cache(maxsize=256)
def plan_slab(layout: ChunkLayout) -> SlabPlan:
    """The slab of chunks of this layout."""
    codec = get_codec(layout.codec)
    rows = tuple(codec.row_format(spec, layout.dtype) for spec in layout.layers)
    offsets = [0]
    for form in rows:
        offsets.append(offsets[-1] + round_up(form.size(layout.tokens)))
    return SlabPlan(rows, tuple(offsets[:-1]), offsets[-1])


@lru_cache(maxsize=256)
def block_ends(layout: ChunkLayout, block_rows: int) -> tuple[tuple[int, ...], ...]:
    """For each layer, where its blocks of rows begin, in bytes from the layer's beginning, and where the last one ends."""
    rows = [min(layout.tokens, start) for start in range(0, layout.tokens + block_rows, block_rows)]
    return tuple(tuple(map(form.size, rows)) for form in plan_slab(layout).rows)


@dataclass(frozen=True, eq=False)
class ChunkHead:
    """Everything of a chunk but its rows.

    Attributes:
        order: int64 [tokens]; row i holds token order[i].
        scores: float32 [tokens], in token order.
        token_ids: int64 [tokens], in token order.
        checksums: uint64 [layers, blocks], the seal's sum of each block of rows; [layers, blocks, words] if a sum has several.
        has_deviations: whether the chunk has deviations (see `Chunk`).
        deviations_sum: uint64 [words], the seal's sum of the deviations; None if there are none. None too if the chunk was read from
            a file of format 1, whose digest covers them.
        text: what the tokens spell, if it was given.
        seal: what the sums were made with. Of a chunk that was read, it is that of its file.
    """

    key: ChunkKey
    namespace: Namespace
    layout: ChunkLayout
    token_ids: Tensor
    order: Tensor
    scores: Tensor
    checksums: npt.NDArray[np.uint64]
    text: str | None = None
    block_rows: int = BLOCK_ROWS
    has_deviations: bool = False
    deviations_sum: npt.NDArray[np.uint64] | None = None
    seal: FileSeal = CHECKSUMS

    @cached_property
    def plan(self) -> SlabPlan:
        """Where the rows lie."""
        return plan_slab(self.layout)

    @property
    def deviations_bytes(self) -> int:
        """Bytes of the chunk's deviations; 0 if there are none."""
        return 2 * self.layout.tokens * self.layout.deviation_columns if self.has_deviations else 0

    def host_bytes(self, pool: SlabPool) -> int:
        """What a chunk with this head takes of host memory: its slab, from `pool`, and the deviations."""
        beside = self.deviations_bytes
        return pool.size_of(self.plan.total) + (pool.size_of(beside) if beside and pool.pinned else beside)


@dataclass(frozen=True, eq=False)
class Chunk:
    """A whole chunk.

    Attributes:
        head: all but the rows.
        slab: uint8 [plan.total], page-aligned.
        host_bytes: what the chunk takes of host memory.
        deviations: float16 [tokens, layout.deviation_columns], in token order: how far keys and values were apart behind
            different lead-ins; None where there was one only. Layer by layer, a column for the keys of each head, then one
            for the values of each.
        layers: views of the slab, uint8 [bytes of the layer's rows] each.
    """

    head: ChunkHead
    slab: Tensor
    host_bytes: int
    deviations: Tensor | None = None
    layers: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_views(self.head.layout, self.slab))

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self.head.key

    @cached_property
    def page_locked(self) -> bool:
        """Whether the slab is page-locked."""
        return self.slab.is_pinned()

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each layer begins in memory."""
        return tuple(layer.data_ptr() for layer in self.layers)


def in_pool(deviations: Tensor, pool: SlabPool) -> Tensor:
    """Deviations in memory of their own; of the pool, if that is page-locked: a GPU then fetches them by itself."""
    if not pool.pinned:
        return deviations.clone()
    if deviations.is_pinned():
        return deviations
    return pool.allocate(deviations.nbytes).view(torch.float16).view(deviations.shape).copy_(deviations)


def sum_of_deviations(
    key: ChunkKey, deviations: Tensor, layers: int, seal: FileSeal, into: memoryview | None = None
) -> npt.NDArray[np.uint64]:
    """The seal's sum of a chunk's deviations, as in ChunkHead. They are sealed as the only block of one more layer behind the last.

    If the seal hides rows, what the file holds of them is written to `into`.
    """
    found = seal.rows(key, layers, 0, memory_of(deviations.view(-1).view(torch.uint8)), into)
    return np.array(found, np.uint64).reshape(-1)


def layer_views(layout: ChunkLayout, slab: Tensor) -> tuple[Tensor, ...]:
    """The layers of a slab, uint8 [bytes of the layer's rows] each, without a copy."""
    return slab.split(_pieces(layout))[::2]


@lru_cache(maxsize=256)
def _pieces(layout: ChunkLayout) -> list[int]:
    """Bytes of each layer's rows and of the padding behind them, in turn."""
    plan = plan_slab(layout)
    ends = (*plan.offsets[1:], plan.total)
    sizes = [form.size(layout.tokens) for form in plan.rows]
    return [n for offset, size, end in zip(plan.offsets, sizes, ends, strict=True) for n in (size, end - offset - size)]


def clear_padding(layout: ChunkLayout, slab: Tensor) -> None:
    """Zero the bytes between layers, so that equal chunks are equal files."""
    memory, at = slab.numpy(), 0
    for number, size in enumerate(_pieces(layout)):
        if number % 2 and size:
            memory[at : at + size] = 0
        at += size


def ranking_order(scores: Tensor) -> Tensor:
    """Token of each row, int64 [tokens]: ascending score, ties to the larger index first.

    So the last rows are the top of the ranking "descending score, ties to the smaller index", read backwards, and the
    tokens left over for any ratio are the first rows.
    """
    return torch.sort(scores, descending=True, stable=True).indices.flip(0)


def encode_chunk(
    key: ChunkKey,
    layers: Sequence[tuple[Tensor, Tensor]],
    scores: Tensor,
    *,
    namespace: Namespace,
    token_ids: Sequence[int],
    text: str | None,
    codec: str,
    pool: SlabPool,
    deviations: Tensor | None = None,
    seal: FileSeal = CHECKSUMS,
) -> Chunk:
    """The chunk of these keys and values, encoded and put in ranking order; arguments as for ChunkStore.put(). `seal` makes its sums.

    Raises:
        StoreArgumentError: shapes, dtypes or key don't belong together.
        NonFiniteError: a score or deviation is NaN or infinite, or the codec can't store a value.
    """
    layout = _check(key, layers, namespace, token_ids, codec)
    check_tensor(scores, "scores")
    flat = scores.detach().to("cpu", torch.float32).contiguous().clone()
    if flat.shape != (layout.tokens,):
        raise StoreArgumentError(f"scores have shape {tuple(scores.shape)}; need one a token, ({layout.tokens},)")
    if not bool(torch.isfinite(flat).all()):
        raise NonFiniteError("scores hold an infinity or NaN, so the tokens have no ranking; store finite scores")
    spread = None if deviations is None else _check_deviations(layout, deviations)
    order = ranking_order(flat)
    encoder = get_codec(codec)
    total = plan_slab(layout).total
    slab = pool.allocate(total)
    for view, (k, v) in zip(layer_views(layout, slab), layers, strict=True):
        rows = order.to(k.device)
        view.copy_(encoder.encode(k.detach().index_select(0, rows), v.detach().index_select(0, rows)))
    clear_padding(layout, slab)
    head = ChunkHead(
        key=key,
        namespace=namespace,
        layout=layout,
        token_ids=torch.tensor(list(token_ids), dtype=torch.int64),
        order=order,
        scores=flat,
        checksums=block_checksums(key, layout, slab, BLOCK_ROWS, seal),
        text=text,
        has_deviations=spread is not None,
        deviations_sum=None if spread is None else sum_of_deviations(key, spread, len(layout.layers), seal),
        seal=seal,
    )
    return Chunk(head, slab, head.host_bytes(pool), None if spread is None else in_pool(spread, pool))


def block_checksums(
    key: ChunkKey, layout: ChunkLayout, slab: Tensor, block_rows: int, seal: FileSeal, into: Tensor | None = None
) -> npt.NDArray[np.uint64]:
    """The seal's sum of every block of rows of every layer, as in ChunkHead; the last block may be shorter.

    If the seal hides rows, what their file holds goes to the same places of `into`.
    """
    memory, target = memory_of(slab), memory_of(slab if into is None else into)
    sums = [
        [
            seal.rows(key, layer, block, memory[offset + start : offset + end], target[offset + start : offset + end])
            for block, (start, end) in enumerate(pairwise(ends))
        ]
        for layer, (offset, ends) in enumerate(
            zip(plan_slab(layout).offsets, block_ends(layout, block_rows), strict=True)
        )
    ]
    return np.array(sums, np.uint64)


def as_written(chunk: Chunk, seal: Seal) -> tuple[ChunkHead, Tensor, memoryview]:
    """The head, the slab and the bytes of the deviations (none, if there are none) of a new file of a chunk, in a store with this seal.

    Sums are those of the store, which another store's chunk doesn't have. Slab and deviations are the chunk's own, unless the store hides rows.
    """
    head, file = chunk.head, seal.new_file(chunk.head.namespace.tenant)
    slab, spread, apart = chunk.slab, chunk.deviations, memoryview(b"")
    if head.seal is not file:
        slab = torch.empty_like(chunk.slab) if file.hides else chunk.slab
        sums = block_checksums(head.key, head.layout, chunk.slab, head.block_rows, file, slab)
        if file.hides:
            clear_padding(head.layout, slab)
        head = replace(head, checksums=sums, deviations_sum=None, seal=file)
    if spread is not None:
        apart = memoryview(bytearray(spread.nbytes)) if file.hides else memory_of(spread.view(-1).view(torch.uint8))
        if head.deviations_sum is None:
            head = replace(
                head, deviations_sum=sum_of_deviations(head.key, spread, len(head.layout.layers), file, apart)
            )
    return head, slab, apart


def _check_deviations(layout: ChunkLayout, deviations: Tensor) -> Tensor:
    check_tensor(deviations, "deviations")
    wanted = (layout.tokens, layout.deviation_columns)
    if deviations.shape != wanted:
        raise StoreArgumentError(
            f"deviations have shape {tuple(deviations.shape)}; need {wanted}: keys and values of every layer's heads"
        )
    found = deviations.detach().to("cpu", torch.float16).contiguous().clone()
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError("deviations hold NaN or what float16 can't hold; clamp them to at most 65504")
    return found


def _check(
    key: ChunkKey,
    layers: Sequence[tuple[Tensor, Tensor]],
    namespace: Namespace,
    token_ids: Sequence[int],
    codec: str,
) -> ChunkLayout:
    check_key(key)
    wanted_key = make_key(namespace, token_ids)  # which looks at both
    tokens = len(token_ids)
    check_kind(layers, (list, tuple), "layers", "use a list of pairs of tensors, keys and values")
    if not tokens or not layers:
        raise StoreArgumentError(f"a stored chunk has 1 token and 1 layer at least, not {tokens} and {len(layers)}")
    if wanted_key != key:
        raise StoreArgumentError(
            f"key {key} is not that of these token ids in this namespace; build it with make_key()"
        )
    wanted = torch_dtype(namespace.dtype)
    specs = []
    for index, pair in enumerate(layers):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise StoreArgumentError(f"layer {index} is {shown(pair)}; use a pair of tensors, keys and values")
        k, v = pair
        check_tensor(k, f"keys of layer {index}")
        check_tensor(v, f"values of layer {index}")
        if k.ndim != 3 or v.ndim != 3 or k.shape[0] != tokens or v.shape[:2] != k.shape[:2]:
            raise StoreArgumentError(
                f"layer {index}: keys {tuple(k.shape)} and values {tuple(v.shape)}; need [{tokens}, heads, head_dim] each"
            )
        if k.dtype != wanted or v.dtype != wanted:
            raise StoreArgumentError(
                f"layer {index}: keys are {k.dtype}, values {v.dtype}; the namespace says {wanted}"
            )
        specs.append(LayerSpec(k.shape[1], k.shape[2], v.shape[2]))
    return ChunkLayout(tokens, tuple(specs), namespace.dtype, codec)
