"""The default scheme in the engine: expected error and chunk shift over chunks that were captured behind several lead-ins."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_llama import PlainLlama
from plain_sentences import chosen
from tiny import llama, tokenizer
from torch import Tensor

from cachetune_rag import CacheTune, Document
from cachetune_rag.model import KVBuffers
from cachetune_rag.model.heads import ALL_HEADS
from cachetune_rag.report import Report
from cachetune_rag.reuse import selection_context
from cachetune_rag.reuse.config import AUTO
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.selection_context import PromptView
from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_rag.selection.expected_error import ExpectedErrorSelector
from cachetune_rag.selection.frequency import FrequencySelector
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_rag.text.prompts.sentences import Sentences
from cachetune_store import ChunkReader, LayerSpec, get_codec
from cachetune_store.readers import HostReader

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
QUERY = "How many steps are there?"


LEADS = [
    [1, *tokenizer()(text).input_ids] for text in ("Of lamps", "and stairs, many", "in the north", "a winter's log")
]


def fresh(**options: Any) -> CacheTune:
    return CacheTune(llama(), tokenizer(), **{"lead_in": LEADS, **options})


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with fresh() as made:
        made.precompute([Document("a", CHUNKS)])
        yield made


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def stored_rows(engine: CacheTune, prompt: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Of every token of the prompt, as the store has them and in NumPy: keys before rotation and values of each layer, and
    deviations; 0 for what isn't stored.
    """
    specs, length = engine.adapter.layers, len(prompt.ids)
    rows = [tuple(np.zeros((length, s.heads, d)) for d in (s.head_dim, s.v_head_dim)) for s in specs]
    deviations = np.zeros((length, 2 * sum(s.heads for s in specs)))
    for span in prompt.spans:
        with engine.store.open(engine.runtime.assembler.key(prompt.chunk_ids[span.chunk])) as reader:
            assert reader.deviations is not None
            deviations[span.start : span.end] = reader.deviations.double().numpy()
            places = span.start + reader.order.numpy()
            for layer, (keys, values) in enumerate(rows):
                encoded = reader.read(layer, reader.layout.tokens)
                keys[places], values[places] = get_codec("exact").decode(encoded, specs[layer], torch.float32)
    return rows, deviations


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of any length have a shortlist."""
    for name in ("expected_error", "expected_error_tokens"):
        monkeypatch.setattr(get_selector(name), "least", 1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2, 2, 0]])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("selector", ["expected_error", "expected_error_tokens"])
@pytest.mark.usefixtures("short")
def test_a_request_equals_a_float64_reference(engine: CacheTune, selector: str, order: list[int], ratio: float) -> None:
    """Score, selection, shift and recompute, from the stored rows to the logits."""
    check(engine, engine.prompts.build(query=QUERY, chunks=[CHUNKS[i] for i in order]), ratio, [], selector)


@pytest.mark.parametrize("new", [(0,), (1,), (1, 2), (3,), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.9])
@pytest.mark.usefixtures("short")
def test_new_passages_are_computed_once(
    engine: CacheTune, new: Sequence[int], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look leaves out those behind the first reused chunk, and what it computes of the others is final."""
    monkeypatch.setattr(selection_context, "BEHIND", 64)
    whole = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    prompt = replace(whole, spans=tuple(span for span in whole.spans if span.chunk not in new))
    first, end = prompt.spans[0].start, prompt.spans[-1].end
    length, tokens = len(prompt.ids), sum(span.end - span.start for span in prompt.spans)
    gaps = [(a.end, b.start) for a, b in pairwise(prompt.spans) if b.start - a.end > 64]
    left_out = [j for a, b in [*gaps, (end, length - 64)] for j in range(a, b)]
    assert bool(left_out) == (new != (0,))
    looked = length - tokens - len(left_out)
    layers = engine.adapter.num_layers
    for kept in (0, first):
        report = check(engine, prompt, ratio, left_out)
        assert report.prefix_kept == kept
        assert report.computed == length - kept - report.reused
        assert report.probed == (looked - kept) * layers


def test_tokens_before_the_first_reused_chunk_are_computed_by_the_look_alone(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS, prefix="Read:")
    ran: list[list[int]] = []
    forward = engine.adapter.selective_forward
    monkeypatch.setattr(
        engine.adapter, "selective_forward", lambda *args: ran.append(args[1].tolist()) or forward(*args)
    )
    # The second one looks at a part of the layers, so the others of these rows aren't there yet.
    for selector, least in (("expected_error", prompt.spans[0].start), ("expected_error_early", 0)):
        engine.runtime.assembler.forget()  # no beginning is kept
        state = engine.prefill(prompt=prompt, ratio=0.1, selector=selector)
        first = ran.pop()[0]
        assert first >= least if least else first == 0
        assert state.report.prefix_kept == 0
        assert state.report.computed - state.report.recomputed == len(prompt.ids) - sum(map(len, CHUNKS))


