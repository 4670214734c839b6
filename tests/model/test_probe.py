"""Expected error: against float64 loops on a tiny Llama, and against transformers' own numbers for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import BOS, FAMILIES, Family, ids_of, model_of, random_ids
from plain_llama import PlainLlama
from tiny import llama
from torch import Tensor
from transformers.cache_utils import DynamicCache

from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.family import masks, taps
from cachetune_rag.model.family.output import gain, output_heads
from cachetune_rag.model.heads import Heads
from cachetune_rag.model.plain import watch
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.model.plain.shortlist import MasksNotNamedError, Shortlist

LENGTH = 120
COMPUTED = [0, 1, 2, 50, *range(111, LENGTH)]
"""A prefix, a separator, and a query behind two chunks."""


def nothing(layer: int) -> None:
    """Every row is there from the start."""


@cache
def adapter_of(name: str) -> ModelAdapter:
    return ModelAdapter(model_of(name))


@cache
def tiny() -> ModelAdapter:
    return ModelAdapter(llama())


def columns(adapter: ModelAdapter) -> int:
    return 2 * sum(spec.heads for spec in adapter.layers)


def some_deviations(adapter: ModelAdapter, seed: int = 0) -> Tensor:
    """As chunks store them, 0 for what is computed."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(LENGTH, columns(adapter), generator=generator).half()
    table[COMPUTED] = 0
    return table


def reused_rows(adapter: ModelAdapter, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(LENGTH, s.heads, s.head_dim, generator=generator),
            torch.randn(LENGTH, s.heads, s.v_head_dim, generator=generator),
        )
        for s in adapter.layers
    ]


def buffers_with(adapter: ModelAdapter, stored: list[tuple[Tensor, Tensor]]) -> KVBuffers:
    buffers, tables = adapter.new_buffers(LENGTH), adapter.rotary_tables(LENGTH)
    for layer, (keys, values) in enumerate(stored):
        buffers.key_rows[layer].copy_(adapter.rotate(layer, keys, torch.arange(LENGTH), tables))
        buffers.value_rows[layer].copy_(values)
        for rows in (buffers.key_rows[layer], buffers.value_rows[layer]):
            rows[COMPUTED] = float("nan")
    return buffers


def expected_error(
    adapter: ModelAdapter,
    buffers: KVBuffers,
    ids: Tensor,
    deviations: Tensor,
    layers: int,
    queries: int,
    left_out: Tensor | None = None,
) -> Tensor:
    chosen = torch.tensor(COMPUTED)
    deviations = deviations[:, : 2 * sum(spec.heads for spec in adapter.layers[:layers])]
    probe = ProbePass(ids[chosen], chosen, buffers, layers, queries, nothing, left_out=left_out)
    return adapter.expected_error(probe, deviations)


@pytest.mark.parametrize("queries", [1, 4, len(COMPUTED)])
@pytest.mark.parametrize("part", ["both", "keys", "values"])
@pytest.mark.parametrize("attention", ["written out for all", "written out for the last", "the model's"])
def test_expected_error_equals_a_float64_reference(
    queries: int, part: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "written out for the last":
        monkeypatch.setattr(watch, "FEW", 0)
    adapter, ids = tiny(), torch.tensor([BOS, *range(20, 20 + LENGTH - 1)])
    if attention == "the model's":
        model = llama()
        model.set_attn_implementation("eager")
        adapter = ModelAdapter(model)
    stored, deviations = reused_rows(adapter, 1), some_deviations(adapter)
    is_key = torch.tensor([True, True, False, False]).repeat(adapter.num_layers)  # two heads of keys, two of values
    if part != "both":
        deviations[:, is_key if part == "values" else ~is_key] = 0
    got = expected_error(adapter, buffers_with(adapter, stored), ids, deviations, adapter.num_layers, queries)
    plain = [(k.double().numpy(), v.double().numpy()) for k, v in stored]
    wanted = PlainLlama(adapter.model).forward(
        ids.tolist(), COMPUTED, plain, queries=queries, deviations=deviations.double().numpy()
    )
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), wanted.error, rtol=1e-4, atol=1e-6)
    assert (got[COMPUTED] == 0).all()
    assert got.max() > 0.01


def test_first_layers_alone_see_their_own_deviations_alone() -> None:
    adapter, ids = tiny(), torch.tensor([BOS, *range(20, 20 + LENGTH - 1)])
    stored, deviations = reused_rows(adapter, 2), some_deviations(adapter)
    first = deviations.clone()
    first[:, 4:] = 0
    one = expected_error(adapter, buffers_with(adapter, stored), ids, deviations, 1, 9)
    whole = expected_error(adapter, buffers_with(adapter, stored), ids, first, adapter.num_layers, 9)
    torch.testing.assert_close(one, whole)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=ids_of(FAMILIES))
