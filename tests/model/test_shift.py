"""Chunk shift: against float64 arithmetic on keys before rotation, for every family's rotation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import BOS, FAMILIES, Family, ids_of, model_of
from plain_llama import PlainLlama
from tiny import llama
from torch import Tensor

from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.family.rope import Turn
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.shift import KAPPA, ChunkShift, RowShift

LENGTH = 40
SPANS = [(1, 14), (14, 15), (17, 30), (30, 36)]
"""Chunks of several lengths, two of them neighbours; the rest is prefix, separator and query."""
SELECTED = [0, 1, 2, 5, 14, 15, 16, 20, 36, 37, 38, 39]
"""Of the chunks: three tokens, the only one, one, none."""


def random_rows(adapter: ModelAdapter, seed: int, rows: int = LENGTH) -> list[tuple[Tensor, Tensor]]:
    """Keys before rotation and values of every layer, as if stored."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, spec.heads, spec.head_dim, generator=generator),
            torch.randn(rows, spec.heads, spec.v_head_dim, generator=generator),
        )
        for spec in adapter.layers
    ]


def buffers_with(adapter: ModelAdapter, stored: list[tuple[Tensor, Tensor]]) -> KVBuffers:
    length = stored[0][0].shape[0]
    buffers, tables = adapter.new_buffers(length), adapter.rotary_tables(length)
    for layer, (keys, values) in enumerate(stored):
        buffers.key_rows[layer].copy_(adapter.rotate(layer, keys, torch.arange(length), tables))
        buffers.value_rows[layer].copy_(values)
    return buffers


def turns_of(adapter: ModelAdapter, length: int) -> list[Turn | None]:
    return adapter.rotary.turns(adapter.rotary_tables(length), [spec.head_dim for spec in adapter.layers])


def moved(stored: Tensor, fresh: Tensor, places: list[int], strength: float) -> Tensor:
    """The rule, row by row."""
    rows = stored.clone()
    for start, end in SPANS:
        inside = [(i, j) for i, j in enumerate(places) if start <= j < end]
        if inside:
            total = sum(fresh[i] - stored[j] for i, j in inside)
            rows[start:end] += strength * total / (len(inside) + KAPPA)
    return rows


