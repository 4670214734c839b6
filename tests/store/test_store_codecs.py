"""Codecs: rows to numbers and back."""

from __future__ import annotations

import pytest
import torch

from cachetune_store import LayerSpec, NonFiniteError, UnknownCodecError, codec_names, get_codec, register_codec
from cachetune_store.codecs import Codec, ExactCodec

DTYPES = ["float32", "bfloat16", "float16"]
SPEC = LayerSpec(3, 8, 5)


def numbers(dtype: str, n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    return torch.randn(n, 3, 8, generator=g).to(kind), torch.randn(n, 3, 5, generator=g).to(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exact", "int8"])
def test_shapes_and_row_bytes_agree(name: str, dtype: str) -> None:
    codec = get_codec(name)
    k, v = numbers(dtype)
    rows = codec.encode(k, v)
    assert rows.dtype == torch.uint8
    assert rows.shape == (20, codec.row_bytes(SPEC, dtype))
    k2, v2 = codec.decode(rows, SPEC, dtype)
    assert (k2.shape, v2.shape, k2.dtype, v2.dtype) == (k.shape, v.shape, k.dtype, v.dtype)
    assert codec.row_bytes(SPEC, dtype) == codec.row_bytes(SPEC, getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exact", "int8"])
def test_rows_are_independent(name: str, dtype: str) -> None:
    codec = get_codec(name)
    k, v = numbers(dtype)
    whole = codec.decode(codec.encode(k, v), SPEC, dtype)
    for n in (0, 1, 7):
        part = codec.decode(codec.encode(k, v)[:n], SPEC, dtype)
        assert torch.equal(part[0], whole[0][:n])
        assert torch.equal(part[1], whole[1][:n])
    alone = codec.encode(k[4:5], v[4:5])
    assert torch.equal(alone, codec.encode(k, v)[4:5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_exact_for_every_bit_pattern(dtype: str) -> None:
    k, v = numbers(dtype)
    k[0, 0] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 65504, -1], dtype=k.dtype)
    rows = ExactCodec().encode(k, v)
    k2, v2 = ExactCodec().decode(rows, SPEC, dtype)
    assert torch.equal(k2.contiguous().view(torch.uint8), k.view(torch.uint8))
    assert torch.equal(v2, v)


def test_exact_decoding_copies_nothing() -> None:
    rows = ExactCodec().encode(*numbers("bfloat16"))
    k, v = ExactCodec().decode(rows, SPEC, "bfloat16")
    assert k.data_ptr() == rows.data_ptr()
    assert v.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["exact", "int8"])
def test_rows_may_lie_anywhere(name: str) -> None:
    codec = get_codec(name)
    rows = codec.encode(*numbers("float32"))
    wide = torch.zeros(20, rows.shape[1] + 7, dtype=torch.uint8)
    wide[:, 3:-4] = rows
    odd = codec.decode(wide[:, 3:-4], SPEC, "float32")
    even = codec.decode(rows, SPEC, "float32")
    assert torch.equal(odd[0], even[0])
    assert torch.equal(odd[1], even[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_its_promise_for_every_head_and_token(dtype: str) -> None:
    k, v = numbers(dtype, 200)
    k[:, 1] *= 1000  # heads of very different size don't disturb each other
    k[5, 2, 3] = 30000  # an outlier costs only its own head of its own token
    codec = get_codec("int8")
    k2, v2 = codec.decode(codec.encode(k, v), SPEC, dtype)
    rounding = 0.0 if dtype == "float32" else torch.finfo(k.dtype).eps / 2
    for exact, decoded in ((k, k2), (v, v2)):
        error = (decoded.float() - exact.float()).abs().amax(-1)
        assert bool((error <= (0.004 + rounding) * exact.float().abs().amax(-1)).all())


def test_int8_of_zeros_is_zeros() -> None:
    codec = get_codec("int8")
    k, v = codec.decode(codec.encode(torch.zeros(4, 3, 8), torch.zeros(4, 3, 5)), SPEC, "float32")
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_of_extremes_is_finite(dtype: str) -> None:
    info = torch.finfo(getattr(torch, dtype))
    codec = get_codec("int8")
    for size in (info.max, -info.max, info.tiny, info.smallest_normal / 2):
        k, v = torch.full((1, 3, 8), size, dtype=info_dtype(dtype)), torch.zeros(1, 3, 5, dtype=info_dtype(dtype))
        k2, _ = codec.decode(codec.encode(k, v), SPEC, dtype)
        assert bool(torch.isfinite(k2).all())
        assert torch.allclose(k2.float(), k.float(), rtol=0.01, atol=1e-38)


def info_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 1])
def test_int8_refuses_what_it_cannot_store(bad: float, which: int) -> None:
    pair = numbers("float32")
    pair[which][3, 1, 2] = bad
    with pytest.raises(NonFiniteError, match="'exact'"):
        get_codec("int8").encode(*pair)


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownCodecError, match="exact, int8"):
        get_codec("zip")
    assert {"exact", "int8"} <= set(codec_names())


def test_a_codec_name_cannot_change_hands() -> None:
    class Impostor(ExactCodec):
        pass

    with pytest.raises(ValueError, match="another name"):
        register_codec(Impostor())
    assert type(get_codec("exact")) is ExactCodec
    register_codec(ExactCodec())


def test_a_codec_is_three_methods() -> None:
    assert Codec.__abstractmethods__ == {"row_bytes", "encode", "decode"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exact", "int8"])
def test_the_gpu_decodes_the_same_numbers(name: str, dtype: str) -> None:
    codec = get_codec(name)
    k, v = numbers(dtype)
    rows = codec.encode(k, v)
    on_gpu = codec.decode(rows.cuda(), SPEC, dtype)
    on_cpu = codec.decode(rows, SPEC, dtype)
    assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    # Encoded there, scales may differ in the last bit: a GPU divides by a constant another way.
    there = codec.decode(codec.encode(k.cuda(), v.cuda()), SPEC, dtype)
    assert torch.allclose(there[0].cpu().float(), on_cpu[0].float(), atol=0.05)
    assert torch.allclose(there[1].cpu().float(), on_cpu[1].float(), atol=0.05)