def test_every_family_by_its_own_numbers(family: Family) -> None:
    """Over exact rows, so that everything in the formula is what the model itself computes in a full prefill."""
    adapter = adapter_of(family.name)
    ids, queries = torch.tensor([BOS, *random_ids(LENGTH - 1, 7)]), 5
    cache_, asked = DynamicCache(), {}
    names = [t.query_module for t in adapter.taps]
    with taps.tapped(adapter.attentions, names, lambda layer, out: asked.__setitem__(layer, out)):
        hidden = adapter.view(
            input_ids=ids[None],
            use_cache=True,
            output_hidden_states=True,
            **{adapter.model_forward.cache_argument: cache_},
        ).hidden_states
    exact = [(entry.keys[0].transpose(0, 1), entry.values[0].transpose(0, 1)) for entry in cache_.layers]

    def filled() -> KVBuffers:
        buffers = adapter.new_buffers(LENGTH)
        for layer, (keys, values) in enumerate(exact):
            for rows, full in ((buffers.key_rows[layer], keys), (buffers.value_rows[layer], values)):
                rows.copy_(full)
                rows[COMPUTED] = float("nan")
        return buffers

    chosen, seen = torch.tensor(COMPUTED), {}
    probe = ProbePass(ids[chosen], chosen, filled(), adapter.num_layers, queries, nothing)
    adapter.observe_attention(probe, seen.__setitem__)
    deviations = some_deviations(adapter, 3)
    got = expected_error(adapter, filled(), ids, deviations, adapter.num_layers, queries)

    wanted, column = torch.zeros(LENGTH, dtype=torch.float64), 0
    tables, last = adapter.rotary_tables(LENGTH), chosen[-queries:]
    for layer, spec in enumerate(adapter.layers):
        weights = seen[layer].double()  # [heads, queries, length]
        heads = weights.shape[0]
        query = adapter.rotate(layer, adapter.taps[layer].query(asked[layer])[0, last], last, tables).double()
        scale = getattr(adapter.attentions[layer], "scaling", spec.head_dim**-0.5)
        weight = output_heads(adapter.attentions[layer], heads, spec.v_head_dim)
        assert weight is not None
        gains = gain(weight).double()
        lengths = hidden[layer][0, last].double().norm(dim=-1)
        for g in range(heads):
            h = g // (heads // spec.heads)
            values = exact[layer][1][:, h].double()
            off_k, off_v = (deviations[:, column + n * spec.heads + h].double() for n in range(2))
            apart = (values[None] - (weights[g] @ values)[:, None]).norm(dim=-1)  # [queries, length]
            by_key = query[:, g].norm(dim=-1)[:, None] * apart * off_k * gains[g] * scale / spec.head_dim**0.5
            wanted += (weights[g] / lengths[:, None] * (off_v + by_key)).sum(0)
        column += 2 * spec.heads
    torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=1e-5)


def new_rows() -> Tensor:
    """Rows of a new passage between two chunks, of which nothing is known."""
    return (torch.arange(LENGTH) >= 72) & (torch.arange(LENGTH) < 90)


