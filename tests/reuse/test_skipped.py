"""Skipped rows: recomputed without being read, so that a larger ratio means fewer bytes; and what a request reads at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document
from cachetune_rag.answering.request import Request
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.family.rope import Turn
from cachetune_rag.model.plain.shift import ChunkShift, RowShift
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_rag.selection.base import all_places, budget, total_budget
from cachetune_store.disk_reader import DiskReader

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
]
QUERY = "How many steps are there?"
TOKENS = sum(map(len, CHUNKS))
ONLINE = [
    "expected_error",
    "expected_error_early",
    "expected_error_tokens",
    "probe",
    "chunk_head",
    "random",
    "kv_deviation",
    "layer0_value",
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheTune]:
    """Chunks on disk only."""
    path = tmp_path_factory.mktemp("kv")
    with CacheTune(llama(), tokenizer(), path, host_budget=0) as made:
        made.precompute([Document("a", CHUNKS)])
        yield made


def prefill(engine: CacheTune, config: ReuseConfig, chunks: list[str] = CHUNKS) -> PrefillState:
    return engine.runtime.executor.prefill(Request.measured(engine.prompts.build(query=QUERY, chunks=chunks), config))


def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(key, layer, rows) of every read from disk from now on."""
    seen: list[tuple[str, int, int]] = []
    real = DiskReader.read

    def read(self: DiskReader, layer: int, rows: int) -> torch.Tensor:
        seen.append((str(self.key), layer, rows))
        return real(self, layer, rows)

    monkeypatch.setattr(DiskReader, "read", read)
    return seen


@pytest.mark.parametrize("selector", [*ONLINE, "frequency"])
@pytest.mark.parametrize(("ratio", "skipped"), [(0.5, 0.5), (0.5, 0.3), (0.9, 0.6)])
def test_skipped_rows_are_never_read_and_the_ratio_stays_the_total(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, selector: str, ratio: float, skipped: float
) -> None:
    seen = rows_read(monkeypatch)
    report = prefill(engine, ReuseConfig(selector, ratio, skipped)).report
    sizes = {len(text): len(text) - budget(skipped, len(text)) for text in CHUNKS}
    most = {str(engine.runtime.assembler.key(tuple(engine.prompts.encode(text)))): sizes[len(text)] for text in CHUNKS}
    assert seen
    assert all(rows <= most[key] for key, _, rows in seen)
    floors = sum(budget(ratio, len(text)) for text in CHUNKS), budget(ratio, TOKENS)
    if skipped == ratio:
        assert report.recomputed == floors[0]  # by the offline ranking alone, a budget a chunk
    else:
        assert report.recomputed in floors
    assert report.reused == TOKENS - report.recomputed
    assert report.skipped >= sum(budget(skipped, len(text)) for text in CHUNKS)
    assert report.missed == 0


