"""Every kernel against plain torch in float64. On a machine without a GPU, Triton's interpreter runs them if it is installed
(TRITON_INTERPRET=1); elsewhere they are skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from kernel_reference import attend_reference, disturb_reference, shift_reference
from torch import Tensor

from cachetune_rag.model.family.rope import turn_half_split
from cachetune_store import HeadBytes, LayerSpec, get_codec

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or Triton's interpreter")
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter has no arithmetic in bfloat16.
HALF = [torch.bfloat16, torch.float16] if CUDA else [torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error of the whole; NaN never passes a comparison."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def buffers(
    length: int, heads: int, dim: int, v_dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Three layers of random rows, and their address table."""
    from cachetune_rag.kernels import row_addresses

    keys = [torch.randn(length, heads, dim, device=DEVICE).to(dtype) for _ in range(3)]
    values = [torch.randn(length, heads, v_dim, device=DEVICE).to(dtype) for _ in range(3)]
    table = torch.tensor(row_addresses(keys, values), device=DEVICE)
    return keys, values, table


def some_places(length: int, count: int) -> Tensor:
    """Ascending, the last one the prompt's last token."""
    picked = torch.randperm(length - 1)[: count - 1].sort().values
    return torch.cat((picked, torch.tensor([length - 1]))).to(DEVICE)


