"""Every family against its own full prefill: capture, rotation, the selective forward, decoding, refusals.

The references are transformers' own calls, never the adapter's. Prompts are several sliding windows long, span
several blocks of the blocked attention, and are beyond the original length of the long-rope row.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import BOS, FAMILIES, REFUSALS, WINDOW, Family, Refusal, ids_of, model_of, random_ids
from families import family as family_of
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_store.codecs import get_codec

LENGTH = 150
"""Tokens of a prompt: nine windows, two blocks of attention and a bit."""
CHUNK = 90
QUERY = 9


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def adapter_of(name: str) -> ModelAdapter:
    return ModelAdapter(model_of(name))


@pytest.fixture(params=FAMILIES, ids=ids_of(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def adapter(family: Family) -> ModelAdapter:
    return adapter_of(family.name)


@pytest.fixture
def model(family: Family) -> PreTrainedModel:
    return model_of(family.name)


def prompt_of(length: int, seed: int = 0) -> Tensor:
    return torch.tensor([BOS, *random_ids(length - 1, seed)])


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the last token, [1, vocab], without any cache."""
    return model(input_ids=ids[None], use_cache=False).logits[:, -1]


@torch.no_grad()
def reference_cache(model: PreTrainedModel, ids: Tensor, start: int = 0) -> DynamicCache:
    """The keys and values that the model itself caches when `ids` stand at `start`, `start` + 1, ..."""
    kv = DynamicCache()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    positions = torch.arange(start, start + len(ids))[None]
    model(input_ids=ids[None], position_ids=positions, use_cache=True, **{name: kv})
    return kv


def poisoned(adapter: ModelAdapter, length: int) -> KVBuffers:
    buffers = adapter.new_buffers(length)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.fill_(float("nan"))
    return buffers