@pytest.mark.parametrize("family", FAMILIES, ids=ids_of(FAMILIES))
def test_every_familys_rows_move_as_they_would_before_rotation(family: Family) -> None:
    adapter = ModelAdapter(model_of(family.name))
    offset = 75  # beyond the original length of long-rope
    places = [p + offset for p in SELECTED]
    stored, fresh = random_rows(adapter, 1, LENGTH + offset), random_rows(adapter, 2, len(SELECTED))
    buffers, positions = buffers_with(adapter, stored), torch.tensor(places)
    tables = adapter.rotary_tables(LENGTH + offset)
    spans = [(start + offset, end + offset) for start, end in SPANS]
    shift = RowShift(ChunkShift(0.4, spans), positions, turns_of(adapter, LENGTH + offset))
    for layer, ((keys, values), (new_keys, new_values)) in enumerate(zip(stored, fresh, strict=True)):
        rotated = adapter.rotate(layer, new_keys, positions, tables)
        shift.apply(layer, buffers.key_rows[layer], buffers.value_rows[layer], rotated, new_values)
        everywhere = torch.arange(LENGTH + offset)
        wanted_keys, wanted_values = keys.clone(), values.clone()
        wanted_keys[offset:] = moved(keys[offset:], new_keys, SELECTED, 0.4)
        wanted_values[offset:] = moved(values[offset:], new_values, SELECTED, 0.4)
        got = buffers.key_rows[layer]
        torch.testing.assert_close(
            got, adapter.rotate(layer, wanted_keys, everywhere, tables).contiguous(), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(buffers.value_rows[layer], wanted_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("selected", [SELECTED, [39], [0, 13, 14, 29, 35, 39], list(range(LENGTH))])
def test_the_forward_equals_a_float64_reference(strength: float, selected: list[int]) -> None:
    model = llama()
    adapter, ids = ModelAdapter(model), [BOS, *range(20, 20 + LENGTH - 1)]
    stored = random_rows(adapter, 3)
    buffers = buffers_with(adapter, stored)
    shift = ChunkShift(strength, SPANS)
    chosen = torch.tensor(selected)
    logits = adapter.selective_forward(torch.tensor(ids)[chosen], chosen, buffers, shift=shift)
    plain = [(k.double().numpy(), v.double().numpy()) for k, v in stored]
    wanted = PlainLlama(model).forward(ids, selected, plain, SPANS, strength)
    np.testing.assert_allclose(logits[0].numpy(), wanted.logits, rtol=0, atol=2e-4)
    for layer in range(adapter.num_layers):
        np.testing.assert_allclose(buffers.key_rows[layer].numpy(), wanted.keys[layer], rtol=0, atol=1e-4)
        np.testing.assert_allclose(buffers.value_rows[layer].numpy(), wanted.values[layer], rtol=0, atol=1e-4)


def test_what_is_computed_or_belongs_to_no_chunk_is_not_moved() -> None:
    adapter = ModelAdapter(llama())
    stored, fresh = random_rows(adapter, 1), random_rows(adapter, 2, len(SELECTED))
    buffers = buffers_with(adapter, stored)
    before = [rows.clone() for rows in (*buffers.key_rows, *buffers.value_rows)]
    shift = RowShift(ChunkShift(0.4, SPANS), torch.tensor(SELECTED), turns_of(adapter, LENGTH))
    for layer, (keys, values) in enumerate(fresh):
        shift.apply(layer, buffers.key_rows[layer], buffers.value_rows[layer], keys, values)
    touched = set(range(1, 15)) | set(range(17, 30))  # the last chunk has nothing recomputed
    for old, new in zip(before, (*buffers.key_rows, *buffers.value_rows), strict=True):
        changed = {i for i in range(LENGTH) if not torch.equal(old[i], new[i])}
        assert changed == touched


def test_each_occurrence_of_a_chunk_moves_by_its_own_tokens() -> None:
    """The same rows twice: what is recomputed in one place says nothing of the other."""
    adapter = ModelAdapter(llama())
    stored = random_rows(adapter, 5, 12)
    rows = [(torch.cat((k, k)), torch.cat((v, v))) for k, v in stored]
    buffers = buffers_with(adapter, rows)
    positions = torch.tensor([3])
    shift = RowShift(ChunkShift(0.5, [(0, 12), (12, 24)]), positions, turns_of(adapter, 24))
    before = buffers.value_rows[0].clone()
    fresh = random_rows(adapter, 6, 1)[0]
    shift.apply(0, buffers.key_rows[0], buffers.value_rows[0], *fresh)
    assert torch.equal(buffers.value_rows[0][12:], before[12:])
    step = 0.5 * (fresh[1][0] - before[3]) / 3
    torch.testing.assert_close(buffers.value_rows[0][:12], before[:12] + step)


def test_nothing_to_move() -> None:
    adapter = ModelAdapter(llama())
    stored, fresh = random_rows(adapter, 1), random_rows(adapter, 2, 2)[0]
    for spans in ([], SPANS):
        buffers = buffers_with(adapter, stored)
        before = buffers.key_rows[0].clone()
        shift = RowShift(ChunkShift(0.4, spans), torch.tensor([0, 39]), turns_of(adapter, LENGTH))
        shift.apply(0, buffers.key_rows[0], buffers.value_rows[0], *fresh)
        assert torch.equal(buffers.key_rows[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_and_no_more(dtype: torch.dtype) -> None:
    exact, half = ModelAdapter(llama()), ModelAdapter(llama().to(dtype))
    stored = [(k.to(dtype), v.to(dtype)) for k, v in random_rows(exact, 1)]
    fresh = [(k.to(dtype), v.to(dtype)) for k, v in random_rows(exact, 2, len(SELECTED))]
    positions, results = torch.tensor(SELECTED), []
    for adapter in (exact, half):
        buffers = buffers_with(adapter, [(k.to(adapter.dtype), v.to(adapter.dtype)) for k, v in stored])
        shift = RowShift(ChunkShift(0.4, SPANS), positions, turns_of(adapter, LENGTH))
        for layer, (keys, values) in enumerate(fresh):
            rows = buffers.key_rows[layer], buffers.value_rows[layer]
            shift.apply(layer, *rows, keys.to(adapter.dtype), values.to(adapter.dtype))
        results.append(torch.stack((*buffers.key_rows, *buffers.value_rows)))
    assert results[1].dtype == dtype
    torch.testing.assert_close(results[1].float(), results[0], rtol=0, atol=16 * torch.finfo(dtype).eps)