@pytest.mark.parametrize("selector", ONLINE)
def test_with_nothing_left_to_choose_no_selector_runs_and_all_give_the_offline_ranking(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    prefill(engine, ReuseConfig("frequency", 0.4))  # keeps the prompt's beginning, which the first request computes
    expected = prefill(engine, ReuseConfig("frequency", 0.4)).logits
    monkeypatch.setattr(type(get_selector(selector)), "choose", lambda *_: pytest.fail("the selector was asked"))
    state = prefill(engine, ReuseConfig(selector, 0.4, 0.4))
    assert torch.equal(state.logits, expected)
    assert state.report.probed == 0


def test_a_larger_share_of_skipped_rows_is_fewer_bytes() -> None:
    texts = ["".join(chr(97 + (i * i + j) % 26) for i in range(512)) for j in range(2)]
    with CacheTune(llama(), tokenizer()) as engine:
        engine.precompute([Document("a", texts)])
        read = [
            prefill(engine, ReuseConfig("random", ratio, ratio - 0.125), texts).report.bytes_read["host"]
            for ratio in (0.125, 0.375, 0.625, 0.875)
        ]
    # The rows that stay are the first in the file; of them those after the last reused one aren't read either.
    assert read == sorted(read, reverse=True)
    assert read[3] <= read[0] * 0.26
    assert read[1] <= read[0] * 0.76


@pytest.mark.parametrize("selector", [*ONLINE, "frequency"])
def test_recomputing_everything_is_full_prefill_however_much_of_it_is_skipped(engine: CacheTune, selector: str) -> None:
    full = engine.full_prefill(query=QUERY, chunks=CHUNKS).logits
    for skipped in (0.0, 0.5, 1.0):
        state = prefill(engine, ReuseConfig(selector, 1.0, skipped))
        assert float((state.logits - full).abs().max()) <= 1e-5


def test_skipping_only_saves_reading_where_the_same_tokens_are_recomputed(engine: CacheTune) -> None:
    # Whatever the offline ranking's top is given as, skipped or chosen, the same tokens are computed over the same rows.
    prefill(engine, ReuseConfig("none", 0.0))  # from now on its prefix is kept: all requests compute the same tokens
    expected = prefill(engine, ReuseConfig("frequency", 0.5)).logits
    for skipped in (0.2, 0.35, 0.5):
        assert torch.equal(prefill(engine, ReuseConfig("frequency", 0.5, skipped)).logits, expected)


@pytest.fixture(scope="module")
def shifted() -> Iterator[CacheTune]:
    """Chunks that are means over two lead-ins: what expected error and the chunk shift go by."""
    leads = [[1, *(tokenizer().encode(text))] for text in ("Once upon a time,", "In the valley below")]
    with CacheTune(llama(), tokenizer(), lead_in=leads) as made:
        made.precompute([Document("a", CHUNKS)])
        yield made


@pytest.mark.parametrize("chunks", ["engine", "shifted"])
def test_what_was_never_read_decides_nothing(
    chunks: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers begin as arbitrary memory: whatever stands in a skipped row, the answer is the same."""
    engine: CacheTune = request.getfixturevalue(chunks)
    prefill(engine, ReuseConfig("none", 0.0))  # from now on its prefix is kept: all requests compute the same tokens
    real = ModelAdapter.new_buffers

    def filled(value: float) -> Any:
        def new_buffers(self: ModelAdapter, *given: Any) -> Any:
            buffers = real(self, *given)
            for rows in (*buffers.key_rows, *buffers.value_rows):
                rows.fill_(value)
            return buffers

        return new_buffers

    for selector in [*ONLINE, "frequency"]:
        found = []
        for value in (0.0, 1e3, float("nan")):
            monkeypatch.setattr(ModelAdapter, "new_buffers", filled(value))
            found.append(prefill(engine, ReuseConfig(selector, 0.5, 0.3)).logits)
        assert bool(torch.isfinite(found[0]).all())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def chunk(start: int, scores: list[float], skipped: int = 0) -> ReusedChunk:
    values = torch.tensor(scores)
    order = torch.sort(values, descending=True, stable=True).indices.flip(0)
    return ReusedChunk(start, order, values, skipped=skipped)


def test_what_can_be_chosen_of_a_chunk() -> None:
    one, two = chunk(3, [0.1, 0.9, 0.5, 0.2], skipped=2), chunk(7, [0.4, 0.3], skipped=0)
    assert one.places().tolist() == [3, 6]
    assert all_places([one, two]).tolist() == [3, 6, 7, 8]
    assert [one.budget(r) for r in (0.0, 0.5, 0.75, 1.0)] == [0, 0, 1, 2]
    assert [total_budget([one, two], r) for r in (0.0, 0.5, 0.7, 1.0)] == [0, 1, 2, 4]


def test_selectors_choose_among_what_is_read() -> None:
    class Context:
        def __init__(self, *chunks: ReusedChunk):
            self.chunks, self.seed = chunks, 3
            self.continuations: list[tuple[range, range]] = []

    context: Any = Context(chunk(0, [0.4, 0.3, 0.2, 0.1], skipped=2), chunk(4, [0.1, 0.2, 0.3, 0.4], skipped=2))
    assert sorted(get_selector("frequency").select(context, 0.75).tolist()) == [2, 5]
    context.continuations = [(range(2, 4), range(4, 7))]
    assert sorted(get_selector("frequency").select(context, 0.75).tolist()) == [2, 4], "token 6 is skipped"
    assert sorted(get_selector("chunk_head").select(context, 0.75).tolist()) == [2, 4]
    drawn = get_selector("random").select(context, 0.75).tolist()
    assert len(drawn) == 2
    assert set(drawn) <= {2, 3, 4, 5}
    assert sorted(get_selector("all").select(context, 1.0).tolist()) == [2, 3, 4, 5]


@pytest.mark.parametrize("skipped", [-0.1, 0.6, float("nan")])
def test_a_skipped_share_beyond_the_ratio_is_refused(skipped: float) -> None:
    with pytest.raises(ConfigError, match=r"skipped is .* from 0 to 0\.5"):
        ReuseConfig("probe", 0.5, skipped)


def test_the_shift_goes_by_the_rows_that_were_read() -> None:
    """Tokens 1 and 2 of a chunk of 4 are recomputed; of token 2 nothing stored was read."""
    stored = torch.zeros(4, 1, 2)
    stored[2] = float("nan")
    fresh = torch.tensor([[[3.0, 6.0]], [[100.0, 100.0]]])
    known = torch.tensor([False, True, False, False])
    turns: list[Turn | None] = [None]
    keys, values = stored.clone(), stored.clone()
    RowShift(ChunkShift(0.5, [(0, 4)], known), torch.tensor([1, 2]), turns).apply(0, keys, values, fresh, fresh)
    moved = fresh[0] * 0.5 / (1 + 2)  # one difference is known, and kappa is 2
    assert torch.allclose(keys[0], moved)
    assert torch.allclose(values[3], moved)


def test_a_request_shifts_by_what_it_read_and_chose(shifted: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ChunkShift] = []
    real = ModelAdapter.selective_forward

    def forward(self: ModelAdapter, *args: Any) -> torch.Tensor:
        seen.extend(a for a in args if isinstance(a, ChunkShift))
        return real(self, *args)

    monkeypatch.setattr(ModelAdapter, "selective_forward", forward)
    report = prefill(shifted, ReuseConfig("expected_error", 0.5, 0.3)).report
    (shift,) = seen
    assert shift.known is not None
    inside = torch.cat([shift.known[start:end] for start, end in shift.spans])
    assert int(inside.sum()) == report.recomputed - sum(budget(0.3, len(text)) for text in CHUNKS)
    for skipped in (0.0, 0.5):
        seen.clear()
        prefill(shifted, ReuseConfig("expected_error", 0.5, skipped))
        # Nothing skipped: all stored rows are there. Everything skipped: nothing is known to shift by.
        assert [s.known for s in seen] == ([None] if skipped == 0.0 else [])


# -- what a request leaves unread ---------------------------------------------------------------------------------


def test_a_store_without_host_memory_reads_no_more_than_a_request_needs(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = rows_read(monkeypatch)
    prefill(engine, ReuseConfig("frequency", 0.5))
    engine.runtime.prefetcher.take(
        [engine.runtime.assembler.key(tuple(engine.prompts.encode(text))) for text in CHUNKS]
    )
    assert max(rows for _, _, rows in seen) < min(map(len, CHUNKS))


def test_what_a_request_left_is_read_behind_it_and_found_in_host_memory_by_the_next(tmp_path: Path) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path / "kv") as engine:
        engine.precompute([Document("a", CHUNKS)])
    with CacheTune(llama(), tokenizer(), tmp_path / "kv") as engine:
        first = prefill(engine, ReuseConfig("frequency", 0.5))
        second = prefill(engine, ReuseConfig("frequency", 0.5))
        assert set(first.report.bytes_read) == {"disk"}
        assert set(second.report.bytes_read) == {"host"}
        assert float((first.logits - second.logits).abs().max()) <= 1e-5
        assert engine.store.stats().host.promotions == len(CHUNKS)