@pytest.mark.parametrize("splits", [1, None])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("length", "tokens", "heads", "kv_heads", "dim", "v_dim", "window", "padding"),
    [
        (200, 37, 4, 2, 16, 16, None, 0),
        (200, 37, 4, 2, 16, 16, None, 27),
        (130, 130, 7, 1, 8, 8, None, 0),
        (257, 64, 4, 4, 80, 64, None, 3),
        (300, 90, 4, 2, 32, 32, 40, 0),
        (300, 90, 4, 2, 32, 32, 1, 6),
        (65, 1, 2, 1, 16, 16, None, 0),
    ],
)
def test_attention(
    dtype: torch.dtype,
    length: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
    window: int | None,
    padding: int,
    splits: int | None,
) -> None:
    from cachetune_rag.kernels.attention import attend
    from cachetune_rag.kernels.watched_attention import disturb, nearness, receive

    torch.manual_seed(0)
    keys, values, table = buffers(length, kv_heads, dim, v_dim, dtype)
    positions = torch.cat((torch.full((padding,), -1, device=DEVICE), some_places(length, tokens)))
    # Heads and tokens as a transformers attention hands them over: a transposed view.
    query = torch.randn(1, padding + tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    lse = torch.full((padding + tokens, heads), float("nan"), device=DEVICE)
    given = {"kv_heads": kv_heads, "scale": dim**-0.5, "window": window}
    out = attend(query, table, 1, positions, v_dim=v_dim, lse=lse, splits=splits, **given)
    wanted, weights = attend_reference(query, keys[1], values[1], positions, scale=dim**-0.5, window=window)
    assert bool(torch.isfinite(out).all())
    assert error(out[:, padding:], wanted[:, padding:]) <= TOLERANCE[dtype]

    watched = torch.tensor([9], device=DEVICE)
    mass = torch.zeros(length + 70, device=DEVICE)
    receive(query, lse, table, 1, positions, watched, mass, **given)
    receive(query, lse, table, 1, positions, watched, mass, **given)
    seen = weights[:, -9:]
    assert error(mass[:length], 2 * seen.mean((0, 1)) * (seen.shape[1] / min(9, padding + tokens))) <= TOLERANCE[dtype]
    assert not mass[length:].any()

    hidden = 3 * torch.randn(1, padding + tokens, 50, device=DEVICE).to(dtype)
    near = torch.full((padding + tokens,), float("nan"), device=DEVICE)
    nearness(hidden, near)
    assert error(near, 1 / hidden[0].double().norm(dim=-1)) <= 1e-5
    gain = torch.rand(heads, device=DEVICE) + 0.5
    # Columns of three layers; this one's are in the middle.
    deviations = torch.rand(length, 6 * kv_heads, device=DEVICE).half()
    address = torch.tensor([deviations.data_ptr()], device=DEVICE)
    total = torch.zeros(kv_heads, length + 70, device=DEVICE)
    columns = 2 * kv_heads, 6 * kv_heads
    for _ in range(2):
        disturb(query, out, lse, near, gain, table, 1, positions, watched, address, *columns, total, **given)
    ours = deviations[:, 2 * kv_heads : 3 * kv_heads], deviations[:, 3 * kv_heads : 4 * kv_heads]
    expected = disturb_reference(
        query, keys[1], values[1], positions, hidden[0], gain, *ours, watched=9, scale=dim**-0.5, window=window
    )
    # A token that sees itself alone is at no distance from its value, but for rounding, of which the root is taken.
    assert error(total.sum(0)[:length], 2 * expected) <= max(2 * TOLERANCE[dtype], 1e-3 if window == 1 else 0)
    assert not total[:, length:].any()


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("length", "tokens", "heads", "kv_heads", "dim", "window", "padding"),
    [(200, 21, 4, 2, 16, None, 3), (257, 9, 4, 4, 80, None, 0), (300, 30, 4, 2, 32, 90, 2)],
)
def test_attention_over_listed_rows(
    dtype: torch.dtype,
    length: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    padding: int,
    splits: int,
) -> None:
    """The rows of a list alone are seen and looked at. The others may hold anything, NaN as well."""
    from cachetune_rag.kernels.attention import attend
    from cachetune_rag.kernels.watched_attention import disturb, nearness, receive

    torch.manual_seed(3)
    keys, values, table = buffers(length, kv_heads, dim, dim, dtype)
    places = some_places(length, tokens)
    positions = torch.cat((torch.full((padding,), -1, device=DEVICE), places))
    seen = (torch.rand(length) < 0.4).to(DEVICE)
    seen[places] = True
    keys[1][~seen] = values[1][~seen] = float("nan")
    rows = seen.nonzero()[:, 0]
    listed = torch.full((length + 20,), 7, dtype=torch.int32, device=DEVICE)
    listed[: len(rows)] = rows.int()
    count = torch.tensor([len(rows)], device=DEVICE)
    query = torch.randn(1, padding + tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    lse = torch.full((padding + tokens, heads), float("nan"), device=DEVICE)
    given = {"kv_heads": kv_heads, "scale": dim**-0.5, "window": window, "listed": (listed, count)}
    out = attend(query, table, 1, positions, v_dim=dim, lse=lse, splits=splits, **given)
    # What stands at the listed places, as if these were a prompt of its own whose tokens know where they stood.
    k, v = keys[1][seen].double(), values[1][seen].double()
    group = heads // kv_heads
    allowed = rows[None] <= positions[:, None]
    if window is not None:
        allowed &= positions[:, None] - rows[None] < window
    scores = query[0].double() @ k.repeat_interleave(group, 1).permute(1, 2, 0) * dim**-0.5
    weights = scores.masked_fill(~allowed[None], float("-inf")).softmax(-1).nan_to_num(0.0)
    wanted = (weights @ v.repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)[None]
    assert bool(torch.isfinite(out).all())
    assert error(out[:, padding:], wanted[:, padding:]) <= TOLERANCE[dtype]

    watched = torch.tensor([5], device=DEVICE)
    mass = torch.zeros(length + 20, device=DEVICE)
    receive(query, lse, table, 1, positions, watched, mass, **given)
    received = torch.zeros(length + 20, dtype=torch.float64, device=DEVICE)
    received[rows] = weights[:, -5:].mean((0, 1))
    assert error(mass, received) <= TOLERANCE[dtype]
    assert not mass[received == 0].any()

    hidden = torch.randn(1, padding + tokens, 50, device=DEVICE).to(dtype)
    near = torch.empty(padding + tokens, device=DEVICE)
    nearness(hidden, near)
    gain = torch.rand(heads, device=DEVICE) + 0.5
    deviations = torch.rand(length, 2 * kv_heads, device=DEVICE).half()
    address = torch.tensor([deviations.data_ptr()], device=DEVICE)
    total = torch.zeros(kv_heads, length + 20, device=DEVICE)
    disturb(query, out, lse, near, gain, table, 1, positions, watched, address, 0, 2 * kv_heads, total, **given)
    expected = torch.zeros(length, dtype=torch.float64, device=DEVICE)
    for head in range(heads):
        for token in range(padding + tokens)[-5:]:
            apart = (v[:, head // group] - wanted[0, token, head]).norm(dim=-1)
            steep = query[0, head, token].double().norm() * gain[head] * dim**-0.5 / dim**0.5
            off = deviations[rows][:, [head // group, kv_heads + head // group]].double()
            by_key = steep * apart * off[:, 0]
            expected[rows] += weights[head, token] / hidden[0, token].double().norm() * (off[:, 1] + by_key)
    assert error(total.sum(0)[:length], expected) <= 2 * TOLERANCE[dtype]
    assert not total[:, :length][:, ~seen].any()
    assert not total[:, length:].any()


PARTS = [
    ((48, 1, 0), None),
    ((36, 64, 40), None),
    ((7, 1, 0), None),
    ((1024, 1, 0), None),
    ((1024, 1, 0), HeadBytes.of([(256, 256), (768, 256)])),
    ((96, 1, 0), HeadBytes.of([(4, 8), (20, 8), (40, 12), (76, 20)])),
    ((36, 64, 40), HeadBytes.of([(1, 3), (9, 5)], [(6, 7), (30, 10)])),
]
"""Bytes of a row, rows of a group, bytes that these share; and which of them are wanted."""


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("form", "wanted_bytes"), PARTS)
def test_single_rows_are_gathered_from_host_memory(
    form: tuple[int, int, int], wanted_bytes: HeadBytes | None, layers: int
) -> None:
    row, group_rows, shared = form
    from cachetune_rag.kernels import rows_of
    from cachetune_rag.kernels.rows import gather

    counts, generator = [130, 5, 70], torch.Generator().manual_seed(2)
    sizes = [-(-count // group_rows) * (shared + group_rows * row) for count in counts]
    stored = [
        [torch.randint(1, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
        for _ in range(layers)
    ]
    if CUDA:
        stored = [[each.pin_memory() for each in some] for some in stored]
    # Where each source's rows of a layer lie is in tables: the stages of layers, say, take turns.
    stages = [torch.zeros(sum(sizes), dtype=torch.uint8, device=DEVICE) for _ in range(layers)][::-1]
    ends = [sum(sizes[:number]) for number in range(3)]
    # An even number of sources, as the loader's tables have.
    bases = torch.tensor([[*(stage.data_ptr() + end for end in ends), 0] for stage in stages], device=DEVICE)
    hosts = torch.tensor(
        [[some[0].data_ptr(), 0, some[2].data_ptr(), 0] for some in stored], device=DEVICE
    )  # the second one's are not copied
    every = torch.from_numpy(rows_of(counts))
    count, where = 60, every[torch.randperm(len(every), generator=generator)]
    gather(
        hosts, bases, where.to(DEVICE), torch.tensor([count], device=DEVICE),
        row_bytes=row, group_rows=group_rows, group_bytes=shared, wanted=wanted_bytes,
    )  # fmt: skip
    some_bytes = wanted_bytes or HeadBytes.of([(0, row)], [(0, shared)])
    for host, stage in zip(stored, stages, strict=True):
        wanted = torch.zeros(sum(sizes), dtype=torch.uint8)
        for each in where[:count].tolist():
            source, number = each >> 32, each & 0xFFFFFFFF
            if source == 1:
                continue
            group = number // group_rows * (shared + group_rows * row)
            in_row = group + shared + number % group_rows * row
            both = (*((group + at, n) for at, n in some_bytes.group), *((in_row + at, n) for at, n in some_bytes.row))
            for start, size in both:
                wanted[ends[source] + start :][:size] = host[source][start : start + size]
        assert torch.equal(stage.cpu(), wanted)


def test_where_no_row_is_seen_none_is_gathered() -> None:
    from cachetune_rag.kernels.rows import gather

    stage, table = torch.zeros(64, dtype=torch.uint8, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    bases = torch.tensor([[stage.data_ptr(), 0]] * 2, device=DEVICE)
    gather(bases, bases, table, table[:1], row_bytes=16)
    assert not stage.any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("turn", ["half", "pairs", "part", "none"])
@pytest.mark.parametrize(("heads", "dim", "v_dim"), [(2, 16, 16), (3, 24, 8), (1, 8, 20)])
def test_shift(dtype: torch.dtype, turn: str, heads: int, dim: int, v_dim: int) -> None:
    from cachetune_rag.kernels.shift import SPAN, shift

    torch.manual_seed(4)
    length, padding, strength = 90, 3, 0.4
    keys, values, table = buffers(length, heads, dim, v_dim, dtype)
    stored_k, stored_v = keys[1].clone(), values[1].clone()
    positions = torch.cat((torch.full((padding,), -1, device=DEVICE), some_places(length, 30)))
    spans = [(2, 40), (40, 41), (45, 80)]
    fresh_k = torch.randn(1, padding + 30, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    fresh_v = torch.randn(1, heads, padding + 30, v_dim, device=DEVICE).to(dtype)
    channels = torch.arange(dim, device=DEVICE)
    if turn == "pairs":
        partner, sign = channels ^ 1, (channels % 2) * 2.0 - 1
    else:
        partner, sign = (channels + dim // 2) % dim, (channels >= dim // 2) * 2.0 - 1
    # Tables that stretch, and whose channels are turned each by its own angle, as some families have them.
    cos, sin = ((1.2 * torch.randn(length, dim, device=DEVICE)).to(dtype) for _ in range(2))
    if turn == "part":
        cos[:, 4:], sin[:, 4:] = 1, 0
        partner[:4], sign[:4] = channels[:4] ^ 1, (channels[:4] % 2) * 2.0 - 1
    rotations = torch.tensor([0, 0, cos.data_ptr(), sin.data_ptr(), 0, 0], device=DEVICE)
    known = (torch.rand(padding + 30, device=DEVICE) < 0.8).long()
    rows = torch.zeros(6, SPAN, dtype=torch.int64)
    for row, (start, end) in zip(rows, spans, strict=False):
        inside = [i for i, p in enumerate(positions.tolist()) if start <= p < end]
        if inside:
            weight = torch.tensor(strength / (int(known[inside].sum()) + 2)).view(torch.int32)
            row[:] = torch.tensor([start, end, inside[0], inside[-1] + 1, int(weight)])
    moved = (
        torch.full((6, heads, dim), float("nan"), device=DEVICE),
        torch.full((6, heads, v_dim), float("nan"), device=DEVICE),
    )
    turning = None if turn == "none" else (partner.int(), sign.float())
    shift(fresh_k, fresh_v, table, 1, positions, known, rows.to(DEVICE), rotations, turning, moved)
    how = None if turn == "none" else (cos, sin, partner, sign.float())
    wanted_k = shift_reference(stored_k, fresh_k[0].transpose(0, 1), positions, known, spans, strength, how)
    wanted_v = shift_reference(stored_v, fresh_v[0].transpose(0, 1), positions, known, spans, strength, None)
    assert error(keys[1], wanted_k) <= TOLERANCE[dtype]
    assert error(values[1], wanted_v) <= TOLERANCE[dtype]
    assert not torch.equal(keys[1], stored_k)
    # Without any chunk, as in the graph of a forward that shifts none: nothing is written, and no address is followed.
    shifted_k, shifted_v = keys[1].clone(), values[1].clone()
    none, nowhere = torch.zeros_like(rows, device=DEVICE), torch.zeros_like(rotations)
    shift(fresh_k, fresh_v, table, 1, positions, known, none, nowhere, turning, moved)
    assert torch.equal(keys[1], shifted_k)
    assert torch.equal(values[1], shifted_v)


@pytest.mark.parametrize("codec", ["exact", "fp8", "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("heads", "dim", "v_dim", "width"),
    [(2, 16, 16, 16), (3, 24, 8, 12), (1, 8, 8, 0), (8, 128, 128, 128), (3, 5, 3, 2), (4, 64, 64, 64)],
)
def test_place_is_the_codec_the_rotation_and_a_scatter(
    codec: str, dtype: torch.dtype, heads: int, dim: int, v_dim: int, width: int
) -> None:
    """Bit for bit, with rows of several chunks that lie apart."""
    from cachetune_rag.kernels.rows import place

    torch.manual_seed(1)
    # Rows of each chunk: of both groups of the second one, the last row of a whole group, the only row of one.
    rows = [[0, 20], [0, 63, 64, 69], [], [63], [0]]
    counts = [21, 70, 0, 64, 1]
    length = 17
    coder, spec = get_codec(codec), LayerSpec(heads, dim, v_dim)
    form = coder.row_format(spec, dtype)
    k, v = (torch.randn(90, heads, width_of).to(dtype) for width_of in (dim, v_dim))
    k += torch.arange(dim) * 3
    stored = [coder.encode(k * (i + 1), v / (i + 1)).to(DEVICE) for i in range(len(counts))]
    bases = torch.tensor([[rows.data_ptr() for rows in stored]], device=DEVICE)
    where = torch.tensor([source << 32 | row for source, some in enumerate(rows) for row in some], device=DEVICE)
    places = torch.randperm(length)[: len(where)].to(DEVICE)
    angles = torch.rand(length, width // 2, device=DEVICE) * 6
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    keys = torch.full((length, heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    values = torch.full((length, heads, v_dim), float("nan"), dtype=dtype, device=DEVICE)
    wanted_k, wanted_v = keys.clone(), values.clone()
    place(
        bases, where, places, cos if width else None, sin if width else None, keys, values, codec=codec,
        row_bytes=form.row_bytes, group_rows=form.group_rows, group_bytes=form.group_bytes,
        aligned=not any(n % 16 for n in (form.row_bytes, form.group_bytes, *bases[0].tolist())),
    )  # fmt: skip
    found_k, found_v = keys[:0], values[:0]
    for encoded, count, some in zip(stored, counts, rows, strict=True):
        part_k, part_v = coder.decode(encoded[: form.size(count)].clone(), spec, dtype)
        found_k, found_v = torch.cat((found_k, part_k[some])), torch.cat((found_v, part_v[some]))
    wanted_k[places] = turn_half_split(found_k, cos[places], sin[places]) if width else found_k
    wanted_v[places] = found_v
    assert torch.equal(keys.nan_to_num(77.0), wanted_k.nan_to_num(77.0))
    assert torch.equal(values.nan_to_num(77.0), wanted_v.nan_to_num(77.0))


@pytest.mark.parametrize("codec", ["exact", "fp8", "int4", "int8"])
@pytest.mark.parametrize(("first", "own"), [(0, 2), (2, 2), (3, 1)])
def test_place_can_take_some_of_the_stored_heads(codec: str, first: int, own: int) -> None:
    """Those that one of several processes has."""
    from cachetune_rag.kernels.rows import place

    torch.manual_seed(3)
    heads, dim, v_dim, count = 4, 16, 8, 70
    coder, spec, dtype = get_codec(codec), LayerSpec(4, 16, 8), torch.float32
    form = coder.row_format(spec, dtype)
    stored = coder.encode(torch.randn(count, heads, dim), torch.randn(count, heads, v_dim)).to(DEVICE)
    angles = torch.rand(count, dim // 2, device=DEVICE) * 6
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    keys = torch.full((count + 1, own, dim), 7.0, device=DEVICE)
    values = torch.full((count + 1, own, v_dim), 7.0, device=DEVICE)
    places = torch.arange(count, device=DEVICE)
    place(
        torch.tensor([[stored.data_ptr()]], device=DEVICE), places.clone(), places, cos, sin, keys, values, codec=codec,
        row_bytes=form.row_bytes, group_rows=form.group_rows, group_bytes=form.group_bytes,
        stored_heads=heads, first_head=first,
    )  # fmt: skip
    wanted_k, wanted_v = (part[:, first : first + own] for part in coder.decode(stored, spec, dtype))
    assert torch.equal(keys[:-1], turn_half_split(wanted_k, cos, sin))
    assert torch.equal(values[:-1], wanted_v)
    assert bool((keys[-1] == 7).all() and (values[-1] == 7).all())


@pytest.mark.parametrize("codec", ["exact", "int4"])
@pytest.mark.parametrize("rest", [None, False, True])
def test_several_layers_are_placed_at_once(codec: str, rest: bool | None) -> None:
    """As each of them would be alone, and nothing else is written to."""
    from cachetune_rag.kernels.rows import place

    torch.manual_seed(5)
    layers, heads, dim, v_dim, count = 4, 2, 16, 8, 20
    coder, spec, dtype = get_codec(codec), LayerSpec(heads, dim, v_dim), torch.float32
    form = coder.row_format(spec, dtype)
    stored = [
        coder.encode(torch.randn(count, heads, dim), torch.randn(count, heads, v_dim)).to(DEVICE) for _ in range(layers)
    ]
    # The stages of layers take turns, so their addresses don't ascend.
    bases = torch.tensor([[each.data_ptr(), 0] for each in stored[::-1]], device=DEVICE)
    angles = torch.rand(count + 1, dim // 2, device=DEVICE) * 6
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    where, places = torch.arange(count, device=DEVICE), torch.randperm(count).to(DEVICE)
    split = None if rest is None else torch.tensor([7], device=DEVICE)
    found, wanted = (
        [torch.full((layers + 2, count + 1, heads, width), 7.0, device=DEVICE) for width in (dim, v_dim)]
        for _ in range(2)
    )
    given = {
        "codec": codec, "row_bytes": form.row_bytes, "group_rows": form.group_rows, "group_bytes": form.group_bytes,
        "split": split, "rest": bool(rest),
    }  # fmt: skip
    steps = found[0].stride(0), found[1].stride(0)
    place(bases, where, places, cos, sin, found[0][1], found[1][1], **given, steps=steps)
    for layer in range(layers):
        keys, values = (rows[layer + 1] for rows in wanted)
        place(bases[layer : layer + 1], where, places, cos, sin, keys, values, **given)
        assert bool((keys != 7).any())
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_scatter(dtype: torch.dtype) -> None:
    from cachetune_rag.kernels.rows import scatter

    torch.manual_seed(2)
    keys, values, table = buffers(40, 3, 8, 24, dtype)
    wanted_k, wanted_v = keys[2].clone(), values[2].clone()
    places = torch.cat((torch.tensor([-1, -1], device=DEVICE), some_places(40, 11)))
    fresh_k = torch.randn(1, 13, 3, 8, device=DEVICE).to(dtype).transpose(1, 2)
    fresh_v = torch.randn(1, 3, 13, 24, device=DEVICE).to(dtype)
    scatter(fresh_k, fresh_v, table, 2, places)
    wanted_k[places[2:]] = fresh_k[0, :, 2:].transpose(0, 1)
    wanted_v[places[2:]] = fresh_v[0, :, 2:].transpose(0, 1)
    assert torch.equal(keys[2], wanted_k)
    assert torch.equal(values[2], wanted_v)


def test_rows_are_numbered_by_source() -> None:
    from cachetune_rag.kernels import rows_of

    assert rows_of([2, 0, 3]).tolist() == [0, 1, 2 << 32, (2 << 32) + 1, (2 << 32) + 2]
    assert rows_of([]).tolist() == []


@pytest.mark.parametrize("count", [1, 256, 1000])
def test_fetch(count: int) -> None:
    from cachetune_rag.kernels.rows import fetch

    host = torch.randint(-(2**60), 2**60, (count,))
    host = host.pin_memory() if CUDA else host
    out = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    fetch(host, out)
    assert torch.equal(out.cpu(), host)
