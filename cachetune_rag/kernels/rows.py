"""Rows on their way into a prompt's buffers: stored rows (decode, rotate, scatter in one pass) and fresh ones (scatter)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cachetune_rag.kernels.support import power_of_two


@triton.jit
def _number(at, scale, ok, INT8: tl.constexpr, element: tl.constexpr):
    """Stored numbers as the model's dtype. Integers times their scale in float32, as the codec itself decodes them."""
    if INT8:
        number = (tl.load(at, mask=ok, other=0).to(tl.float32) * scale).to(element)
    else:
        number = tl.load(at, mask=ok, other=0.0)
    return number


@triton.jit
def _place(
    ROWS, PLACES, COS, SIN, KEYS, VALUES, row_bytes, table_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, TURNED: tl.constexpr, INT8: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    element = KEYS.dtype.element_ty
    row = tl.program_id(0)
    place = tl.load(PLACES + row)
    start = ROWS + row.to(tl.int64) * row_bytes
    h = tl.arange(0, BLOCK_H)[:, None]
    some = h < HEADS
    k_scale = 1.0
    v_scale = 1.0
    if INT8:
        scales = start.to(tl.pointer_type(tl.float32))
        k_scale = tl.load(scales + h, mask=some, other=0.0)
        v_scale = tl.load(scales + HEADS + h, mask=some, other=0.0)
        numbers = (start + 8 * HEADS).to(tl.pointer_type(tl.int8))
    else:
        numbers = start.to(tl.pointer_type(element))
    out = KEYS + place * (HEADS * DIM)
    HALF: tl.constexpr = TURNED // 2
    if TURNED > 0:
        d = tl.arange(0, BLOCK_HALF)[None, :]
        ok = some & (d < HALF)
        low = _number(numbers + h * DIM + d, k_scale, ok, INT8, element)
        high = _number(numbers + h * DIM + HALF + d, k_scale, ok, INT8, element)
        table = place * table_stride
        cos_low = tl.load(COS + table + d, mask=d < HALF, other=0.0)
        cos_high = tl.load(COS + table + HALF + d, mask=d < HALF, other=0.0)
        sin_low = tl.load(SIN + table + d, mask=d < HALF, other=0.0)
        sin_high = tl.load(SIN + table + HALF + d, mask=d < HALF, other=0.0)
        # Each product is rounded to the dtype before the sum, as the model's own function does it.
        a = (low.to(tl.float32) * cos_low.to(tl.float32)).to(element).to(tl.float32)
        b = (-high.to(tl.float32) * sin_low.to(tl.float32)).to(element).to(tl.float32)
        tl.store(out + h * DIM + d, (a + b).to(element), mask=ok)
        a = (high.to(tl.float32) * cos_high.to(tl.float32)).to(element).to(tl.float32)
        b = (low.to(tl.float32) * sin_high.to(tl.float32)).to(element).to(tl.float32)
        tl.store(out + h * DIM + HALF + d, (a + b).to(element), mask=ok)
    if TURNED < DIM:
        d = tl.arange(0, BLOCK_REST)[None, :]
        ok = some & (d < DIM - TURNED)
        rest = _number(numbers + h * DIM + TURNED + d, k_scale, ok, INT8, element)
        tl.store(out + h * DIM + TURNED + d, rest, mask=ok)
    d = tl.arange(0, BLOCK_V)[None, :]
    ok = some & (d < V_DIM)
    value = _number(numbers + HEADS * DIM + h * V_DIM + d, v_scale, ok, INT8, element)
    tl.store(VALUES + place * (HEADS * V_DIM) + h * V_DIM + d, value, mask=ok)


@triton.jit(do_not_specialize=["layer"])
def _scatter(
    KEYS, VALUES, TABLE, POSITIONS, key_token, key_head, value_token, value_head, layer,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    place = tl.load(POSITIONS + token)
    if place >= 0:
        element = KEYS.dtype.element_ty
        keys = tl.load(TABLE + 2 * layer).to(tl.pointer_type(element))
        values = tl.load(TABLE + 2 * layer + 1).to(tl.pointer_type(element))
        h = tl.arange(0, BLOCK_H)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        dv = tl.arange(0, BLOCK_V)[None, :]
        ok = (h < HEADS) & (d < DIM)
        k = tl.load(KEYS + token.to(tl.int64) * key_token + h * key_head + d, mask=ok)
        tl.store(keys + place * (HEADS * DIM) + h * DIM + d, k, mask=ok)
        ok = (h < HEADS) & (dv < V_DIM)
        v = tl.load(VALUES + token.to(tl.int64) * value_token + h * value_head + dv, mask=ok)
        tl.store(values + place * (HEADS * V_DIM) + h * V_DIM + dv, v, mask=ok)


@triton.jit(do_not_specialize=["host", "count"])
def _fetch(host, OUT, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(host.to(tl.pointer_type(tl.int64)) + at, mask=at < count)
    tl.store(OUT + at, numbers, mask=at < count)


def fetch(host: Tensor, out: Tensor) -> None:
    """Copy a few int64 numbers from page-locked memory, [n] each, by reading them on the device.

    An ordinary copy would queue behind the megabytes that are on their way. `host` must stay as it is until the device has
    read it; torch does not know of it.
    """
    count = out.shape[0]
    _fetch[(triton.cdiv(count, 256),)](host.data_ptr(), out, count, BLOCK=256, num_warps=4)


def place(
    rows: Tensor, places: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor, *, codec: str
) -> None:
    """Decode stored rows, rotate their keys to their places and put both where they belong.

    Args:
        rows: uint8 [n, row_bytes], contiguous, as the codec wrote them.
        places: int64 [n], in the prompt.
        cos, sin: [length, width], the model's tables; None for a layer that does not rotate. The first `width` channels
            are turned, channel i with channel i + width / 2.
        keys, values: [length, heads, dim] and [length, heads, v_dim], contiguous; rows at `places` are written.
        codec: one of `kernels.CODECS`.
    """
    heads, dim, v_dim = keys.shape[1], keys.shape[2], values.shape[2]
    turned = 0 if cos is None else cos.shape[1]
    if not rows.shape[0]:
        return
    some = keys if cos is None or sin is None else cos  # a pointer that is not read
    _place[(rows.shape[0],)](
        rows, places, some, keys if sin is None else sin, keys, values,
        rows.stride(0), 0 if cos is None else cos.stride(0),
        HEADS=heads, DIM=dim, V_DIM=v_dim, TURNED=turned, INT8=codec == "int8",
        BLOCK_H=power_of_two(heads), BLOCK_HALF=power_of_two(max(1, turned // 2)),
        BLOCK_REST=power_of_two(max(1, dim - turned)), BLOCK_V=power_of_two(v_dim),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def scatter(keys: Tensor, values: Tensor, table: Tensor, layer: int, positions: Tensor) -> None:
    """Put fresh keys and values [1, kv_heads, tokens, dim] of one layer to their positions (those below 0: nowhere)."""
    _, heads, tokens, dim = keys.shape
    v_dim = values.shape[3]
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    values = values if values.stride(3) == 1 else values.contiguous()
    _scatter[(tokens,)](
        keys, values, table, positions,
        keys.stride(2), keys.stride(1), values.stride(2), values.stride(1), layer,
        HEADS=heads, DIM=dim, V_DIM=v_dim,
        BLOCK_H=power_of_two(heads), BLOCK_D=power_of_two(dim), BLOCK_V=power_of_two(v_dim), num_warps=4,
    )  # fmt: skip
