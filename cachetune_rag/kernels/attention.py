"""Attention of some of a prompt's tokens, at ascending positions, over all of its keys and values.

No mask is held in memory. A query at position p sees the keys 0..p (or the last `window` of them), and a block of queries goes only
over keys that at least one of them sees. Query heads that share a key head are computed together, so that their keys and values are
read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachetune_rag.kernels.support import LOG2E, Listed, aligned, power_of_two, precision

_PROGRAMS = 560
"""How many programs make good use of a large GPU (measured on an H100). Where there are fewer, several share one block's keys."""
_PROCESSORS = 128
"""About as many multiprocessors as a large GPU has."""


@triton.jit
def _walk(
    acc, sums, top, query, keys, values, ROWS, start, stop, pos,
    key_stride, value_stride, scale2, window,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, LISTED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys start..stop-1 to a softmax that is computed block by block; or those that stand at start..stop-1 in the list ROWS."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    for begin in range(start, stop, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < stop
        if LISTED:
            n = tl.load(ROWS + n, mask=inside, other=2147483647)
        key_at = keys + n[:, None].to(tl.int64) * key_stride + d[None, :]
        value_at = values + n[:, None].to(tl.int64) * value_stride + dv[None, :]
        if ALIGNED:
            # The addresses come from a table, so the compiler can't see that rows begin at multiples of 16 bytes.
            key_at = tl.multiple_of(key_at, [16, 16])
            value_at = tl.multiple_of(value_at, [16, 16])
        if MASKED or BLOCK_D != DIM:
            k = tl.load(key_at, mask=inside[:, None] & (d[None, :] < DIM), other=0.0)
        else:
            k = tl.load(key_at)
        score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale2
        if MASKED:
            seen = n[None, :] <= pos[:, None]
            if WINDOWED:
                seen &= pos[:, None] - n[None, :] < window
            # Not -inf: a row that sees nothing (padding) would become NaN.
            score = tl.where(seen, score, -1.0e30)
        best = tl.maximum(top, tl.max(score, 1))
        weight = tl.math.exp2(score - best[:, None])
        if WINDOWED:
            # For a row whose window begins behind this block, `best` is the filler as well, and exp2(0) would count as a weight.
            weight = tl.where(seen, weight, 0.0)
        shrink = tl.math.exp2(top - best)
        sums = sums * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        if MASKED or BLOCK_V != V_DIM:
            v = tl.load(value_at, mask=inside[:, None] & (dv[None, :] < V_DIM), other=0.0)
        else:
            v = tl.load(value_at)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
        top = best
    return acc, sums, top


@triton.jit(do_not_specialize=["layer", "tokens", "window"])
def _attend(
    QUERY, OUT, LSE, TABLE, POSITIONS, ROWS, COUNT,
    query_token, query_head, layer, tokens, scale2, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, ALIGNED: tl.constexpr, WITH_LSE: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # The last tokens see most keys and take longest, so they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    q_head = head * GROUP + row % GROUP
    live = token < tokens
    # Rows behind the last token take its position, so that they change neither how far the block goes nor where it needs a mask.
    pos = tl.load(POSITIONS + tl.minimum(token, tokens - 1)).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    query = tl.load(
        QUERY + token[:, None].to(tl.int64) * query_token + q_head[:, None] * query_head + d[None, :],
        mask=live[:, None] & (d[None, :] < DIM),
        other=0.0,
    )
    element = QUERY.dtype.element_ty
    keys = tl.load(TABLE + 2 * layer).to(tl.pointer_type(element)) + head * DIM
    values = tl.load(TABLE + 2 * layer + 1).to(tl.pointer_type(element)) + head * V_DIM
    last = tl.max(pos, 0)
    first = tl.min(tl.where(pos >= 0, pos, 2147483647), 0)
    stop = last + 1
    # Keys up to the first row's position are seen by all rows of the block, so no mask is needed there.
    plain = tl.where(tl.min(pos, 0) < 0, 0, (first + 1) // BLOCK_N * BLOCK_N)
    start = 0
    if WINDOWED:
        start = tl.where(last < 0, 0, tl.maximum(0, first - window + 1) // BLOCK_N * BLOCK_N)
        plain = start
    if LISTED:
        start = 0
        stop = tl.load(COUNT).to(tl.int32)
        plain = start
    split = tl.program_id(2)
    if SPLITS > 1:
        # Where few queries see many keys, several programs share the keys, and `_combine` puts the parts together.
        share = tl.cdiv(tl.cdiv(stop - start, SPLITS), BLOCK_N) * BLOCK_N
        start = start + split * share
        stop = tl.minimum(stop, start + share)
        plain = tl.minimum(tl.maximum(plain, start), stop)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    if not WINDOWED and not LISTED:
        acc, sums, top = _walk(
            acc, sums, top, query, keys, values, ROWS, start, plain, pos,
            KV_HEADS * DIM, KV_HEADS * V_DIM, scale2, window,
            DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, False, False, ALIGNED, PRECISION,
        )  # fmt: skip
    acc, sums, top = _walk(
        acc, sums, top, query, keys, values, ROWS, plain, stop, pos,
        KV_HEADS * DIM, KV_HEADS * V_DIM, scale2, window,
        DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, WINDOWED, LISTED, ALIGNED, PRECISION,
    )  # fmt: skip
    sums = tl.where(sums > 0, sums, 1.0)
    out = acc / sums[:, None]
    heads = KV_HEADS * GROUP
    at = OUT + ((split * tokens + token[:, None]).to(tl.int64) * heads + q_head[:, None]) * V_DIM + dv[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=live[:, None] & (dv[None, :] < V_DIM))
    if WITH_LSE:
        tl.store(LSE + (split * tokens + token).to(tl.int64) * heads + q_head, top + tl.math.log2(sums), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    PARTS, PART_LSE, OUT, LSE, tokens,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Puts together attention over separate ranges of keys, by the logarithm of each range's denominator."""
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dv = tl.arange(0, BLOCK_V)[None, :]
    some = h < HEADS
    ok = some[:, None] & (dv < V_DIM)
    top = tl.full([BLOCK_H], -1.0e30, dtype=tl.float32)
    for split in range(SPLITS):
        row = (split * tokens + token).to(tl.int64) * HEADS + h
        top = tl.maximum(top, tl.load(PART_LSE + row, mask=some, other=-1.0e30))
    sums = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V], dtype=tl.float32)
    for split in range(SPLITS):
        row = (split * tokens + token).to(tl.int64) * HEADS + h
        weight = tl.math.exp2(tl.load(PART_LSE + row, mask=some, other=-1.0e30) - top)
        sums += weight
        acc += weight[:, None] * tl.load(PARTS + row[:, None] * V_DIM + dv, mask=ok, other=0.0)
    row = token.to(tl.int64) * HEADS + h
    tl.store(OUT + row[:, None] * V_DIM + dv, (acc / sums[:, None]).to(OUT.dtype.element_ty), mask=ok)
    if WITH_LSE:
        tl.store(LSE + row, top + tl.math.log2(sums), mask=some)


def attend(
    query: Tensor,
    table: Tensor,
    layer: int,
    positions: Tensor,
    *,
    kv_heads: int,
    v_dim: int,
    scale: float,
    window: int | None = None,
    lse: Tensor | None = None,
    listed: Listed | None = None,
    blocks: tuple[int, int, int, int] | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention output [1, tokens, heads, v_dim].

    Args:
        query: [1, heads, tokens, dim], rotated, contiguous in the last dimension.
        table: `row_addresses`, int64 on the device, of keys [length, kv_heads, dim] and values [length, kv_heads, v_dim].
        layer: the layer whose keys and values are used.
        positions: int64 [tokens], ascending. Padding stands in front, at -1; its output is finite and has no meaning.
        kv_heads, v_dim: shape of the keys and values.
        scale: scores are multiplied by this.
        window: how many keys a query sees, its own included; None for all before it.
        lse: float32 [tokens, heads]; filled with the base-2 logarithm of each softmax's denominator.
        listed: the keys that are seen at all, None for all.
        blocks: (query rows, keys, warps, stages) of a program; None: what suits the shape.
        splits: how many programs share the keys of a block of queries; None: what suits the shape.
    """
    _, heads, tokens, dim = query.shape
    group = heads // kv_heads
    out = torch.empty(1, tokens, heads, v_dim, dtype=query.dtype, device=query.device)
    block_d, block_v = power_of_two(dim, 16), power_of_two(v_dim, 16)
    rows, keys, warps, stages = blocks or _blocks(tokens * group, kv_heads, max(block_d, block_v), query.dtype)
    programs = triton.cdiv(tokens * group, rows) * kv_heads
    # A power of two, so that few variants are compiled. More than 8 only where multiprocessors would be idle otherwise.
    most = max(8, _PROCESSORS // programs)
    splits = splits or 1 << max(1, min(most, _PROGRAMS // programs)).bit_length() - 1
    parts, part_lse = out, out if lse is None else lse
    if splits > 1:
        parts = torch.empty(splits, tokens, heads, v_dim, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(splits, tokens, heads, dtype=torch.float32, device=query.device)
    _attend[(kv_heads, triton.cdiv(tokens * group, rows), splits)](
        query, parts, part_lse, table, positions, *(listed or (positions, positions)),
        query.stride(2), query.stride(1), layer, tokens, scale * LOG2E, window or 0,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, V_DIM=v_dim,
        BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=block_d, BLOCK_V=block_v,
        WINDOWED=window is not None, LISTED=listed is not None, ALIGNED=aligned(dim, v_dim, query.dtype), SPLITS=splits,
        WITH_LSE=lse is not None or splits > 1, PRECISION=precision(query.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(tokens, triton.cdiv(heads, 8))](
            parts, part_lse, out, out if lse is None else lse, tokens,
            HEADS=heads, V_DIM=v_dim, BLOCK_H=8, BLOCK_V=block_v, SPLITS=splits, WITH_LSE=lse is not None, num_warps=4,
        )  # fmt: skip
    return out


def _blocks(rows: int, kv_heads: int, width: int, dtype: torch.dtype) -> Any:
    """Block sizes, warps and stages. Blocks are large where there are then still enough of them to fill a GPU."""
    if dtype == torch.float32:
        return (16, 32, 4, 1) if width > 128 else (32, 32, 4, 2)
    if width > 128:
        return 64, 32, 4, 2
    if rows * kv_heads >= 128 * 150:
        return 128, 64, 8, 4
    return 64, 64, 4, 3