def check(
    engine: CacheTune, prompt: Prompt, ratio: float, left_out: Sequence[int], selector: str = "expected_error"
) -> Report:
    """A prompt by a selector whose look leaves out some places, against the reference."""
    spans = [(s.start, s.end) for s in prompt.spans]
    inside = {j for start, end in spans for j in range(start, end)}
    new = [j for j in range(len(prompt.ids)) if j not in inside]
    base = [j for j in new if j not in set(left_out)]
    queries = min(64, len(prompt.ids) - spans[-1][1])
    stored, deviations = stored_rows(engine, prompt)
    plain = PlainLlama(engine.adapter.model)
    # One layer of the three looks at all rows, the others at half of them or at twice those that are chosen.
    looked = max(-(-len(inside) // 2), 2 * int(ratio * len(inside) + 1e-9))
    shortlist = (1, looked, sorted(inside)) if looked < len(inside) else None
    error = plain.forward(
        prompt.ids, base, stored, queries=queries, deviations=deviations, shortlist=shortlist, left_out=left_out
    ).error
    count = int(ratio * len(inside) + 1e-9)
    best = sorted(inside, key=lambda j: (-error[j], j))[:count]
    if selector == "expected_error":
        best = chosen(prompt.ids, Sentences(engine.tokenizer)(prompt).tolist(), error, inside, count)
    rows = sorted([*new, *best])
    shifted = [(a, b) for a, b in spans if any(a <= j < b for j in best)]
    wanted = plain.forward(prompt.ids, rows, stored, shifted, 0.4)

    state = engine.prefill(prompt=prompt, ratio=ratio, selector=selector)
    np.testing.assert_allclose(state.logits[0].numpy(), wanted.logits, rtol=0, atol=1e-3)
    for layer, entry in enumerate(state.cache.layers):
        got = entry.keys[0].transpose(0, 1).numpy()
        np.testing.assert_allclose(got, wanted.keys[layer], rtol=0, atol=1e-3)
    return state.report


def test_it_is_the_default(engine: CacheTune) -> None:
    assert (AUTO.selector, AUTO.ratio) == ("expected_error", 0.15)
    report = engine.prefill(query=QUERY, chunks=CHUNKS).report
    assert (report.selector, report.ratio) == ("expected_error", 0.15)
    assert report.recomputed == int(0.15 * sum(map(len, CHUNKS)))


# -- invariants 1 to 3 ---------------------------------------------------------------------------------------------------


def test_recomputing_everything_is_full_prefill(engine: CacheTune) -> None:
    full = engine.full_prefill(query=QUERY, chunks=CHUNKS)
    assert difference(engine.prefill(query=QUERY, chunks=CHUNKS, ratio=1.0).logits, full.logits) <= 1e-5


def test_recomputing_nothing_moves_nothing(engine: CacheTune) -> None:
    ours = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.0)
    none = engine.prefill(query=QUERY, chunks=CHUNKS, selector="none")
    assert difference(ours.logits, none.logits) <= 1e-5
    assert ours.report.probed == 0


def test_what_is_exact_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk right behind its lead-in: recomputed rows differ from stored ones by rounding alone, so nothing moves."""
    monkeypatch.setattr(ChunkReader, "has_deviations", True)
    monkeypatch.setattr(
        HostReader, "deviations", property(lambda r: torch.rand(r.layout.tokens, r.layout.deviation_columns))
    )
    with fresh(prompt_template="<s>{prefix}{chunks}{query}", lead_in="first_token") as engine:
        engine.precompute(CHUNKS[0])
        full = engine.full_prefill(query=QUERY, chunks=CHUNKS[:1], prefix="")
        for ratio in (0, 0.1, 0.5, 0.9):
            state = engine.prefill(query=QUERY, chunks=CHUNKS[:1], prefix="", ratio=ratio)
            assert difference(state.logits, full.logits) <= 1e-4


ORDERS = [[0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 1, 1], [0, 3, 0], [], [2, 1]]


@pytest.mark.usefixtures("short")
def test_any_prompt_gives_what_a_fresh_engine_gives(engine: CacheTune) -> None:
    asks = [(query, [CHUNKS[i] for i in order]) for order in ORDERS for query in (QUERY, "?")]
    results = [engine.prefill(query=q, chunks=c, ratio=0.25).logits for q, c in asks]
    for (query, chunks), result in zip(asks, results, strict=True):
        with fresh() as other:
            other.precompute([Document("a", CHUNKS)])
            assert difference(other.prefill(query=query, chunks=chunks, ratio=0.25).logits, result) <= 1e-5


@pytest.mark.usefixtures("short")
def test_a_hundred_requests_leave_no_trace(engine: CacheTune) -> None:
    first = engine.prefill(query=QUERY, chunks=CHUNKS[:2], ratio=0.2).logits
    generator = random.Random(0)
    for _ in range(100):
        chunks = generator.choices(CHUNKS, k=generator.randrange(4))
        engine.prefill(query=generator.choice("?!x"), chunks=chunks, ratio=generator.random())
    assert difference(engine.prefill(query=QUERY, chunks=CHUNKS[:2], ratio=0.2).logits, first) <= 1e-5


@pytest.mark.usefixtures("short")
def test_a_missing_chunk_is_computed_exactly_and_moves_nothing() -> None:
    """Between two stored chunks; what is recomputed of those says nothing of it."""
    with fresh() as engine:
        engine.precompute([Document("a", [CHUNKS[0], CHUNKS[2]])])
        state = engine.prefill(query=QUERY, chunks=CHUNKS[:3], ratio=0.2)
        assert state.report.missed == len(CHUNKS[1])
        assert state.report.recomputed == int(0.2 * (len(CHUNKS[0]) + len(CHUNKS[2])))
    with fresh() as engine:
        state = engine.prefill(query=QUERY, chunks=CHUNKS[:3])
        full = engine.full_prefill(query=QUERY, chunks=CHUNKS[:3])
        assert torch.equal(state.logits, full.logits)


# -- the shift in a request ----------------------------------------------------------------------------------------------


def test_the_shift_moves_reused_rows_of_the_touched_chunks_alone(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    with_shift = engine.prefill(prompt=prompt, ratio=0.02).cache
    monkeypatch.setattr(ExpectedErrorSelector, "shift", 0.0)
    without = engine.prefill(prompt=prompt, ratio=0.02).cache
    moved = [
        (a.values - b.values).abs().amax((0, 1, 3)) > 1e-4
        for a, b in zip(with_shift.layers, without.layers, strict=True)
    ]
    recomputed = int(0.02 * sum(map(len, CHUNKS)))
    shares = [int(moved[1][s.start : s.end].sum()) / (s.end - s.start) for s in prompt.spans]
    assert not moved[0].any()  # the first layer sees the token alone: nothing to carry over
    assert 0 in shares
    assert max(shares) > 0.5
    for share, span in zip(shares, prompt.spans, strict=True):
        assert share == 0 or share >= 1 - recomputed / (span.end - span.start)


def test_a_shift_needs_the_stored_rows_of_what_is_recomputed(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a selector that looks at nothing, and whose rows stand last in the files: they must be read all the same."""
    monkeypatch.setattr(FrequencySelector, "shift", 0.4)
    made = engine.adapter.new_buffers

    def poisoned(length: int, *more: Any) -> KVBuffers:
        buffers = made(length, *more)
        for rows in (*buffers.key_rows, *buffers.value_rows):
            rows.fill_(float("nan"))
        return buffers

    monkeypatch.setattr(engine.adapter, "new_buffers", poisoned)
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    spans = [(s.start, s.end) for s in prompt.spans]
    rows = set(range(len(prompt.ids)))
    for span in prompt.spans:
        with engine.store.open(engine.runtime.assembler.key(prompt.chunk_ids[span.chunk])) as reader:
            count = int(0.2 * reader.layout.tokens)
            rows -= {span.start + int(j) for j in reader.order[: reader.layout.tokens - count]}
    stored, _ = stored_rows(engine, prompt)
    wanted = PlainLlama(engine.adapter.model).forward(prompt.ids, sorted(rows), stored, spans, 0.4)
    state = engine.prefill(prompt=prompt, ratio=0.2, selector="frequency")
    np.testing.assert_allclose(state.logits[0].numpy(), wanted.logits, rtol=0, atol=1e-3)


def test_without_deviations_nothing_is_shifted_and_attention_alone_decides(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChunkReader, "has_deviations", False)
    seen: list[Tensor | None] = []
    forward = engine.adapter.selective_forward
    monkeypatch.setattr(engine.adapter, "selective_forward", lambda *args: seen.append(args[4]) or forward(*args))
    state = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.2)
    assert seen == [None]
    assert state.report.recomputed == int(0.2 * sum(map(len, CHUNKS)))