@pytest.mark.parametrize(
    ("family", "queries", "new"),
    [
        (family, queries, new)
        for family in FAMILIES
        for queries, new in (
            ((5, False), (200, False), (5, True), (200, True))
            if family.name in ("llama", "gemma2")
            else ((5, len(family.name) % 2 == 0),)
        )
    ],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
def test_a_shortlist_hides_the_other_rows_of_every_family(
    family: Family, queries: int, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a forward in which all rows stay, and the masks are filled by hand: behind the first layer, and for new passages before it."""
    adapter = adapter_of(family.name)
    ids, chosen = torch.tensor([BOS, *random_ids(LENGTH - 1, 7)]), torch.tensor(COMPUTED)
    stored, deviations = reused_rows(adapter, 5), some_deviations(adapter, 6)
    among, count = torch.ones(LENGTH, dtype=torch.bool), 20
    among[COMPUTED] = False
    among[70:] = False  # rows that are never hidden, such as those of a prefix that was kept
    left_out = new_rows() if new else None
    found: list[Tensor] = []
    buffers = buffers_with(adapter, stored)
    if new:
        for rows in (*buffers.key_rows, *buffers.value_rows):
            rows[new_rows()] = float("nan")

    def before(layer: int) -> None:
        assert len(found) == (layer > 0), "it is known before the rows of the second layer are asked for"
        if layer:
            for rows in (buffers.key_rows[layer], buffers.value_rows[layer]):
                rows[~found[0]] = float("nan")  # never brought

    shortlist = Shortlist(1, count, among, found.append)
    probe = ProbePass(ids[chosen], chosen, buffers, adapter.num_layers, queries, before, shortlist, left_out)
    got = adapter.expected_error(probe, deviations)

    first = expected_error(adapter, buffers_with(adapter, stored), ids, deviations, 1, queries, left_out)
    best = sorted(among.nonzero()[:, 0].tolist(), key=lambda j: (-float(first[j]), j))[:count]
    hidden = among.clone()
    hidden[best] = False
    if left_out is not None:
        assert not got[left_out].any()
        hidden |= left_out
    assert torch.equal(found[0], ~hidden)
    assert probe.shortlisted == int(found[0].sum())

    masks_made: list[Tensor] = []
    build, allowed, narrowed = masks.build, masks.allowed, list[bool]()
    never = torch.zeros(LENGTH).bool() if left_out is None else left_out

    def noted(*args: Any) -> Any:
        made = build(*args)
        masks_made.extend(made.values() if isinstance(made, dict) else [made])
        return made

    def without_hidden(*args: Any) -> Tensor:
        return allowed(*args) & ~hidden if narrowed else allowed(*args) & ~never

    def fill(layer: int) -> None:
        for mask in masks_made:
            mask[..., hidden if layer else never] = torch.finfo(mask.dtype).min
        if layer == 1:
            narrowed.append(True)

    monkeypatch.setattr(masks, "build", noted)
    monkeypatch.setattr(masks, "allowed", without_hidden)
    monkeypatch.setattr(watch.Watch, "_columns_clear", lambda self, mask: 0)
    whole = ProbePass(
        ids[chosen], chosen, buffers_with(adapter, stored), adapter.num_layers, queries, lambda layer: None
    )
    tapped = taps.inputs_tapped(adapter.decoder_layers, lambda layer, hidden: fill(layer))
    with tapped:
        wanted = adapter.expected_error(whole, deviations)
    assert narrowed
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    if adapter.num_layers > 1:
        assert torch.equal(got[hidden], first[hidden]), "they keep what the first layer gave them"


def shortlisted(adapter: ModelAdapter, found: Callable[[Tensor], None], layers: int = 3) -> ProbePass:
    ids, chosen, among = (
        torch.tensor([BOS, *range(20, 20 + LENGTH - 1)]),
        torch.tensor(COMPUTED),
        torch.ones(LENGTH).bool(),
    )
    among[COMPUTED] = False
    buffers = buffers_with(adapter, reused_rows(adapter, 1))
    return ProbePass(ids[chosen], chosen, buffers, layers, 9, nothing, Shortlist(1, 30, among, found))


@pytest.mark.parametrize("attention", ["written out", "the model's"])
def test_rows_that_are_left_out_receive_no_attention(attention: str) -> None:
    """They hold NaN, and the others receive what they do where these have no weight."""
    model = llama()
    if attention == "the model's":
        model.set_attn_implementation("eager")
    adapter, stored, left_out = ModelAdapter(model), reused_rows(tiny(), 1), new_rows()
    ids, chosen = torch.tensor([BOS, *range(20, 20 + LENGTH - 1)]), torch.tensor(COMPUTED)
    buffers, seen = buffers_with(adapter, stored), dict[int, Tensor]()
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows[left_out] = float("nan")
    probe = ProbePass(ids[chosen], chosen, buffers, adapter.num_layers, 6, nothing, left_out=left_out)
    received = adapter.received_attention(probe)
    adapter.observe_attention(probe, seen.__setitem__)
    deviations = some_deviations(adapter)
    assert not adapter.expected_error(probe, deviations)[left_out].any()
    plain = [(k.double().numpy(), v.double().numpy()) for k, v in stored]
    wanted = PlainLlama(adapter.model).forward(
        ids.tolist(),
        COMPUTED,
        plain,
        queries=6,
        deviations=deviations.double().numpy(),
        left_out=left_out.nonzero()[:, 0].tolist(),
    )
    np.testing.assert_allclose(adapter.expected_error(probe, deviations).numpy(), wanted.error, rtol=1e-4, atol=1e-6)
    assert not received[left_out].any()
    torch.testing.assert_close(received.sum(), torch.tensor(float(adapter.num_layers)))
    torch.testing.assert_close(torch.stack(list(seen.values())).mean((1, 2)).sum(0), received)
    assert seen[0].shape[2] == LENGTH


def test_scores_that_workers_add_up_in_place_are_counted_once() -> None:
    """A worker's sum may be written to the memory that it gave. The first layers' scores must not hold the other workers' parts from then on."""

    class InPlace(Heads):
        """One of two workers with the same scores."""

        def total(self, numbers: Tensor) -> Tensor:
            return numbers.mul_(2)

    adapter, deviations = ModelAdapter(llama()), some_deviations(tiny())
    found: list[Tensor] = []
    wanted = adapter.expected_error(shortlisted(adapter, found.append), deviations)
    adapter.heads = InPlace()
    got = adapter.expected_error(shortlisted(adapter, found.append), deviations)
    assert torch.equal(*found)
    torch.testing.assert_close(got, 2 * wanted)


def test_where_masks_are_not_given_by_name_every_layer_looks_at_all_rows() -> None:
    adapter, deviations = ModelAdapter(llama()), some_deviations(tiny())

    def by_place(_module: Any, _args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(kwargs.pop(name) for name in ("hidden_states", "position_embeddings", "attention_mask")), kwargs

    for attention in adapter.attentions:
        attention.register_forward_pre_hook(by_place, with_kwargs=True)
    found: list[Tensor] = []
    with pytest.raises(MasksNotNamedError):  # rows that nobody has computed would be looked at
        adapter.expected_error(replace(shortlisted(adapter, found.append), left_out=new_rows()), deviations)
    got = adapter.expected_error(shortlisted(adapter, found.append), deviations)
    assert not found
    torch.testing.assert_close(
        got, adapter.expected_error(replace(shortlisted(adapter, found.append), shortlist=None), deviations)
    )


@pytest.mark.parametrize("look", ["expected error", "received attention"])
def test_without_positions_only_what_a_row_holds_counts(look: str) -> None:
    """Rows of chunks in another order have the same errors (attention) in that order, if keys don't know where they stand."""
    model, ids = llama(), torch.tensor([BOS, *range(20, 20 + LENGTH - 1)])
    model.model.rotary_emb.inv_freq.zero_()
    adapter = ModelAdapter(model)
    adapter.rotary.rotated = [False] * adapter.num_layers
    computed = [0, 1, 2, *range(111, LENGTH)]
    order = torch.arange(LENGTH)
    order[3:111] = torch.cat((torch.arange(60, 111), torch.arange(3, 60)))
    stored, deviations, chosen = reused_rows(adapter, 4), some_deviations(adapter), torch.tensor(computed)

    def error(rows: Tensor) -> Tensor:
        buffers = adapter.new_buffers(LENGTH)
        for layer, (keys, values) in enumerate(stored):
            buffers.key_rows[layer].copy_(keys[rows])
            buffers.value_rows[layer].copy_(values[rows])
        probe = ProbePass(ids[chosen], chosen, buffers, adapter.num_layers, 9, nothing)
        if look == "received attention":
            return adapter.received_attention(probe)
        return adapter.expected_error(probe, deviations[rows])

    torch.testing.assert_close(error(order), error(torch.arange(LENGTH))[order], rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    adapter, ids = tiny(), torch.tensor([BOS, *range(20, 20 + LENGTH - 1)])
    modules = [*adapter.model.modules(), *adapter.view.modules()]

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()

    def fail(layer: int) -> None:
        raise RuntimeError("the rows of a layer could not be loaded")

    chosen = torch.tensor(COMPUTED)
    buffers = buffers_with(adapter, reused_rows(adapter, 1))
    with pytest.raises(RuntimeError, match="could not be loaded"):
        adapter.expected_error(ProbePass(ids[chosen], chosen, buffers, 3, 9, fail), some_deviations(adapter))
    expected_error(adapter, buffers_with(adapter, reused_rows(adapter, 1)), ids, some_deviations(adapter), 3, 9)
    assert hooks() == before


def test_deviations_of_another_model_are_refused() -> None:
    adapter, ids = tiny(), torch.tensor([BOS, *range(20, 20 + LENGTH - 1)])
    buffers = buffers_with(adapter, reused_rows(adapter, 1))
    with pytest.raises(ValueError, match=r"10 columns.*12"):
        expected_error(adapter, buffers, ids, torch.zeros(LENGTH, 10), 3, 9)


@pytest.mark.parametrize("family", FAMILIES, ids=ids_of(FAMILIES))
def test_fresh_states_are_those_of_full_prefill(family: Family) -> None:
    adapter = adapter_of(family.name)
    ids = torch.tensor([BOS, *random_ids(LENGTH - 1, 9)])
    _, wanted = adapter.full_forward(ids)
    for layer in (0, 1, adapter.num_layers - 1):
        keys, values = adapter.fresh_states(ids, layer)
        torch.testing.assert_close(keys, wanted.layers[layer].keys[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, wanted.layers[layer].values[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
