"""Chunk shift (`model/plain/shift.py`): the change that a chunk's recomputed tokens show is carried over to its reused rows.

Two kernels run for each layer before the fresh keys and values are written. The first adds up, for each chunk, fresh minus stored rows
over its recomputed tokens. The second adds a share of this sum to all of the chunk's rows. Sums are in float32.

A rotation is written as in `Turn` (`model/family/rope.py`): rotated[i] = cos[i] * x[i] + sin[i] * sign[i] * x[partner[i]].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cachetune_rag.kernels.support import aligned, power_of_two

SPAN = 5
"""How many numbers a chunk has in the table of spans. They are: its first row and the row behind its last one; its first recomputed
token and the one behind its last, as numbers in the forward; and the bits of the float32 that their sum is multiplied by."""
_SHARES = 16
"""How many programs share a chunk's rows."""


@triton.jit(do_not_specialize=["layer"])
def _gather(
    KEYS, VALUES, TABLE, ROTATIONS, PARTNER, SIGN, POSITIONS, KNOWN, SPANS, MOVED_K, MOVED_V,
    key_token, key_head, value_token, value_head, layer,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """MOVED[chunk, head] = weight * sum over the chunk's recomputed tokens of fresh - stored (keys before rotation)."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(SPANS + chunk * 5 + 2).to(tl.int32)
    last = tl.load(SPANS + chunk * 5 + 3).to(tl.int32)
    if first < last:
        element = KEYS.dtype.element_ty
        keys = tl.load(TABLE + 2 * layer).to(tl.pointer_type(element)) + head * DIM
        values = tl.load(TABLE + 2 * layer + 1).to(tl.pointer_type(element)) + head * V_DIM
        weight = tl.load(SPANS + chunk * 5 + 4).to(tl.int32).to(tl.float32, bitcast=True)
        d = tl.arange(0, BLOCK_D)
        some = d < DIM
        dv = tl.arange(0, BLOCK_V)
        sum_k = tl.zeros([BLOCK_D], dtype=tl.float32)
        sum_v = tl.zeros([BLOCK_V], dtype=tl.float32)
        if TURNED:
            cos = tl.load(ROTATIONS + 2 * layer).to(tl.pointer_type(element))
            sin = tl.load(ROTATIONS + 2 * layer + 1).to(tl.pointer_type(element))
            partner = tl.load(PARTNER + d, mask=some, other=0)
            sign = tl.load(SIGN + d, mask=some, other=0.0)
        for start in range(first, last, BLOCK_T):
            token = start + tl.arange(0, BLOCK_T)
            live = token < last
            live &= tl.load(KNOWN + token, mask=live, other=0) != 0
            place = tl.load(POSITIONS + token, mask=live, other=0)
            ok = live[:, None] & some[None, :]
            fresh_at = KEYS + token[:, None].to(tl.int64) * key_token + head * key_head
            stored_at = keys + place[:, None] * (HEADS * DIM)
            old_at = stored_at + d[None, :]
            if ALIGNED:
                # The addresses come from a table, so the compiler can't see that rows begin at multiples of 16 bytes.
                old_at = tl.multiple_of(old_at, [16, 16])
            off = tl.load(fresh_at + d[None, :], mask=ok, other=0.0).to(tl.float32)
            off -= tl.load(old_at, mask=ok, other=0.0).to(tl.float32)
            if TURNED:
                across = tl.load(fresh_at + partner[None, :], mask=ok, other=0.0).to(tl.float32)
                across -= tl.load(stored_at + partner[None, :], mask=ok, other=0.0).to(tl.float32)
                cos_at = cos + place[:, None] * DIM + d[None, :]
                sin_at = sin + place[:, None] * DIM + d[None, :]
                if ALIGNED:
                    cos_at = tl.multiple_of(cos_at, [16, 16])
                    sin_at = tl.multiple_of(sin_at, [16, 16])
                c = tl.load(cos_at, mask=ok, other=1.0).to(tl.float32)
                s = tl.load(sin_at, mask=ok, other=0.0).to(tl.float32)
                # The division undoes rotations that also stretch, as those of yarn do.
                off = (c * off - s * sign[None, :] * across) / (c * c + s * s)
            sum_k += tl.sum(off, 0)
            ok = live[:, None] & (dv[None, :] < V_DIM)
            off = tl.load(
                VALUES + token[:, None].to(tl.int64) * value_token + head * value_head + dv[None, :], mask=ok, other=0.0
            ).to(tl.float32)
            old_at = values + place[:, None] * (HEADS * V_DIM) + dv[None, :]
            if ALIGNED:
                old_at = tl.multiple_of(old_at, [16, 16])
            off -= tl.load(old_at, mask=ok, other=0.0).to(tl.float32)
            sum_v += tl.sum(off, 0)
        tl.store(MOVED_K + (chunk * HEADS + head) * DIM + d, sum_k * weight, mask=some)
        tl.store(MOVED_V + (chunk * HEADS + head) * V_DIM + dv, sum_v * weight, mask=dv < V_DIM)


@triton.jit(do_not_specialize=["layer"])
def _carry(
    MOVED_K, MOVED_V, TABLE, ROTATIONS, PARTNER, SIGN, SPANS, LIKE, layer,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Adds each chunk's MOVED to all of its rows. For keys it is rotated to each row's place first."""
    chunk = tl.program_id(0)
    first = tl.load(SPANS + chunk * 5 + 2)
    last = tl.load(SPANS + chunk * 5 + 3)
    if first < last:
        begin = tl.load(SPANS + chunk * 5).to(tl.int32)
        end = tl.load(SPANS + chunk * 5 + 1).to(tl.int32)
        element = LIKE.dtype.element_ty
        keys = tl.load(TABLE + 2 * layer).to(tl.pointer_type(element))
        values = tl.load(TABLE + 2 * layer + 1).to(tl.pointer_type(element))
        i = tl.arange(0, BLOCK_K)
        j = tl.arange(0, BLOCK_V)
        some = i < HEADS * DIM
        some_v = j < HEADS * V_DIM
        moved = tl.load(MOVED_K + chunk * (HEADS * DIM) + i, mask=some, other=0.0)
        moved_v = tl.load(MOVED_V + chunk * (HEADS * V_DIM) + j, mask=some_v, other=0.0)
        if TURNED:
            cos = tl.load(ROTATIONS + 2 * layer).to(tl.pointer_type(element))
            sin = tl.load(ROTATIONS + 2 * layer + 1).to(tl.pointer_type(element))
            channel = i % DIM
            partner = tl.load(PARTNER + channel, mask=some, other=0)
            across = tl.load(MOVED_K + chunk * (HEADS * DIM) + i - channel + partner, mask=some, other=0.0)
            across *= tl.load(SIGN + channel, mask=some, other=0.0)
        for start in range(begin + tl.program_id(1) * ROWS, end, SHARES * ROWS):
            row = start + tl.arange(0, ROWS)
            live = row < end
            ok = live[:, None] & some[None, :]
            at = keys + row[:, None].to(tl.int64) * (HEADS * DIM) + i[None, :]
            if ALIGNED:
                at = tl.multiple_of(at, [16, 16])
            k = tl.load(at, mask=ok, other=0.0).to(tl.float32)
            if TURNED:
                cos_at = cos + row[:, None].to(tl.int64) * DIM + channel[None, :]
                sin_at = sin + row[:, None].to(tl.int64) * DIM + channel[None, :]
                if ALIGNED:
                    cos_at = tl.multiple_of(cos_at, [16, 16])
                    sin_at = tl.multiple_of(sin_at, [16, 16])
                k += tl.load(cos_at, mask=ok, other=0.0).to(tl.float32) * moved[None, :]
                k += tl.load(sin_at, mask=ok, other=0.0).to(tl.float32) * across[None, :]
            else:
                k += moved[None, :]
            tl.store(at, k.to(element), mask=ok)
            ok = live[:, None] & some_v[None, :]
            at = values + row[:, None].to(tl.int64) * (HEADS * V_DIM) + j[None, :]
            if ALIGNED:
                at = tl.multiple_of(at, [16, 16])
            v = tl.load(at, mask=ok, other=0.0).to(tl.float32) + moved_v[None, :]
            tl.store(at, v.to(element), mask=ok)


def shift(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    layer: int,
    positions: Tensor,
    known: Tensor,
    spans: Tensor,
    rotations: Tensor,
    turning: tuple[Tensor, Tensor] | None,
    moved: tuple[Tensor, Tensor],
) -> None:
    """Shift the rows of a layer in place. Rows of recomputed tokens are shifted too, but overwritten afterwards.

    Args:
        keys, values: fresh keys and values, [1, kv_heads, tokens, dim]; the keys are rotated.
        table: addresses of the prompt's rows (`row_addresses`, int64 on the device).
        layer: the layer whose rows are shifted.
        positions: int64 [tokens].
        known: int64 [tokens]; 0 for recomputed tokens whose stored rows were not read. They are left out of the sums.
        spans: int64 [chunks, SPAN]. A chunk without recomputed tokens is not shifted.
        rotations: int64 [2 * layers]; addresses of every layer's cosines and sines, each [length, dim] in the keys' dtype.
        turning: partner (int32 [dim]) and sign (float32 [dim]) of each channel; None for a layer that doesn't rotate.
        moved: float32 [chunks, kv_heads, dim] and [chunks, kv_heads, v_dim]; overwritten with what each chunk is shifted by.
    """
    _, heads, _, dim = keys.shape
    v_dim, chunks = values.shape[3], spans.shape[0]
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    values = values if values.stride(3) == 1 else values.contiguous()
    partner, sign = turning or (spans, spans)  # pointers that aren't read where nothing is rotated
    shape = {"HEADS": heads, "DIM": dim, "V_DIM": v_dim, "TURNED": turning is not None}
    shape["ALIGNED"] = aligned(dim, v_dim, keys.dtype)
    _gather[(chunks, heads)](
        keys, values, table, rotations, partner, sign, positions, known, spans, *moved,
        keys.stride(2), keys.stride(1), values.stride(2), values.stride(1), layer,
        **shape, BLOCK_T=16, BLOCK_D=power_of_two(dim), BLOCK_V=power_of_two(v_dim), num_warps=4,
    )  # fmt: skip
    block_k, block_v = power_of_two(heads * dim), power_of_two(heads * v_dim)
    _carry[(chunks, _SHARES)](
        *moved, table, rotations, partner, sign, spans, keys, layer,
        **shape, ROWS=max(1, 4096 // max(block_k, block_v)), BLOCK_K=block_k, BLOCK_V=block_v, SHARES=_SHARES, num_warps=4,
    )  # fmt: skip
