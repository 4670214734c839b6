"""Writes rows into a prompt's buffers: stored ones (decoded, rotated and written in one pass) and freshly computed ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import triton
import triton.language as tl
from torch import Tensor

from cachetune_rag.kernels.support import power_of_two
from cachetune_store.layout import HeadBytes

_GATHERERS = 8
"""How many programs copy single rows. Few: a program that waits for the bus keeps large matrix products off its multiprocessor. (16 were as fast on an
H200, and 32 slower.)"""
_AT_ONCE = 32 << 10
"""Bytes that each of them asks for at a time. Together that is a few times what a bus of 60 GB/s delivers in the two microseconds that an answer
takes."""


@triton.jit
def _bfloat16(start, at, ok):
    """Bfloat16 numbers from `start` on, as float32. They are made from their bits, because Triton's interpreter has no bfloat16."""
    bits = tl.load(start.to(tl.pointer_type(tl.uint16)) + at, mask=ok, other=0).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _number(numbers, at, scale, middle, ok, COUNT: tl.constexpr, CODEC: tl.constexpr, element: tl.constexpr):
    """Number `at` of a row's `COUNT` keys or values, in the model's dtype. It is calculated in float32, as the codec does."""
    if CODEC == "exact":
        number = tl.load(numbers.to(tl.pointer_type(element)) + at, mask=ok, other=0.0)
    elif CODEC == "int8":
        stored = tl.load(numbers.to(tl.pointer_type(tl.int8)) + at, mask=ok, other=0)
        number = (stored.to(tl.float32) * scale).to(element)
    elif CODEC == "fp8":
        # Through float16 (see Fp8Codec), because not every GPU has the type e4m3.
        stored = tl.load(numbers.to(tl.pointer_type(tl.int8)) + at, mask=ok, other=0).to(tl.int16)
        half = ((stored << 7) & -16385).to(tl.int16).to(tl.float16, bitcast=True)
        number = (half.to(tl.float32) * (scale * 256.0)).to(element)
    else:
        HALF: tl.constexpr = (COUNT + 1) // 2
        upper = at >= HALF
        stored = tl.load(numbers + at - tl.where(upper, HALF, 0), mask=ok, other=0).to(tl.int32)
        step = (stored >> tl.where(upper, 4, 0)) & 15
        number = ((step.to(tl.float32) - 7.5) * scale + middle).to(element)
    return number


@triton.jit
def _key(numbers, shared, at, scale, ok, COUNT: tl.constexpr, CODEC: tl.constexpr, element: tl.constexpr):
    middle = 0.0
    if CODEC == "int4":
        scale = _bfloat16(shared, at, ok)
        middle = _bfloat16(shared, COUNT + at, ok)
    return _number(numbers, at, scale, middle, ok, COUNT, CODEC, element)


