"""Chunks behind several lead-ins: each one exactly as behind that one alone, and the mean as a plain reference has it."""

from __future__ import annotations

from functools import cache
from threading import RLock

import numpy as np
import pytest
import torch
from families import BOS, FAMILIES, Family, ids_of, model_of, random_ids
from torch import Tensor

from cachetune_rag.chunks.mean_capture import MeanCapture, MeanKV
from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.family.output import output_heads
from cachetune_rag.model.plain.capture import ChunkKV


@cache
def adapter_of(name: str) -> ModelAdapter:
    return ModelAdapter(model_of(name))


@pytest.fixture(params=FAMILIES, ids=ids_of(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def adapter(family: Family) -> ModelAdapter:
    return adapter_of(family.name)


def lead_of(tokens: int, seed: int) -> tuple[int, ...]:
    return (BOS, *random_ids(tokens - 1, seed))


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the size of `b`."""
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def spread(captures: list[ChunkKV], adapter: ModelAdapter) -> np.ndarray:
    """Deviations [tokens, columns] by their definition, in float64, with Wo itself instead of its Gram matrix."""
    columns = []
    for layer, spec in enumerate(adapter.layers):
        keys, values = (np.stack([np.asarray(c.layers[layer][i], dtype=np.float64) for c in captures]) for i in (0, 1))
        columns.append(np.sqrt(((keys - keys.mean(0)) ** 2).sum(-1).mean(0)))
        heads = adapter.config.num_attention_heads
        weight = np.asarray(output_heads(adapter.attentions[layer], heads, spec.v_head_dim), dtype=np.float64)
        weight = weight.reshape(weight.shape[0], spec.heads, -1, spec.v_head_dim)
        errors = np.einsum("nhgd,cthd->cthgn", weight, values - values.mean(0))
        columns.append(np.sqrt((errors**2).sum(-1).mean((0, -1))))
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("lead", [1, 5, 40, 100])
def test_a_prefix_run_before_is_a_prefix_run_along(family: Family, adapter: ModelAdapter, lead: int) -> None:
    """Windows, sinks, soft caps and long-rope frequencies are those of one run of lead-in and chunk together."""
    ids = lead_of(lead, seed=lead)
    chunks = [random_ids(n, seed=n) for n in (3, 90, 20)]
    mean = MeanKV(adapter.value_grams)
    mean.begin()
    adapter.capture_behind(chunks, adapter.lead_kv(ids), mean.add_layer)
    for got, wanted in zip(mean.take([3, 90, 20]), adapter.capture(chunks, ids), strict=True):
        assert got.deviations is None
        for pair, alone in zip(got.layers, wanted.layers, strict=True):
            assert pair[0].dtype == alone[0].dtype
            assert distance(pair[0], alone[0]) <= family.tolerance / 10
            assert distance(pair[1], alone[1]) <= family.tolerance / 10


def test_mean_and_deviations_are_their_definitions(family: Family, adapter: ModelAdapter) -> None:
    leads = [lead_of(30, 1), lead_of(17, 2), lead_of(30, 3)]
    chunks = [random_ids(40, 5), random_ids(9, 6)]
    alone = [adapter.capture(chunks, lead) for lead in leads]
    for row, got in enumerate(MeanCapture(adapter, RLock()).capture(chunks, leads)):
        captures = [chunk[row] for chunk in alone]
        for layer, (k, v) in enumerate(got.layers):
            for i, found in enumerate((k, v)):
                wanted = torch.stack([c.layers[layer][i] for c in captures]).mean(0)
                assert distance(found, wanted) <= family.tolerance / 10
        assert got.deviations is not None
        assert got.deviations.dtype == torch.float16
        assert got.deviations.shape == (len(chunks[row]), 2 * sum(spec.heads for spec in adapter.layers))
        np.testing.assert_allclose(got.deviations.float().numpy(), spread(captures, adapter), rtol=5e-3, atol=1e-3)


def test_a_single_lead_in_is_exact_to_the_bit(family: Family, adapter: ModelAdapter) -> None:
    lead, chunk = lead_of(20, 4), random_ids(50, 7)
    (got,), (wanted,) = MeanCapture(adapter, RLock()).capture([chunk], [lead]), adapter.capture([chunk], lead)
    assert got.deviations is None
    assert all(
        torch.equal(a, b) for x, y in zip(got.layers, wanted.layers, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_model_is_left_as_it_was(family: Family, adapter: ModelAdapter) -> None:
    def settings() -> list[tuple[str, int]]:
        return [
            (each.config._attn_implementation, sum(len(m._forward_hooks) for m in each.modules()))
            for each in (model_of(family.name), adapter.view)
        ]

    before = settings()
    MeanCapture(adapter, RLock()).capture([random_ids(9, 1)], [lead_of(5, 2), lead_of(5, 3)])
    assert settings() == before


# -- the arithmetic -----------------------------------------------------------------------------------------------------


def means(captures: list[tuple[Tensor, Tensor]], gram: Tensor | None = None) -> ChunkKV:
    mean = MeanKV([gram])
    for keys, values in captures:
        mean.begin()
        mean.add_layer(0, keys, values)
    (chunk,) = mean.take([captures[0][0].shape[1]])
    return chunk


def test_large_common_parts_do_not_drown_the_deviations() -> None:
    """Some families' keys have channels of several hundreds that hardly change: |K|^2 would swallow the difference."""
    g = torch.Generator().manual_seed(0)
    offset = torch.full((1, 6, 2, 8), 500.0)
    noise = [torch.randn(1, 6, 2, 8, generator=g) * 1e-2 for _ in range(4)]
    chunk = means([(offset + n, offset + n) for n in noise])
    exact = torch.stack([(offset + n).double() for n in noise])
    wanted = (exact - exact.mean(0)).square().sum(-1).mean(0).sqrt()[0]
    torch.testing.assert_close(chunk.deviations.double(), torch.cat((wanted, wanted), 1), rtol=1e-2, atol=0)


def test_captures_that_agree_have_no_deviation() -> None:
    keys = torch.randn(1, 4, 2, 8)
    chunk = means([(keys, keys)] * 3, torch.eye(8).expand(2, 8, 8))
    assert difference(chunk.layers[0][0], keys[0]) <= 1e-6
    assert float(chunk.deviations.abs().max()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_averaged_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    captures = [(torch.randn(1, 300, 2, 8, generator=g).to(dtype),) * 2 for _ in range(4)]
    chunk = means(captures)
    wanted = torch.stack([keys.double() for keys, _ in captures]).mean(0)[0]
    assert chunk.layers[0][0].dtype == dtype
    # Rounded once, at the end: but for ties, what the exact mean is rounded to.
    assert (chunk.layers[0][0] == wanted.to(dtype)).double().mean() > 0.9
    assert distance(chunk.layers[0][0].double(), wanted) <= 1.1 * distance(wanted.to(dtype).double(), wanted)


def test_deviations_beyond_float16_are_its_largest_number() -> None:
    keys = torch.full((1, 2, 1, 4), 1e6)
    chunk = means([(keys, keys), (-keys, keys)])
    assert chunk.deviations[:, 0].tolist() == [65504.0, 65504.0]
    assert chunk.deviations[:, 1].tolist() == [0.0, 0.0]