@pytest.mark.usefixtures("short")
def test_every_row_is_read_once(engine: CacheTune) -> None:
    """The probe has read all layers: the recompute reads none again."""
    whole = engine.prefill(query=QUERY, chunks=CHUNKS, selector="none").report.bytes_read
    for ratio in (0.05, 0.5, 0.95):
        assert engine.prefill(query=QUERY, chunks=CHUNKS, ratio=ratio).report.bytes_read == whole


def test_the_report_counts_what_the_selector_ran(engine: CacheTune) -> None:
    layers = engine.adapter.num_layers
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    tokens = len(prompt.ids)

    def probed(selector: str) -> tuple[int, int]:
        report = engine.prefill(prompt=prompt, ratio=0.2, selector=selector).report
        return report.probed, report.computed - report.recomputed

    for selector, depth in (("expected_error", layers), ("expected_error_early", 1), ("probe", 1)):
        ran, always = probed(selector)
        assert ran == always * depth
    # Layer 0, and layer 1 up to its keys and values.
    layer = engine.adapter.model.model.layers[1]
    matrices = {name: m.weight.numel() for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs = sum(count for name, count in matrices.items() if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj"))
    assert probed("kv_deviation")[0] == round(tokens * (1 + inputs / sum(matrices.values())))
    for selector in ("frequency", "layer0_value", "chunk_head", "random", "none"):
        assert probed(selector)[0] == 0


@pytest.mark.parametrize("selector", ["auto", "probe", "frequency", "none"])
@pytest.mark.usefixtures("short")
def test_a_prompt_that_ends_in_a_chunk(selector: str) -> None:
    """Its last token is computed whatever is selected: the answer goes on from there."""
    with fresh(lead_in=[]) as engine:
        engine.precompute([Document("a", CHUNKS)])
        alone = engine.prompt_from_text(CHUNKS[0])  # begins where it was captured, so reuse is exact
        assert alone.spans[-1].end == len(alone.ids) == len(CHUNKS[0])
        full = engine.full_prefill(prompt=alone)
        for ratio in (0.0, 0.1, 0.9):
            state = engine.prefill(prompt=alone, ratio=ratio, selector=selector)
            assert difference(state.logits, full.logits) <= 1e-4
            assert state.report.recomputed >= 1
            assert state.report.reused + state.report.recomputed == len(CHUNKS[0])
        both = engine.prompt_from_text(f"{CHUNKS[0]}\n{CHUNKS[1]}")
        assert engine.prefill(prompt=both, ratio=0.2, selector=selector).report.reused > 0


# -- what a selector is shown --------------------------------------------------------------------------------------------


class _Recorder:
    """Stands in for the model: keeps what it is asked."""

    num_layers = 2
    layers = stored_layers = (LayerSpec(1, 8, 8),) * 2
    heads = ALL_HEADS
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: tuple[Any, ...] = ()

    def expected_error(self, *args: Any) -> Tensor:
        self.asked = args
        return torch.zeros(20)

    received_attention = expected_error


class _Loader(LayerLoader):
    def __init__(self, length: int) -> None:
        self._buffers, self._adapter = SimpleNamespace(length=length), _Recorder()  # type: ignore[assignment]


def _context(chunks: list[tuple[int, int, Tensor | None]], length: int = 20) -> tuple[PromptView, _Recorder]:
    engine, prompt = _Recorder(), Prompt(tuple(range(length)), (), (), ())
    computed = torch.ones(length, dtype=torch.bool)
    context = PromptView(engine, prompt, [], computed, None, _Loader(length))  # type: ignore[arg-type]
    for start, tokens, deviations in chunks:
        computed[start : start + tokens] = False
        read = None if deviations is None else partial(torch.clone, deviations)
        context.chunks.append(ReusedChunk(start, torch.arange(tokens), torch.zeros(tokens), read))
    return context, engine


def test_deviations_stand_where_their_tokens_do() -> None:
    one, two = torch.rand(3, 4).half(), torch.rand(2, 4).half()
    context, engine = _context([(2, 3, one), (6, 2, two)])
    context.expected_error(1, 64)
    assert torch.equal(engine.asked[1][2:5], one[:, :2]), "of the layers that are looked at, and no others"
    context.probed = 0
    context.expected_error(2, 64)
    probe, table = engine.asked
    assert torch.equal(table[2:5], one)
    assert torch.equal(table[6:8], two)
    assert table.shape == (20, 4)
    assert not table[torch.tensor([0, 1, 5, *range(8, 20)])].any()
    assert probe.ids.tolist() == probe.positions.tolist() == [0, 1, 5, *range(8, 20)]
    assert (probe.layers, probe.queries) == (2, 12)  # no more than stand behind the last chunk
    assert context.probed == 15 * 2


def test_a_chunk_without_deviations_counts_with_the_mean_of_the_others() -> None:
    one, two = torch.rand(3, 4).half(), torch.rand(2, 4).half()
    context, engine = _context([(2, 3, one), (5, 4, None), (12, 2, two)])
    context.expected_error(2, 4)
    probe, table = engine.asked
    mean = torch.cat((one, two)).float().mean(0).half()
    assert torch.equal(table[5:9], mean.expand(4, 4))
    assert probe.queries == 4


def test_without_any_deviations_the_same_tokens_are_watched() -> None:
    context, engine = _context([(2, 3, None), (12, 6, None)])
    context.expected_error(2, 64)
    (probe,) = engine.asked
    assert (probe.layers, probe.queries) == (2, 2)
