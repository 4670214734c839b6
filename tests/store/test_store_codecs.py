"""Codecs: rows to numbers and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cachetune_store import (
    HeadBytes,
    LayerSpec,
    NonFiniteError,
    UnknownCodecError,
    codec_names,
    get_codec,
    register_codec,
)
from cachetune_store.codecs import Codec, ExactCodec

CODECS = ["exact", "fp8", "int4", "int8"]
LOSSY = ["fp8", "int4", "int8"]
DTYPES = ["float32", "bfloat16", "float16"]
SPECS = [LayerSpec(3, 8, 5), LayerSpec(1, 5, 7), LayerSpec(2, 16, 16)]
SPEC = SPECS[0]
SIZES = [0, 1, 20, 63, 64, 65, 150]

Pair = tuple[Tensor, Tensor]


def numbers(dtype: str, n: int = 150, spec: LayerSpec = SPEC) -> Pair:
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    k = torch.randn(n, spec.heads, spec.head_dim, generator=g).to(kind)
    return k, torch.randn(n, spec.heads, spec.v_head_dim, generator=g).to(kind)


def there_and_back(name: str, k: Tensor, v: Tensor) -> Pair:
    codec, spec = get_codec(name), LayerSpec(k.shape[1], k.shape[2], v.shape[2])
    return codec.decode(codec.encode(k, v), spec, k.dtype)


def same(a: Pair, b: Pair) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_shapes_and_sizes_agree(name: str, dtype: str, spec: LayerSpec) -> None:
    codec = get_codec(name)
    form = codec.row_format(spec, dtype)
    assert form == codec.row_format(spec, getattr(torch, dtype))
    for n in SIZES:
        k, v = numbers(dtype, n, spec)
        encoded = codec.encode(k, v)
        assert encoded.dtype == torch.uint8
        assert encoded.shape == (form.size(n),)
        assert form.rows(form.size(n)) == n
        k2, v2 = codec.decode(encoded, spec, dtype)
        assert (k2.shape, v2.shape, k2.dtype, v2.dtype) == (k.shape, v.shape, k.dtype, v.dtype)
        kind, shape = codec.declare(n, spec, dtype)
        width = {"U8": 1, "F32": 4, "BF16": 2, "F16": 2}[kind]
        assert torch.Size(shape).numel() * width == form.size(n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_any_number_of_first_rows_decodes_alone(name: str, dtype: str) -> None:
    codec = get_codec(name)
    encoded = codec.encode(*numbers(dtype))
    form = codec.row_format(SPEC, dtype)
    whole = codec.decode(encoded, SPEC, dtype)
    for n in SIZES:
        part = codec.decode(encoded[: form.size(n)], SPEC, dtype)
        assert same(part, (whole[0][:n], whole[1][:n]))


@pytest.mark.parametrize("spec", [*SPECS, LayerSpec(8, 6, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_some_heads_decode_from_their_bytes_alone(name: str, dtype: str, spec: LayerSpec) -> None:
    codec, (k, v) = get_codec(name), numbers(dtype, 70, spec)
    encoded, form = codec.encode(k, v), codec.row_format(spec, dtype)
    whole = codec.decode(encoded, spec, dtype)
    for first in range(spec.heads):
        for end in range(first + 1, spec.heads + 1):
            heads = slice(first, end)
            wanted = codec.head_bytes(spec, dtype, heads)
            some = torch.randint(256, encoded.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            for row in range(70):
                group = row // form.group_rows * form.span(1)
                start = group + form.group_bytes + row % form.group_rows * form.row_bytes
                for at, length in [
                    *((group + a, n) for a, n in wanted.group),
                    *((start + a, n) for a, n in wanted.row),
                ]:
                    some[at : at + length] = encoded[at : at + length]
            found = codec.decode(some, spec, dtype)
            assert same((found[0][:, heads], found[1][:, heads]), (whole[0][:, heads], whole[1][:, heads]))
            if name != "int4":
                assert sum(length for _, length in wanted.row) <= form.row_bytes * (end - first) / spec.heads


def test_a_codec_that_says_nothing_of_heads_has_all_of_its_bytes_copied() -> None:
    class Silent(ExactCodec):
        head_bytes = Codec.head_bytes

    form = Silent().row_format(SPEC, "float32")
    assert Silent().head_bytes(SPEC, "float32", slice(1, 2)) == HeadBytes(((0, form.row_bytes),))


def test_stretches_are_joined() -> None:
    assert HeadBytes.of([(4, 4), (0, 4), (9, 3), (10, 1), (20, 0)]) == HeadBytes(((0, 8), (9, 3)))


@pytest.mark.parametrize("name", ["exact", "fp8", "int8"])
def test_rows_are_independent(name: str) -> None:
    codec = get_codec(name)
    k, v = numbers("float32")
    row = codec.row_format(SPEC, "float32").row_bytes
    assert torch.equal(codec.encode(k[4:5], v[4:5]), codec.encode(k, v)[4 * row : 5 * row])


def test_int4_groups_are_independent() -> None:
    codec = get_codec("int4")
    k, v = numbers("float32")
    form = codec.row_format(SPEC, "float32")
    assert torch.equal(codec.encode(k[64:150], v[64:150]), codec.encode(k, v)[form.size(64) :])


@pytest.mark.parametrize("pieces", [[150], [64, 128, 64], [70, 1, 64, 65], [3, 0, 5], [0], []])
@pytest.mark.parametrize("name", CODECS)
def test_pieces_of_several_chunks_decode_in_one_go(name: str, pieces: list[int]) -> None:
    codec = get_codec(name)
    form = codec.row_format(SPEC, "float32")
    # What stands between the pieces is whatever was in the memory.
    buffer = torch.full((sum(map(form.span, pieces)),), 255, dtype=torch.uint8)
    wanted, at = [], 0
    for index, count in enumerate(pieces):
        k, v = numbers("float32")
        encoded = codec.encode(k + index, v - index)[: form.size(count)]
        wanted.append(codec.decode(encoded, SPEC, "float32"))
        buffer[at : at + encoded.numel()] = encoded
        at += form.span(count)
    k, v = codec.decode(buffer, SPEC, "float32", pieces)
    assert k.shape[0] == v.shape[0] == sum(pieces)
    if pieces:
        assert same((k, v), (torch.cat([p[0] for p in wanted]), torch.cat([p[1] for p in wanted])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_exact_for_every_bit_pattern(dtype: str) -> None:
    k, v = numbers(dtype)
    k[0, 0] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 65504, -1], dtype=k.dtype)
    k2, v2 = there_and_back("exact", k, v)
    assert torch.equal(k2.contiguous().view(torch.uint8), k.view(torch.uint8))
    assert torch.equal(v2, v)


def test_exact_decoding_copies_nothing() -> None:
    encoded = ExactCodec().encode(*numbers("bfloat16"))
    k, v = ExactCodec().decode(encoded, SPEC, "bfloat16")
    assert k.data_ptr() == encoded.data_ptr()
    assert v.untyped_storage().data_ptr() == encoded.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", CODECS)
def test_bytes_may_lie_anywhere(name: str) -> None:
    codec = get_codec(name)
    encoded = codec.encode(*numbers("float32"))
    for shift in (1, 2, 3):
        moved = torch.zeros(encoded.numel() + shift, dtype=torch.uint8)
        moved[shift:] = encoded
        assert same(codec.decode(moved[shift:], SPEC, "float32"), codec.decode(encoded, SPEC, "float32"))


def rounding(dtype: str) -> float:
    """The relative error that the model's dtype adds to that of a codec."""
    return 1e-6 if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps / 2