@triton.jit(do_not_specialize=["base_step"])
def _place(
    BASES, WHERE, PLACES, SPLIT, COS, SIN, KEYS, VALUES, table_stride, base_step, key_step, value_step,
    HEADS: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, TURNED: tl.constexpr, CODEC: tl.constexpr,
    ROW_BYTES: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_BYTES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    element = KEYS.dtype.element_ty
    row = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    place = tl.load(PLACES + row)
    where = tl.load(WHERE + row)
    base = tl.load(BASES + layer * base_step + (where >> 32)).to(tl.pointer_type(tl.uint8))
    index = where & 0x7FFFFFFF
    shared = base + index // GROUP_ROWS * (GROUP_BYTES + GROUP_ROWS * ROW_BYTES)
    start = shared + (GROUP_BYTES + index % GROUP_ROWS * ROW_BYTES)
    if ALIGNED:
        # The addresses come from a table, so the compiler can't see that rows begin at multiples of 16 bytes.
        shared = tl.multiple_of(shared, 16)
        start = tl.multiple_of(start, 16)
    to = tl.arange(0, BLOCK_H)[:, None]
    some = to < OWN
    if PART == 1:
        some &= to * 0 + row < tl.load(SPLIT)
    elif PART == 2:
        some &= to * 0 + row >= tl.load(SPLIT)
    h = FIRST + to
    k_scale = 1.0
    v_scale = 1.0
    v_middle = 0.0
    COUNT: tl.constexpr = HEADS * DIM
    V_COUNT: tl.constexpr = HEADS * V_DIM
    if CODEC == "exact":
        numbers = start
        v_numbers = start + COUNT * (KEYS.dtype.element_ty.primitive_bitwidth // 8)
    elif CODEC == "int4":
        v_scale = _bfloat16(start, h, some)
        v_middle = _bfloat16(start, HEADS + h, some)
        numbers = start + 4 * HEADS
        v_numbers = numbers + (COUNT + 1) // 2
    else:
        scales = start.to(tl.pointer_type(tl.float32))
        k_scale = tl.load(scales + h, mask=some, other=0.0)
        v_scale = tl.load(scales + HEADS + h, mask=some, other=0.0)
        numbers = start + 8 * HEADS
        v_numbers = numbers + COUNT
    out = KEYS + layer * key_step + place * (OWN * DIM)
    HALF: tl.constexpr = TURNED // 2
    if TURNED > 0:
        d = tl.arange(0, BLOCK_HALF)[None, :]
        ok = some & (d < HALF)
        low = _key(numbers, shared, h * DIM + d, k_scale, ok, COUNT, CODEC, element)
        high = _key(numbers, shared, h * DIM + HALF + d, k_scale, ok, COUNT, CODEC, element)
        table = place * table_stride
        cos_low = tl.load(COS + table + d, mask=d < HALF, other=0.0)
        cos_high = tl.load(COS + table + HALF + d, mask=d < HALF, other=0.0)
        sin_low = tl.load(SIN + table + d, mask=d < HALF, other=0.0)
        sin_high = tl.load(SIN + table + HALF + d, mask=d < HALF, other=0.0)
        # Each product is rounded to the dtype before they are added, as in the model's own function.
        a = (low.to(tl.float32) * cos_low.to(tl.float32)).to(element).to(tl.float32)
        b = (-high.to(tl.float32) * sin_low.to(tl.float32)).to(element).to(tl.float32)
        tl.store(out + to * DIM + d, (a + b).to(element), mask=ok)
        a = (high.to(tl.float32) * cos_high.to(tl.float32)).to(element).to(tl.float32)
        b = (low.to(tl.float32) * sin_high.to(tl.float32)).to(element).to(tl.float32)
        tl.store(out + to * DIM + HALF + d, (a + b).to(element), mask=ok)
    if TURNED < DIM:
        d = tl.arange(0, BLOCK_REST)[None, :]
        ok = some & (d < DIM - TURNED)
        rest = _key(numbers, shared, h * DIM + TURNED + d, k_scale, ok, COUNT, CODEC, element)
        tl.store(out + to * DIM + TURNED + d, rest, mask=ok)
    d = tl.arange(0, BLOCK_V)[None, :]
    ok = some & (d < V_DIM)
    value = _number(v_numbers, h * V_DIM + d, v_scale, v_middle, ok, V_COUNT, CODEC, element)
    tl.store(VALUES + layer * value_step + place * (OWN * V_DIM) + to * V_DIM + d, value, mask=ok)


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
    """Copy int64 numbers [n] from page-locked memory to the device, by a kernel that reads them.

    An ordinary copy would wait for the megabytes of rows that are being copied. `host` must not change until the device has read it,
    and torch doesn't take care of that.
    """
    count = out.shape[0]
    _fetch[(triton.cdiv(count, 256),)](host.data_ptr(), out, count, BLOCK=256, num_warps=4)


@triton.jit
def _stretched(at, BEGINS: tl.constexpr, SKIPS: tl.constexpr):
    """Where number `at` of the wanted units lies: behind the gaps before it."""
    found = at + SKIPS[0]
    for i in tl.static_range(1, len(SKIPS)):
        found += tl.where(at >= BEGINS[i], SKIPS[i], 0)
    return found


@triton.jit(do_not_specialize=["layers", "step"])
def _gather(
    HOSTS, BASES, WHERE, COUNT, layers, step,
    ROW: tl.constexpr, GROUP_ROWS: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    WANTED: tl.constexpr, BEGINS: tl.constexpr, SKIPS: tl.constexpr,
    WANTED_SHARED: tl.constexpr, BEGINS_SHARED: tl.constexpr, SKIPS_SHARED: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SHARED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    stop = tl.load(COUNT).to(tl.int32)
    number = tl.arange(0, BLOCK)[None, :]
    at = _stretched(number, BEGINS, SKIPS)
    some = tl.arange(0, BLOCK_SHARED)[None, :]
    # Layer by layer: the first one's rows are on their way before those of the next.
    for begin in range(tl.program_id(0) * AT_ONCE, stop * layers, tl.num_programs(0) * AT_ONCE):
        row = begin + tl.arange(0, AT_ONCE)[:, None]
        inside = row < stop * layers
        where = tl.load(WHERE + row % stop, mask=inside, other=0)
        source = row // stop * step + (where >> 32)
        host = tl.load(HOSTS + source, mask=inside, other=0)
        base = tl.load(BASES + source, mask=inside, other=0)
        ok = inside & (host != 0)
        index = where & 0x7FFFFFFF
        group = index // GROUP_ROWS * (SHARED + GROUP_ROWS * ROW) * UNIT
        offset = group + (SHARED + index % GROUP_ROWS * ROW) * UNIT
        element = tl.int64 if UNIT == 8 else tl.int32 if UNIT == 4 else tl.uint8
        read = (host + offset).to(tl.pointer_type(element)) + at
        target = (base + offset).to(tl.pointer_type(element)) + at
        if ALIGNED:
            # Every stretch begins and ends at a multiple of 16 bytes as well.
            read = tl.max_contiguous(tl.multiple_of(read, [16, 16]), [1, 16 // UNIT])
            target = tl.max_contiguous(tl.multiple_of(target, [16, 16]), [1, 16 // UNIT])
        numbers = tl.load(read, mask=ok & (number < WANTED), other=0)
        tl.store(target, numbers, mask=ok & (number < WANTED))
        if WANTED_SHARED > 0:
            # Rows of one group copy what they share several times over: the same bytes to the same place.
            at_shared = _stretched(some, BEGINS_SHARED, SKIPS_SHARED)
            read = (host + group).to(tl.pointer_type(element)) + at_shared
            target = (base + group).to(tl.pointer_type(element)) + at_shared
            numbers = tl.load(read, mask=ok & (some < WANTED_SHARED), other=0)
            tl.store(target, numbers, mask=ok & (some < WANTED_SHARED))


def _units(stretches: Sequence[tuple[int, int]], unit: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """How many units stretches of bytes have, the first unit of each, and how many are left out before it."""
    begins, skips, count, end = [], [], 0, 0
    for start, length in stretches:
        begins.append(count)
        skips.append((start - end) // unit)
        count, end = count + length // unit, start + length
    return count, tuple(begins or [0]), tuple(skips or [0])


def gather(
    hosts: Tensor,
    bases: Tensor,
    where: Tensor,
    count: Tensor,
    *,
    row_bytes: int,
    group_rows: int = 1,
    group_bytes: int = 0,
    wanted: HeadBytes | None = None,
) -> None:
    """Copy single stored rows from page-locked memory to the device, each to the place among the rows of its source that it has there.

    The copy engine takes about a microsecond for each copy, however small, which is longer than it takes to move a row. A few programs that
    read the memory themselves are nearly as fast as it is with large copies.

    Args:
        hosts: int64 [layers, sources]; where each source's rows of some layers begin in page-locked memory. 0: its rows are not copied. It must not be
            unlocked until the device has read it, and torch doesn't take care of that. The rows of all these layers lie alike.
        bases: int64 [layers, sources]; where they begin on the device.
        where, row_bytes, group_rows, group_bytes: see `place`. Addresses are multiples of 16 if these numbers of bytes are.
        count: int64 [1] on the device; so many of the first rows in `where` are copied, of each layer.
        wanted: which bytes of each row, and of what a group shares, are copied, to where they lie in the row; None: all of them.
    """
    if wanted is None:
        wanted = HeadBytes.of([(0, row_bytes)], [(0, group_bytes)])
    edges = row_bytes, group_bytes, *chain(*wanted.row, *wanted.group)
    unit = next(size for size in (8, 4, 1) if not any(edge % size for edge in edges))
    row, shared = _units(wanted.row, unit), _units(wanted.group, unit)
    at_once = max(1, _AT_ONCE // power_of_two(row[0] * unit))
    _gather[(_GATHERERS,)](
        hosts, bases, where, count, hosts.shape[0], hosts.stride(0),
        ROW=row_bytes // unit, GROUP_ROWS=group_rows, SHARED=group_bytes // unit, UNIT=unit,
        WANTED=row[0], BEGINS=row[1], SKIPS=row[2],
        WANTED_SHARED=shared[0], BEGINS_SHARED=shared[1], SKIPS_SHARED=shared[2],
        AT_ONCE=at_once, BLOCK=power_of_two(row[0]), BLOCK_SHARED=power_of_two(max(1, shared[0])),
        ALIGNED=not any(edge % 16 for edge in edges), num_warps=16,
    )  # fmt: skip


def place(
    bases: Tensor,
    where: Tensor,
    places: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *,
    codec: str,
    row_bytes: int,
    group_rows: int = 1,
    group_bytes: int = 0,
    aligned: bool = False,
    stored_heads: int | None = None,
    first_head: int = 0,
    split: Tensor | None = None,
    rest: bool = False,
    steps: tuple[int, int] = (0, 0),
) -> None:
    """Decode stored rows of some layers, rotate their keys to their places in the prompt, and write keys and values there.

    Several layers are written by one launch where their rows lie alike and are rotated alike (`steps`): a launch takes the host longer than the device
    needs for a layer of a short prompt.

    Args:
        bases: int64 [layers, sources]; addresses on the device, where each source's rows of a layer begin as the codec wrote them.
        where: int64 [n]; each row's source (upper 32 bits) and its number in the source (lower 32 bits); see `rows_of`.
        places: int64 [n]; each row's place in the prompt.
        cos, sin: [length, width]; the model's tables. None for a layer that doesn't rotate. The first `width` channels are rotated,
            channel i together with channel i + width / 2.
        keys, values: [length, heads, dim] and [length, heads, v_dim], contiguous, of the first of the layers. Rows at `places` are written.
        codec: one of `kernels.CODECS`.
        row_bytes, group_rows, group_bytes: a source consists of groups of `group_rows` rows. In front of each group are `group_bytes` bytes
            that its rows share.
        aligned: whether all bases, `row_bytes` and `group_bytes` are multiples of 16.
        stored_heads: how many heads a row holds; None: those of `keys`.
        first_head: the first of them that is written.
        split: int64 [1] on the device; so many of the first rows are written, or with `rest` those behind them. None: all rows are.
        steps: by how many numbers the keys of each layer lie behind those of the layer before, and the values; multiples of 16, below 2 ** 31, so that
            kernels are compiled for one kind of them.
    """
    heads, dim, v_dim = keys.shape[1], keys.shape[2], values.shape[2]
    turned = 0 if cos is None else cos.shape[1]
    if not places.shape[0]:
        return
    some = keys if cos is None or sin is None else cos  # a pointer that isn't read where nothing is rotated
    _place[(places.shape[0], bases.shape[0])](
        bases, where, places, places if split is None else split, some, keys if sin is None else sin, keys, values, 0 if cos is None else cos.stride(0),
        bases.stride(0), *steps,
        HEADS=stored_heads or heads, FIRST=first_head, OWN=heads, DIM=dim, V_DIM=v_dim, TURNED=turned, CODEC=codec,
        ROW_BYTES=row_bytes, GROUP_ROWS=group_rows, GROUP_BYTES=group_bytes, ALIGNED=aligned,
        BLOCK_H=power_of_two(heads), BLOCK_HALF=power_of_two(max(1, turned // 2)),
        BLOCK_REST=power_of_two(max(1, dim - turned)), BLOCK_V=power_of_two(v_dim), PART=0 if split is None else 1 + rest,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def scatter(keys: Tensor, values: Tensor, table: Tensor, layer: int, positions: Tensor) -> None:
    """Write fresh keys and values [1, kv_heads, tokens, dim] of one layer to their positions. Those at positions below 0 are left out."""
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