def fill(buffers: KVBuffers, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
    """Rows k, v [tokens, heads, dim] of one layer to `places`."""
    buffers.key_rows[layer][places] = k
    buffers.value_rows[layer][places] = v


def prefilled(adapter: ModelAdapter, kv: DynamicCache, length: int, places: Tensor) -> KVBuffers:
    """Buffers with the rows of `kv` at `places` and NaN everywhere else."""
    buffers = poisoned(adapter, length)
    for layer, entry in enumerate(kv.layers):
        k, v = entry.keys[0].transpose(0, 1), entry.values[0].transpose(0, 1)
        fill(buffers, layer, places, k[places], v[places])
    return buffers


def chunk_behind_lead_in(adapter: ModelAdapter, ids: Tensor, size: int = CHUNK) -> tuple[Tensor, Tensor, KVBuffers]:
    """`ids` = lead-in token, chunk, query. Returns what is recomputed (ids, positions), and the chunk in its place."""
    chunk = ids[1 : 1 + size]
    (captured,) = adapter.capture([chunk.tolist()], ids[:1].tolist())
    places = torch.arange(1, 1 + size)
    buffers, tables = poisoned(adapter, len(ids)), adapter.rotary_tables(len(ids))
    for layer, (k, v) in enumerate(captured.layers):
        fill(buffers, layer, places, adapter.rotate(layer, k, places, tables), v)
    chosen = torch.cat((torch.tensor([0]), torch.arange(1 + size, len(ids))))
    return ids[chosen], chosen, buffers


def assert_close(got: Tensor, wanted: Tensor, family: Family) -> None:
    # Not torch.allclose: a NaN has to be named as what it is.
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all(), f"{family.name}: logits are not finite: poison got through"
    error = (got - wanted).abs().max().item()
    assert error <= family.tolerance, f"{family.name}: logits differ by {error:.2e} > {family.tolerance:.0e}"


# -- full recompute, and its building blocks -----------------------------------------------------------------------


def test_full_forward_is_the_models_own(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    ids = prompt_of(LENGTH)
    logits, kv = adapter.full_forward(ids)
    assert_close(logits, reference_logits(model, ids), family)
    assert kv.get_seq_length() == LENGTH
    assert {entry.keys.shape[2] for entry in kv.layers} == {LENGTH}  # sliding layers keep every row


@pytest.mark.parametrize("length", [1, WINDOW, 64, 65, LENGTH])
def test_recomputing_everything_is_full_prefill(
    family: Family, adapter: ModelAdapter, model: PreTrainedModel, length: int
) -> None:
    ids, buffers = prompt_of(length, seed=length), poisoned(adapter, length)
    logits = adapter.selective_forward(ids, torch.arange(length), buffers)
    assert_close(logits, reference_logits(model, ids), family)
    wanted = reference_cache(model, ids)
    for layer, entry in enumerate(wanted.layers):
        torch.testing.assert_close(buffers.keys(layer), entry.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(buffers.values(layer), entry.values, rtol=1e-4, atol=1e-4)


def test_chunk_behind_its_lead_in_is_full_prefill(
    family: Family, adapter: ModelAdapter, model: PreTrainedModel
) -> None:
    ids = prompt_of(1 + CHUNK + QUERY)
    logits = adapter.selective_forward(*chunk_behind_lead_in(adapter, ids))
    assert_close(logits, reference_logits(model, ids), family)


@pytest.mark.parametrize("size", [1, WINDOW - 1, 40])
def test_short_chunk_in_a_long_prompt(family: Family, adapter: ModelAdapter, model: PreTrainedModel, size: int) -> None:
    ids = prompt_of(LENGTH, seed=size)
    logits = adapter.selective_forward(*chunk_behind_lead_in(adapter, ids, size))
    assert_close(logits, reference_logits(model, ids), family)


def test_only_long_rope_needs_long_prompts(family: Family, adapter: ModelAdapter) -> None:
    assert adapter.reuse_beyond == (64 if family.name == "phi3-longrope" else 0)


@pytest.mark.parametrize("length", [58, 70])
def test_several_tokens_at_once_go_on_as_one_after_another_does(
    family: Family, adapter: ModelAdapter, length: int
) -> None:
    """Also where they pass the boundary of the long-rope model, or end at it."""
    ids = torch.tensor(random_ids(length + 20, seed=length))
    for count in (6, 20):
        said = ids[length : length + count]
        together, one_by_one = (adapter.full_forward(ids[:length])[1] for _ in range(2))
        step = adapter.steps(one_by_one)
        for token in said.tolist():
            expected = step(token)
        assert_close(adapter.go_on(said, together), expected, family)
        assert together.get_seq_length() == length + count


def test_one_token_query(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    ids = prompt_of(1 + CHUNK + 1, seed=5)
    logits = adapter.selective_forward(*chunk_behind_lead_in(adapter, ids))
    assert_close(logits, reference_logits(model, ids), family)


# -- any selection -------------------------------------------------------------------------------------------------


def _random_places(seed: int) -> Tensor:
    """A random set of the places 0..LENGTH-2, and the last one, which is always computed; ascending."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((), generator=generator)
    chosen = torch.rand(LENGTH, generator=generator) < share
    chosen[-1] = True
    return chosen.nonzero()[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_any_selection_over_exact_rows_is_full_prefill(
    family: Family, adapter: ModelAdapter, model: PreTrainedModel, seed: int
) -> None:
    ids, chosen = prompt_of(LENGTH, seed), _random_places(seed)
    rest = torch.tensor(sorted(set(range(LENGTH)) - set(chosen.tolist())))
    # NaN at the chosen places: their rows must be written before they are attended to, in every layer.
    buffers = prefilled(adapter, reference_cache(model, ids), LENGTH, rest)
    logits = adapter.selective_forward(ids[chosen], chosen, buffers)
    assert_close(logits, reference_logits(model, ids), family)


def test_rows_may_arrive_as_late_as_their_layer(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    ids, chosen, layers = prompt_of(LENGTH, 1), _random_places(1), []
    rest = torch.tensor(sorted(set(range(LENGTH)) - set(chosen.tolist())))
    kv, buffers = reference_cache(model, ids), poisoned(adapter, LENGTH)

    def before(layer: int) -> None:
        layers.append(layer)
        entry = kv.layers[layer]
        k, v = entry.keys[0].transpose(0, 1), entry.values[0].transpose(0, 1)
        fill(buffers, layer, rest, k[rest], v[rest])

    logits = adapter.selective_forward(ids[chosen], chosen, buffers, before)
    assert layers == list(range(adapter.num_layers))
    assert_close(logits, reference_logits(model, ids), family)


@pytest.mark.parametrize("mistake", ["swapped keys", "one place off"])
def test_a_mistake_shows(family: Family, adapter: ModelAdapter, model: PreTrainedModel, mistake: str) -> None:
    """The opposite check: what the tests above rule out moves these logits, so they can fail."""
    ids = prompt_of(1 + CHUNK + QUERY)
    chosen_ids, chosen, buffers = chunk_behind_lead_in(adapter, ids)
    chunk = torch.arange(1, 1 + CHUNK)
    if mistake == "swapped keys":
        for rows in buffers.key_rows:  # of keys alone: attention doesn't mind where a key and its value stand
            rows[chunk] = rows[chunk].flip(0)
    else:
        (captured,) = adapter.capture([ids[chunk].tolist()], [BOS])
        tables = adapter.rotary_tables(len(ids) + 1)
        for layer, (k, v) in enumerate(captured.layers):
            fill(buffers, layer, chunk, adapter.rotate(layer, k, chunk + 1, tables), v)
    logits = adapter.selective_forward(chosen_ids, chosen, buffers)
    assert (logits - reference_logits(model, ids)).abs().max() > 1000 * family.tolerance


SLIDING = tuple(f for f in FAMILIES if f.sliding)


@pytest.mark.parametrize("row", SLIDING, ids=ids_of(SLIDING))
def test_windows_show(row: Family) -> None:
    """The same weights under a window that holds the whole prompt give other logits: prompts are long enough."""
    ids = prompt_of(1 + CHUNK + QUERY)
    wide = replace(row, config=row.config | {"sliding_window": LENGTH}).build()
    assert (reference_logits(wide, ids) - reference_logits(row.build(), ids)).abs().max() > 0.01


def test_a_window_that_the_architecture_does_not_apply_is_not_applied() -> None:
    """A Mistral converted to Llama keeps its config's window, which Llama's code doesn't know."""
    plain = family_of("llama")
    stray = replace(plain, config=plain.config | {"sliding_window": WINDOW})
    ids = prompt_of(LENGTH)
    adapter = ModelAdapter(stray.build())
    logits = adapter.selective_forward(ids, torch.arange(LENGTH), poisoned(adapter, LENGTH))
    assert_close(logits, reference_logits(plain.build(), ids), stray)


def test_forward_leaves_the_model_as_it_was(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    def settings() -> list[tuple[str, int]]:
        return [
            (each.config._attn_implementation, sum(len(m._forward_hooks) for m in each.modules()))
            for each in (model, adapter.view)
        ]

    before = settings()
    ids = prompt_of(LENGTH)
    wanted = reference_logits(model, ids)

    def fail(layer: int) -> None:
        raise RuntimeError("the rows of a layer could not be loaded")

    adapter.capture([ids[1:].tolist()], ids[:1].tolist())
    with pytest.raises(RuntimeError, match="could not be loaded"):
        adapter.selective_forward(ids, torch.arange(LENGTH), poisoned(adapter, LENGTH), fail)
    assert settings() == before
    assert torch.equal(reference_logits(model, ids), wanted)


# -- capture, storage, rotation --------------------------------------------------------------------------------------


def _stored(adapter: ModelAdapter, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """To bytes and back, as the exact codec stores them."""
    codec, spec = get_codec("exact"), adapter.layers[layer]
    return codec.decode(codec.encode(k, v).clone(), spec, adapter.dtype)


@pytest.mark.parametrize("lead_in", [1, 40, 170])
def test_stored_keys_rotate_to_the_models_own(
    family: Family, adapter: ModelAdapter, model: PreTrainedModel, lead_in: int
) -> None:
    """All layers, bit for bit; a longer lead-in makes for other positions, among them those beyond any window."""
    ids = prompt_of(lead_in + CHUNK, seed=lead_in)
    (captured,) = adapter.capture([ids[lead_in:].tolist()], ids[:lead_in].tolist())
    places, tables = torch.arange(lead_in, len(ids)), adapter.rotary_tables(len(ids))
    for layer, (entry, kv) in enumerate(zip(reference_cache(model, ids).layers, captured.layers, strict=True)):
        k, v = _stored(adapter, layer, *kv)
        assert torch.equal(adapter.rotate(layer, k, places, tables), entry.keys[0, :, lead_in:].transpose(0, 1))
        assert torch.equal(v, entry.values[0, :, lead_in:].transpose(0, 1))


@pytest.mark.parametrize("start", [3, 77, 300])
def test_stored_keys_move_to_any_place(
    family: Family, adapter: ModelAdapter, model: PreTrainedModel, start: int
) -> None:
    """The same tokens, run at other positions by the model itself.

    Layer 0 sees the same input there, so its keys agree to the bit. In deeper layers the model's own attention
    rounds differently at other positions.
    """
    ids = prompt_of(1 + CHUNK)
    (captured,) = adapter.capture([ids[1:].tolist()], [BOS])
    places, length = torch.arange(start + 1, start + len(ids)), start + len(ids)
    native, tables = reference_cache(model, ids, start), adapter.rotary_tables(length)
    for layer, (entry, kv) in enumerate(zip(native.layers, captured.layers, strict=True)):
        k, _ = _stored(adapter, layer, *kv)
        got, wanted = adapter.rotate(layer, k, places, tables), entry.keys[0, :, 1:].transpose(0, 1)
        if layer == 0:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_chunks_captured_together_are_those_captured_alone(family: Family, adapter: ModelAdapter) -> None:
    chunks = [random_ids(n, seed=n) for n in (1, 37, 64, 5)]
    together = adapter.capture(chunks, [BOS])
    assert [c.tokens for c in together] == [len(c) for c in chunks]
    for chunk, captured in zip(chunks, together, strict=True):
        (alone,) = adapter.capture([chunk], [BOS])
        for layer, (got, wanted) in enumerate(zip(captured.layers, alone.layers, strict=True)):
            spec = adapter.layers[layer]
            assert got[0].shape == (len(chunk), spec.heads, spec.head_dim)
            assert got[1].shape == (len(chunk), spec.heads, spec.v_head_dim)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_heads_are_the_key_value_heads(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    for spec, entry in zip(adapter.layers, reference_cache(model, prompt_of(9)).layers, strict=True):
        assert (spec.heads, spec.head_dim) == (entry.keys.shape[1], entry.keys.shape[3])
        assert spec.v_head_dim == entry.values.shape[3]


# -- decoding ----------------------------------------------------------------------------------------------------------


def _greedy(adapter: ModelAdapter, logits: Tensor, kv: DynamicCache, count: int) -> list[int]:
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(adapter.forward(torch.tensor(tokens[-1:]), kv).argmax()))
    return tokens


def _generated(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    out = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], do_sample=False, max_new_tokens=count)
    return out[0, len(ids) :].tolist()


def test_decoding_goes_on_as_generate_does(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    ids, buffers = prompt_of(LENGTH, seed=2), poisoned(adapter, LENGTH)
    logits = adapter.selective_forward(ids, torch.arange(LENGTH), buffers)
    count = WINDOW + 4  # past a window of new tokens
    assert _greedy(adapter, logits, buffers.to_cache(), count) == _generated(model, ids, count)


def test_decoding_goes_on_after_reuse(family: Family, adapter: ModelAdapter, model: PreTrainedModel) -> None:
    ids = prompt_of(1 + CHUNK + QUERY, seed=3)
    chosen_ids, chosen, buffers = chunk_behind_lead_in(adapter, ids)
    logits = adapter.selective_forward(chosen_ids, chosen, buffers)
    assert _greedy(adapter, logits, buffers.to_cache(), 8) == _generated(model, ids, 8)


# -- what the probe sees ---------------------------------------------------------------------------------------------


def test_observed_attention_is_the_models_own(family: Family, adapter: ModelAdapter) -> None:
    """Against the weights that eager attention returns, whose learned sinks and caps the adapter leaves out."""
    ids, chosen, seen = prompt_of(LENGTH, 1), _random_places(1), {}
    eager = family.build()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        native = eager(input_ids=ids[None], output_attentions=True, use_cache=False).attentions
    rest = torch.tensor(sorted(set(range(LENGTH)) - set(chosen.tolist())))
    buffers = prefilled(adapter, reference_cache(eager, ids), LENGTH, rest)
    queries = min(5, len(chosen))
    wanted_layers = adapter.num_layers - 1
    probe = ProbePass(ids[chosen], chosen, buffers, wanted_layers, queries, before=lambda layer: None)
    adapter.observe_attention(probe, seen.__setitem__)
    assert sorted(seen) == list(range(wanted_layers))
    for layer, weights in seen.items():
        wanted = native[layer][0][:, chosen[-queries:]]
        if family.model_type == "gemma2":  # its cap is monotonic: the order of keys within a row is the same
            assert torch.equal(weights.argmax(-1), wanted.argmax(-1))
            continue
        wanted = wanted / wanted.sum(-1, keepdim=True)  # sinks take a share of every row
        torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", REFUSALS, ids=ids_of(REFUSALS))
def test_refused(row: Refusal) -> None:
    model = row.build()
    with pytest.raises(UnsupportedModelError) as caught:
        ModelAdapter(model)
    message = str(caught.value)
    assert type(model).__name__ in message
    assert re.search(row.reason, message, re.IGNORECASE), message


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_kernels_that_take_no_mask_give_way_to_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family beyond sdpa (soft-capping, sinks) whose full prefill runs in some other kernel."""
    seen: list[str] = []
    model = family_of(name).build()
    adapter, ids = ModelAdapter(model), prompt_of(LENGTH)
    wanted = reference_logits(model, ids)
    adapter.view.config._attn_implementation = "flash_attention_2"
    switch = adapter.view.set_attn_implementation
    monkeypatch.setattr(
        adapter.view,
        "set_attn_implementation",
        lambda kind: seen.append(kind) if kind == "flash_attention_2" else [seen.append(kind), switch(kind)],
    )
    logits = adapter.selective_forward(ids, torch.arange(LENGTH), poisoned(adapter, LENGTH))
    assert seen == ["eager", "flash_attention_2"]
    assert_close(logits, wanted, family_of(name))