def trying(dtype: str) -> Pair:
    """Heads, channels and tokens of very different sizes."""
    k, v = numbers(dtype, 200)
    k[:, 1] *= 1000
    k[5, 2, 3] = 30000
    k[:, 0, 2] += 300  # a channel far from zero, as biases make them
    v[7, 0] *= 50
    return k, v


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_its_promise_for_every_head_and_token(dtype: str) -> None:
    pair = trying(dtype)
    for exact, decoded in zip(pair, there_and_back("int8", *pair), strict=True):
        error = (decoded.float() - exact.float()).abs().amax(-1)
        assert bool((error <= (0.004 + rounding(dtype)) * exact.float().abs().amax(-1)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_keeps_its_promise_for_every_number(dtype: str) -> None:
    pair = trying(dtype)
    for exact, decoded in zip(pair, there_and_back("fp8", *pair), strict=True):
        exact, decoded = exact.float(), decoded.float()
        allowed = torch.maximum(0.063 * exact.abs(), exact.abs().amax(-1, keepdim=True) / 400_000)
        assert bool(((decoded - exact).abs() <= allowed + rounding(dtype) * exact.abs()).all())


def test_fp8_bytes_are_torchs_own() -> None:
    k, v = numbers("float32")
    encoded = get_codec("fp8").encode(k, v).view(150, -1)
    scales = encoded[:, :24].contiguous().view(torch.float32)
    assert torch.allclose(scales[:, :3], k.abs().amax(-1) / 448)
    said = encoded[:, 24:48].contiguous().view(torch.float8_e4m3fn).float().view(150, 3, 8)
    assert torch.equal(said * scales[:, :3, None], there_and_back("fp8", k, v)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_keeps_its_promise(dtype: str) -> None:
    k, v = trying(dtype)
    k2, v2 = there_and_back("int4", k, v)

    def within(exact: Tensor, decoded: Tensor, dim: int) -> bool:
        exact, decoded = exact.float(), decoded.float()
        low, high = exact.aminmax(dim=dim, keepdim=True)
        largest = torch.maximum(high.abs(), low.abs())
        allowed = (high - low) / 29 + largest / 3800
        return bool(((decoded - exact).abs() <= allowed + rounding(dtype) * exact.abs()).all())

    assert within(v, v2, 2)
    for start in range(0, 200, 64):  # a channel of a group of rows
        assert within(k[start : start + 64], k2[start : start + 64], 0)


def test_int4_keys_are_worse_by_token_than_by_channel() -> None:
    """Channels of keys with different ranges must not share a scale, which is why there are groups."""
    k, v = numbers("float32", 64)
    k = k * 0.1 + torch.arange(8.0)
    by_channel = there_and_back("int4", k, v)[0]
    by_token = there_and_back("int4", k[..., :5], k)[1]
    assert float((by_channel - k).norm()) < 0.2 * float((by_token - k).norm())


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_stay_zeros(name: str) -> None:
    k, v = there_and_back(name, torch.zeros(4, 3, 8), torch.zeros(4, 3, 5))
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_extremes_stay_finite(name: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    info = torch.finfo(kind)
    for size in (info.max, -info.max, info.tiny, info.smallest_normal / 2):
        k2, v2 = there_and_back(name, torch.full((1, 3, 8), size, dtype=kind), torch.zeros(1, 3, 5, dtype=kind))
        assert torch.allclose(k2.float(), torch.full((1, 3, 8), size), rtol=0.01, atol=1e-38)
        assert not v2.any()
    # From the lowest number to the highest; and close to the highest, where a rounded step could pass it.
    for low, high in ((info.min, info.max), (0.915 * info.max, info.max), (0.97 * info.max, info.max)):
        k = torch.linspace(low / 2, high / 2, 24, dtype=torch.float64).mul(2).view(1, 3, 8).expand(70, -1, -1)
        k = (k * torch.linspace(0.93, 1, 70, dtype=torch.float64)[:, None, None]).to(kind)
        for found in there_and_back(name, k, k):
            assert bool(torch.isfinite(found).all())
            error = (found.double() - k.double()).abs().max() / info.max
            assert float(error) <= (0.07 if name == "fp8" else 0.14), "a step, of fifteen from end to end"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", LOSSY)
def test_what_no_scale_can_carry_is_refused(name: str, bad: float, which: int) -> None:
    pair = numbers("float32")
    pair[which][3, 1, 2] = bad
    what = ("keys", "values")[which]
    with pytest.raises(NonFiniteError, match=f"{what} hold .*codec '{name}'.*'exact'"):
        get_codec(name).encode(*pair)


def test_int4_takes_about_a_quarter_of_sixteen_bits() -> None:
    llama = LayerSpec(8, 128, 128)
    exact, small = (get_codec(name).row_format(llama, "bfloat16").size(512) for name in ("exact", "int4"))
    assert small / exact < 0.28


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownCodecError, match="exact, fp8, int4, int8"):
        get_codec("zip")
    assert set(CODECS) <= set(codec_names())


def test_a_codec_name_cannot_change_hands() -> None:
    class Impostor(ExactCodec):
        pass

    with pytest.raises(ValueError, match="another name"):
        register_codec(Impostor())
    assert type(get_codec("exact")) is ExactCodec
    register_codec(ExactCodec())


def test_a_codec_is_three_methods() -> None:
    assert Codec.__abstractmethods__ == {"row_format", "encode", "decode"}
    assert all(get_codec(name).error for name in codec_names())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_the_gpu_decodes_the_same_numbers(name: str, dtype: str) -> None:
    codec = get_codec(name)
    k, v = numbers(dtype)
    encoded = codec.encode(k, v)
    on_cpu = codec.decode(encoded, SPEC, dtype)
    on_gpu = codec.decode(encoded.cuda(), SPEC, dtype)
    assert same((on_gpu[0].cpu(), on_gpu[1].cpu()), on_cpu)
    # Encoded there, scales may differ in the last bit, and with them where a number is rounded to.
    there = codec.decode(codec.encode(k.cuda(), v.cuda()), SPEC, dtype)
    step = {"exact": 0.0, "int8": 0.05, "fp8": 0.5, "int4": 0.5}[name]
    assert torch.allclose(there[0].cpu().float(), on_cpu[0].float(), atol=step)
    assert torch.allclose(there[1].cpu().float(), on_cpu[1].float(), atol=step)
