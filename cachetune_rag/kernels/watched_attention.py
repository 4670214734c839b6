"""Looks at the attention of a prompt's last tokens, the watched ones: how much of it each key receives, and how much an error in each key
and value would change their outputs.

The number of watched tokens and the address of the deviations are read from device memory, so that one captured graph serves every
prompt.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cachetune_rag.kernels.support import LOG2E, Listed, aligned, power_of_two, precision

TINY = 1e-6
"""The least length that a layer's input counts with, so that nothing is divided by zero."""


@triton.jit(do_not_specialize=["layer", "tokens", "window"])
def _receive(
    QUERY, LSE, TABLE, POSITIONS, WATCHED, MASS, PLACES, COUNT,
    query_token, query_head, layer, tokens, scale2, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to MASS the attention that each key receives from the last WATCHED tokens."""
    begin = tl.program_id(0) * BLOCK_N
    end = tl.load(COUNT if LISTED else POSITIONS + tokens - 1).to(tl.int32) + (0 if LISTED else 1)
    if begin < end:
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < end
        if LISTED:
            n = tl.load(PLACES + n, mask=inside, other=2147483647)
        d = tl.arange(0, BLOCK_D)
        watched = tl.minimum(tl.load(WATCHED).to(tl.int32), tokens)
        element = QUERY.dtype.element_ty
        base = tl.load(TABLE + 2 * layer).to(tl.pointer_type(element))
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for head in range(KV_HEADS):
            key_at = base + (n[:, None].to(tl.int64) * KV_HEADS + head) * DIM + d[None, :]
            if ALIGNED:
                key_at = tl.multiple_of(key_at, [16, 16])
            k = tl.load(key_at, mask=inside[:, None] & (d[None, :] < DIM), other=0.0)
            for start in range(0, watched * GROUP, ROWS):
                row = start + tl.arange(0, ROWS)
                token = tokens - watched + row // GROUP
                live = token < tokens
                pos = tl.load(POSITIONS + token, mask=live, other=-1).to(tl.int32)
                q_head = head * GROUP + row % GROUP
                query = tl.load(
                    QUERY + token[:, None].to(tl.int64) * query_token + q_head[:, None] * query_head + d[None, :],
                    mask=live[:, None] & (d[None, :] < DIM),
                    other=0.0,
                )
                score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale2
                lse = tl.load(LSE + token.to(tl.int64) * (KV_HEADS * GROUP) + q_head, mask=live, other=0.0)
                seen = n[None, :] <= pos[:, None]
                if WINDOWED:
                    seen &= pos[:, None] - n[None, :] < window
                total += tl.sum(tl.where(seen, tl.math.exp2(score - lse[:, None]), 0.0), 0)
        so_far = tl.load(MASS + n, mask=inside, other=0.0)
        tl.store(MASS + n, so_far + total / (watched * KV_HEADS * GROUP), mask=inside)


@triton.jit(do_not_specialize=["layer", "tokens", "window", "column"])
def _disturb(
    QUERY, OUT, LSE, NEAR, GAIN, TABLE, POSITIONS, WATCHED, DEVIATIONS, TOTAL, PLACES, COUNT,
    query_token, query_head, layer, tokens, column, columns, room, scale2, key_scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to TOTAL, which has one row for each key-value head, how much each key and value is expected to disturb the watched tokens."""
    begin = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    end = tl.load(COUNT if LISTED else POSITIONS + tokens - 1).to(tl.int32) + (0 if LISTED else 1)
    if begin < end:
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < end
        if LISTED:
            n = tl.load(PLACES + n, mask=inside, other=2147483647)
        d = tl.arange(0, BLOCK_D)
        dv = tl.arange(0, BLOCK_V)
        watched = tl.minimum(tl.load(WATCHED).to(tl.int32), tokens)
        element = QUERY.dtype.element_ty
        keys = tl.load(TABLE + 2 * layer).to(tl.pointer_type(element)) + head * DIM
        values = tl.load(TABLE + 2 * layer + 1).to(tl.pointer_type(element)) + head * V_DIM
        key_at = keys + n[:, None].to(tl.int64) * (KV_HEADS * DIM) + d[None, :]
        value_at = values + n[:, None].to(tl.int64) * (KV_HEADS * V_DIM) + dv[None, :]
        if ALIGNED:
            key_at = tl.multiple_of(key_at, [16, 16])
            value_at = tl.multiple_of(value_at, [16, 16])
        k = tl.load(key_at, mask=inside[:, None] & (d[None, :] < DIM), other=0.0)
        v = tl.load(value_at, mask=inside[:, None] & (dv[None, :] < V_DIM), other=0.0)
        v_square = tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
        # Summed over rows only behind the loop, because each such sum goes through shared memory.
        by_value = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        by_key = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        for start in range(0, watched * GROUP, ROWS):
            row = start + tl.arange(0, ROWS)
            token = tokens - watched + row // GROUP
            live = token < tokens
            pos = tl.load(POSITIONS + token, mask=live, other=-1).to(tl.int32)
            q_head = head * GROUP + row % GROUP
            at = token.to(tl.int64) * (KV_HEADS * GROUP) + q_head
            query = tl.load(
                QUERY + token[:, None].to(tl.int64) * query_token + q_head[:, None] * query_head + d[None, :],
                mask=live[:, None] & (d[None, :] < DIM),
                other=0.0,
            )
            out = tl.load(
                OUT + at[:, None] * V_DIM + dv[None, :], mask=live[:, None] & (dv[None, :] < V_DIM), other=0.0
            )
            near = tl.load(NEAR + token, mask=live, other=0.0)
            gain = tl.load(GAIN + q_head)
            lse = tl.load(LSE + at, mask=live, other=0.0)
            seen = n[None, :] <= pos[:, None]
            if WINDOWED:
                seen &= pos[:, None] - n[None, :] < window
            score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale2
            weight = tl.where(seen, tl.math.exp2(score - lse[:, None]), 0.0)
            by_value += weight * near[:, None]
            # |V - o|^2 = |V|^2 + |o|^2 - 2 o V. Rounding may make it negative where V and o are nearly the same.
            out_square = tl.sum(out.to(tl.float32) * out.to(tl.float32), 1)
            apart = v_square[None, :] + out_square[:, None]
            apart -= 2 * tl.dot(out, tl.trans(v), input_precision=PRECISION)
            query_square = tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)
            steep = tl.sqrt(query_square) * gain * near
            by_key += weight * tl.sqrt(tl.maximum(apart, 0.0)) * steep[:, None]
        spread = tl.load(DEVIATIONS).to(tl.pointer_type(tl.float16)) + n.to(tl.int64) * columns + column + head
        key_off = tl.load(spread, mask=inside, other=0.0).to(tl.float32)
        value_off = tl.load(spread + KV_HEADS, mask=inside, other=0.0).to(tl.float32)
        to = TOTAL + head * room + n
        so_far = tl.load(to, mask=inside, other=0.0)
        more = tl.sum(by_value, 0) * value_off + tl.sum(by_key, 0) * key_off * key_scale
        tl.store(to, so_far + more, mask=inside)


