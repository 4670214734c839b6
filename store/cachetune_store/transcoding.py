"""A chunk in another codec, for tiers whose bytes cost more than those of others."""

from __future__ import annotations

from dataclasses import replace

from .buffers import SlabPool
from .chunk import BLOCK_ROWS, Chunk, block_checksums, clear_padding, layer_views, plan_slab, sum_of_deviations
from .codecs import get_codec
from .errors import NonFiniteError
from .seals import FileSeal

__all__ = ["transcoded"]


def transcoded(chunk: Chunk, codec: str, pool: SlabPool, seal: FileSeal) -> Chunk:
    """The chunk with its rows in `codec`, in the same order, and sums of `seal`. If the codec can't hold a value of it, the chunk itself."""
    old = chunk.head.layout
    if old.codec == codec:
        return chunk
    decoder, encoder = get_codec(old.codec), get_codec(codec)
    layout = replace(old, codec=codec)
    slab = pool.allocate(plan_slab(layout).total)
    try:
        for spec, rows, view in zip(old.layers, chunk.layers, layer_views(layout, slab), strict=True):
            view.copy_(encoder.encode(*decoder.decode(rows, spec, old.dtype)))
    except NonFiniteError:
        return chunk
    clear_padding(layout, slab)
    checksums = block_checksums(chunk.key, layout, slab, BLOCK_ROWS, seal)
    spread = chunk.deviations
    apart = None if spread is None else sum_of_deviations(chunk.key, spread, len(layout.layers), seal)
    head = replace(
        chunk.head, layout=layout, checksums=checksums, deviations_sum=apart, block_rows=BLOCK_ROWS, seal=seal
    )
    return Chunk(head, slab, head.host_bytes(pool), spread)