@triton.jit
def _nearness(HIDDEN, NEAR, width, stride, tiny, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(HIDDEN + token.to(tl.int64) * stride + at, mask=at < width, other=0.0).to(tl.float32)
        square += x * x
    tl.store(NEAR + token, 1.0 / tl.maximum(tl.sqrt(tl.sum(square, 0)), tiny))


def receive(
    query: Tensor,
    lse: Tensor,
    table: Tensor,
    layer: int,
    positions: Tensor,
    watched: Tensor,
    mass: Tensor,
    *,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    listed: Listed | None = None,
) -> None:
    """Add to `mass` the attention that each key receives from the watched tokens, averaged over these tokens and the heads.

    Args:
        query, lse, table, layer, positions, kv_heads, scale, window, listed: what `attend` was called with, and the `lse` that it filled.
        watched: int64 [1]; how many last tokens are watched. All of them if there are fewer.
        mass: float32 [at least length]. What is beyond the prompt or not listed doesn't change.
    """
    _, heads, tokens, dim = query.shape
    block, rows = (64, 64) if query.element_size() == 2 else (32, 16)
    _receive[(triton.cdiv(mass.shape[0], block),)](
        query, lse, table, positions, watched, mass, *(listed or (positions, positions)),
        query.stride(2), query.stride(1), layer, tokens, scale * LOG2E, window or 0,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, ROWS=rows, BLOCK_N=block, BLOCK_D=power_of_two(dim, 16),
        WINDOWED=window is not None, LISTED=listed is not None, ALIGNED=aligned(dim, dim, query.dtype), PRECISION=precision(query.dtype), num_warps=4,
    )  # fmt: skip


def disturb(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    near: Tensor,
    gain: Tensor,
    table: Tensor,
    layer: int,
    positions: Tensor,
    watched: Tensor,
    deviations: Tensor,
    column: int,
    columns: int,
    total: Tensor,
    *,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    listed: Listed | None = None,
) -> None:
    """Add to `total` how much each key and value of a layer is expected to disturb the watched tokens (docs/selection.md, "Online").

    Let a be the attention of query head g of token i on key j, and h the key-value head of g. Then total[h, j] grows by the sum over g
    and i of a / |x_i| * (sV + |Q| * |V_j - o| * sK * gain[g] * scale / sqrt(dim)).

    Args:
        query, lse, table, layer, positions, kv_heads, scale, window, listed: what `attend` was called with, and the `lse` that it filled.
        out: what `attend` returned, [1, tokens, heads, v_dim].
        near: float32 [tokens]; 1 / |x| of each token's layer input (see `nearness`).
        gain: float32 [heads].
        watched: int64 [1]; how many last tokens are watched. All of them if there are fewer.
        deviations: int64 [1]; the address of float16 [length, columns].
        column: the layer's first column in the deviations: sK of its heads, then sV.
        columns: how many columns all layers have.
        total: float32 [at least kv_heads, room]. What is beyond the prompt or not listed doesn't change.
    """
    _, heads, tokens, dim = query.shape
    v_dim, room = out.shape[3], total.shape[1]
    if query.element_size() == 4:
        block, rows, warps = 32, 16, 4
    else:
        block, rows, warps = (32, 64, 8) if max(dim, v_dim) > 128 else (64, 64, 8)
    _disturb[(triton.cdiv(room, block), kv_heads)](
        query, out, lse, near, gain, table, positions, watched, deviations, total, *(listed or (positions, positions)),
        query.stride(2), query.stride(1), layer, tokens, column, columns, room,
        scale * LOG2E, scale * dim**-0.5, window or 0,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, V_DIM=v_dim, ROWS=rows, BLOCK_N=block,
        BLOCK_D=power_of_two(dim, 16), BLOCK_V=power_of_two(v_dim, 16), WINDOWED=window is not None, LISTED=listed is not None,
        ALIGNED=aligned(dim, v_dim, query.dtype), PRECISION=precision(query.dtype), num_warps=warps,
    )  # fmt: skip


def nearness(hidden: Tensor, near: Tensor) -> None:
    """Write 1 / |x| of every row x of hidden [1, tokens, width] to `near`, float32 [tokens]."""
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    width = hidden.shape[2]
    block = min(1024, power_of_two(width))
    _nearness[(hidden.shape[1],)](hidden, near, width, hidden.stride(1), TINY, BLOCK=block, num_warps=4)
