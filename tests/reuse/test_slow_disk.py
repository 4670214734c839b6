"""A prompt whose chunks a disk gives more slowly than a server reads the prompt: it is left, and its chunks are in memory the next time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.opening import bytes_to_read
from cachetune_rag.reuse.plan import Planner
from cachetune_rag.reuse.reading import Reading, reading_of
from cachetune_rag.reuse.slow_rows import SlowRows
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_rag.selection import names
from cachetune_rag.selection.base import budget
from cachetune_rag.selection.bound import SignOnly
from cachetune_rag.text.prompts.segments import Prompt, Span
from cachetune_store import ChunkStore, read_speed

TEXTS = [f"Ship {number} came in at noon with {number * 7} barrels of salt, and left again." for number in range(4)]
SPEED, LAYERS = 1000.0, 8
CONFIG = ReuseConfig("frequency", 0.2)


class Asked:
    """Says whether the disk is too slow, and for how many seconds it is left alone then; notes what it was asked."""

    def __init__(self, slow: bool, after: float = 0.0):
        self.answer, self.readings = after if slow else None, list[Reading]()

    def __call__(self, reading: Reading) -> float | None:
        self.readings.append(reading)
        return self.answer

    @property
    def seconds(self) -> list[float]:
        return [reading.seconds for reading in self.readings]


def opened(folder: Path, speed: float | None = SPEED, **options: Any) -> CacheTune:
    """An engine that has nothing in memory, whose disk has given so many bytes a second lately."""
    with CacheTune(llama(), tokenizer(), folder) as filling:
        filling.precompute(TEXTS)
    engine = CacheTune(llama(), tokenizer(), folder, **options)
    engine.store.read_speed = lambda tier: speed if tier == "disk" else None  # type: ignore[method-assign]
    return engine


def reuse(
    engine: CacheTune,
    asked: Callable[[Reading], float | None] | None,
    shown: list[str] = TEXTS[:3],
    config: ReuseConfig = CONFIG,
) -> Any:
    assembler = engine.runtime.assembler
    prompt = engine.prompts.build(query="How many barrels?", chunks=shown, prefix="The log.")
    return assembler.reuse(prompt, config, time.perf_counter(), assembler.memory, too_slow=asked)


def wanted_bytes(engine: CacheTune, texts: list[str], unread: float = CONFIG.ratio) -> int:
    """Bytes of the rows that are read of these chunks."""
    total = 0
    for text in texts:
        key = engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids)
        with engine.store.open(key) as reader:  # type: ignore[union-attr]
            rows = reader.layout.tokens - budget(unread, reader.layout.tokens)
            total += sum(form.size(rows) for form in reader.head.plan.rows)
    return total


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until
        time.sleep(0.001)


@contextmanager
def paused(engine: CacheTune) -> Iterator[None]:
    """Nothing is read in the background meanwhile."""
    priority = engine.runtime.prefetcher.priority()
    priority.claim()
    yield
    priority.end()


def in_host(engine: CacheTune) -> int:
    return engine.store.stats().host.chunks


def test_it_is_left_its_chunks_are_read_behind_it_and_the_next_one_reuses_them(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        expected = wanted_bytes(engine, TEXTS[:3]) / SPEED
        left = reuse(engine, asked := Asked(slow=True))
        assert isinstance(left, NothingReused)
        assert asked.seconds == [pytest.approx(expected)]
        assert (left.reading, left.report.reused, left.missed) == (asked.readings[0], 0, ())
        wait_for(lambda: in_host(engine) == 3)
        state = reuse(engine, asked)
        assert isinstance(state, PrefillState)
        assert state.report.reused
        assert set(state.report.bytes_read) == {"host"}
        assert len(asked.seconds) == 1  # there is nothing to wait for
        left = reuse(engine, asked, TEXTS)  # one more chunk
        assert isinstance(left, NothingReused)
        assert asked.seconds[1:] == [pytest.approx(wanted_bytes(engine, TEXTS[3:]) / SPEED)]
        wait_for(lambda: in_host(engine) == 4)
        wait_for(lambda: engine.store.stats().disk.pinned == 0)  # type: ignore[union-attr]


def test_its_chunks_are_read_once_the_server_has_the_prompt(tmp_path: Path) -> None:
    """Meanwhile reading would take the host from the server. A request that needs them before gets them; the others are closed in the end."""
    with opened(tmp_path) as engine:
        coming, disk = engine.runtime.prefetcher, engine.store.stats
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        assert isinstance(reuse(engine, Asked(slow=True, after=1e6), TEXTS[:2]), NothingReused)
        wait_for(lambda: coming.coming == set(keys[:2]))
        assert isinstance(reuse(engine, Asked(slow=True, after=1e-3), TEXTS[2:]), NothingReused)
        wait_for(lambda: in_host(engine) == 2)
        assert [bool(engine.store.touch_host(key)) for key in keys] == [False, False, True, True]
        assert (coming.coming, disk().disk.pinned) == (set(keys[:2]), 2)  # type: ignore[union-attr]
        state = reuse(engine, Asked(slow=False), TEXTS[:1])
        assert isinstance(state, PrefillState)
        assert state.report.bytes_read["disk"]
        assert coming.coming == {keys[1]}
        wait_for(lambda: disk().disk.pinned == 1)  # type: ignore[union-attr]
        coming.close()
        assert (coming.coming, disk().disk.pinned) == (set(), 0)  # type: ignore[union-attr]
        for shown in (TEXTS[1:], TEXTS[:2]):  # some of them are in memory, and all known
            assert isinstance(reuse(engine, Asked(slow=True, after=1e6), shown), NothingReused)
            assert (coming.coming, disk().disk.pinned) == (set(), 0)  # type: ignore[union-attr]


def test_chunks_that_wait_to_be_read_are_not_put_off_and_a_request_that_needs_them_gets_them(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        sizes = []
        for key in keys:
            with engine.store.open(key) as reader:  # type: ignore[union-attr]
                sizes.append(reader.host_bytes)
    with opened(tmp_path, host_budget=sum(sizes) + min(sizes) // 2) as engine:
        coming, later = engine.runtime.prefetcher, Asked(slow=True, after=1e6)
        for key in keys:
            engine.store.open(key).close()  # type: ignore[union-attr]
        for _ in range(3):  # there is room for each once
            assert isinstance(left := reuse(engine, later), NothingReused)
            assert (coming.coming, left.left_on_disk) == (set(keys[:3]), 0)
        assert engine.store.stats().disk.pinned == 0  # type: ignore[union-attr]
        state = reuse(engine, Asked(slow=False), TEXTS[:1])
        assert isinstance(state, PrefillState)
        assert coming.coming == set(keys[1:3])
        assert isinstance(left := reuse(engine, Asked(slow=True, after=1e-3), TEXTS[1:]), NothingReused)
        assert left.left_on_disk == 0
        wait_for(lambda: bool(engine.store.touch_host(keys[3])) and coming.coming == set(keys[1:3]))
        assert coming.take(keys) == {}  # nobody has opened them
        assert coming.coming == set()


def opened_files(engine: CacheTune, patch: pytest.MonkeyPatch) -> list[object]:
    """Keys of the chunks that are opened from now on, wherever they are."""
    noted: list[object] = []
    store = engine.store
    for name in ("open", "open_in_memory"):
        real = getattr(store, name)
        patch.setattr(store, name, lambda key, real=real, **given: noted.append(key) or real(key, **given))
    return noted


@pytest.mark.parametrize("config", [CONFIG, ReuseConfig("expected_error", 0.2)], ids=lambda config: config.selector)
def test_chunks_that_were_open_before_are_left_without_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ReuseConfig
) -> None:
    """Opening them takes longer than all else that a server waits for before it reads such a prompt itself."""
    with opened(tmp_path) as engine:
        first = engine.prompts.build(query="How?", chunks=TEXTS[:1])
        engine.runtime.executor.prefetch(lambda: first.chunk_ids).wait(30)
        seen = reuse(engine, asked := Asked(slow=True, after=1e6), TEXTS, config)
        coming = engine.runtime.prefetcher
        wait_for(lambda: len(coming.coming) == 3)
        for reader in coming.take(coming.coming).values():
            reader.close()
        files = opened_files(engine, monkeypatch)
        left = reuse(engine, asked, TEXTS, config)
        assert files == []
        assert asked.readings == [seen.reading] * 2
        assert (left.reading, left.missed) == (seen.reading, ())
        same = ("prompt_tokens", "reused", "recomputed", "missed", "ratio", "selector", "advice", "continued")
        assert [getattr(left.report, name) for name in same] == [getattr(seen.report, name) for name in same]
        assert coming.take(coming.coming) == {}
        assert isinstance(reuse(engine, Asked(slow=True, after=1e-3), TEXTS, config), NothingReused)
        wait_for(lambda: in_host(engine) == 4)
        wait_for(lambda: engine.store.stats().disk.pinned == 0)  # type: ignore[union-attr]
        state = reuse(engine, asked, TEXTS, config)
        assert isinstance(state, PrefillState)
        assert len(asked.readings) == 2


def test_a_prompt_is_asked_about_once_although_its_chunks_are_opened_then(tmp_path: Path) -> None:
    """One that is tried all the same would be left by the second answer."""
    with opened(tmp_path, host_budget=0) as engine:
        for asked in (Asked(slow=True), Asked(slow=False), Asked(slow=False)):
            state = reuse(engine, asked)
            assert isinstance(state, PrefillState) != (asked.answer is not None)
            assert len(asked.readings) == 1


def test_where_not_all_is_known_the_chunks_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, host_budget=0) as engine:
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        assert isinstance(reuse(engine, Asked(slow=True)), NothingReused)
        files = opened_files(engine, monkeypatch)
        assert isinstance(left := reuse(engine, Asked(slow=True), TEXTS), NothingReused)  # one was never open
        assert set(files) == set(keys)
        assert (left.missed, left.left_on_disk) == ((), 4)
        engine.store.tier("disk").path_of(keys[1]).unlink()  # type: ignore[attr-defined]
        del files[:]
        assert isinstance(left := reuse(engine, Asked(slow=True), TEXTS), NothingReused)
        assert files == []  # nobody has looked
        assert left.missed == ()
        assert isinstance(state := reuse(engine, Asked(slow=False), TEXTS), PrefillState)
        assert state.missed == (1,)
        assert isinstance(left := reuse(engine, Asked(slow=True), TEXTS), NothingReused)
        assert left.missed == (1,)


def test_a_chunk_that_is_gone_is_found_to_be_so_behind_a_left_prompt(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        coming = engine.runtime.prefetcher
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        for key in keys[:3]:
            engine.store.open(key).close()  # type: ignore[union-attr]
            engine.store.tier("disk").path_of(key).unlink()  # type: ignore[attr-defined]
        assert isinstance(reuse(engine, Asked(slow=True)), NothingReused)
        wait_for(lambda: not any(engine.store.foresee(key) for key in keys))
        assert isinstance(left := reuse(engine, asked := Asked(slow=True)), NothingReused)
        assert (left.missed, asked.readings) == ((0, 1, 2), [])
        assert not coming.coming


def test_what_is_read_in_the_background_tells_nothing_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer threads read there, so it is slower."""
    monkeypatch.setattr(read_speed, "PIECE", 1)
    with opened(tmp_path) as engine:
        del engine.store.read_speed  # the store's own
        prefetch, coming = engine.runtime.executor.prefetch, engine.runtime.prefetcher
        first, second = (engine.prompts.build(query="How?", chunks=shown) for shown in (TEXTS[:2], TEXTS[2:]))
        prefetch(lambda: first.chunk_ids).wait(30)
        assert in_host(engine) == 2
        assert engine.store.read_speed("disk") is None
        with paused(engine):
            prefetch(lambda: second.chunk_ids)
            wait_for(lambda: len(coming.coming) == 2)
            assert isinstance(reuse(engine, None, TEXTS[2:]), PrefillState)  # takes them over
        assert engine.store.read_speed("disk") > 0  # type: ignore[operator]


def test_a_quick_disk_is_read(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        state = reuse(engine, asked := Asked(slow=False))
        assert isinstance(state, PrefillState)
        assert state.report.bytes_read["disk"]
        assert len(asked.seconds) == 1


def test_where_nothing_was_measured_or_nobody_asks_it_is_read(tmp_path: Path) -> None:
    with opened(tmp_path, speed=None, host_budget=0) as engine:
        for asked in (Asked(slow=True), None):
            state = reuse(engine, asked)
            assert isinstance(state, PrefillState)
            assert state.report.bytes_read["disk"]
            assert asked is None or not asked.seconds


@pytest.mark.parametrize("name", names.BUILT_IN)
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_a_selector_says_for_which_rows_it_waits_before_anything_is_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ratio: float
) -> None:
    """Otherwise a prompt would count as quick whose recomputing has to wait for the disk, or as slow whose doesn't."""
    with CacheTune(llama(layers=LAYERS), tokenizer(), tmp_path) as filling:
        filling.precompute(TEXTS[:3])
    waited: list[int] = []
    take, choose = SlowRows.take, Planner.choose

    def noted(rows: SlowRows, layer: int) -> Any:
        waited.append(layer)
        return take(rows, layer)

    def chosen(planner: Planner, *given: Any) -> Any:
        found = choose(planner, *given)
        waited.append(LAYERS)
        return found

    monkeypatch.setattr(SlowRows, "take", noted)
    monkeypatch.setattr(Planner, "choose", chosen)
    with CacheTune(llama(layers=LAYERS), tokenizer(), tmp_path, host_budget=0) as engine:
        engine.store.read_speed = lambda tier: SPEED  # type: ignore[method-assign]
        state = reuse(engine, asked := Asked(slow=False), config=ReuseConfig(name, ratio))
    before = waited[: waited.index(LAYERS)]
    (reading,) = asked.readings
    assert reading.before == (max(before) + 1 if before else 0) / LAYERS
    assert (reading.ready > 0) == (reading.before == 1)
    # A selector with a budget for each chunk rounds down in each.
    rounded = 2 if name in (names.FREQUENCY, names.CHUNK_HEAD) else 0
    assert reading.reused <= state.report.reused <= reading.reused + rounded


def test_of_a_mixed_prompt_what_is_on_disk_is_read_and_what_is_not_reused_is_computed(tmp_path: Path) -> None:
    new = "Nobody has seen this passage before, and it is not stored anywhere."
    config = ReuseConfig("expected_error", 0.2)
    with opened(tmp_path) as engine:
        first = engine.prompts.build(query="How?", chunks=TEXTS[:1])
        engine.runtime.executor.prefetch(lambda: first.chunk_ids).wait(30)
        assert in_host(engine) == 1
        state = reuse(engine, asked := Asked(slow=False), [new, *TEXTS[:3], new], config)
        assert isinstance(state, PrefillState)
        assert state.report.missed == 2 * len(new)  # a byte a token
        (reading,) = asked.readings
        assert reading.seconds == pytest.approx(wanted_bytes(engine, TEXTS[1:3], 0.0) / SPEED)
        assert (reading.before, reading.reused) == (1, state.report.reused)
        # The first new passage is computed while the rows are read, and the second one behind that.
        assert len(new) < reading.ready < len(new) + 20


def test_where_nothing_is_to_be_looked_at_and_where_workers_take_turns() -> None:
    stored = Span(5, 105, 0)
    prompt = Prompt(tuple(range(120)), (stored,), (tuple(range(5, 105)),), ("",))

    def said(config: ReuseConfig, *, in_turns: bool = False) -> Reading:
        return reading_of(2.0, prompt, config, [stored], LAYERS, in_turns=in_turns)

    assert said(ReuseConfig("expected_error", 0.2)) == Reading(2.0, 1.0, 80, 5)
    assert said(ReuseConfig("expected_error", 0.2), in_turns=True) == Reading(2.0, 1.0, 80)
    assert said(ReuseConfig("frequency", 0.2)) == Reading(2.0, 0.0, 80)
    assert said(ReuseConfig("frequency", 0.2), in_turns=True) == Reading(2.0, 1.0, 80)
    assert said(ReuseConfig("expected_error", 0.2, skipped=0.2)) == Reading(2.0, 0.0, 80)
    assert said(ReuseConfig("none", 0.4, skipped=0.1)) == Reading(2.0, 0.0, 90)
    assert said(ReuseConfig("expected_error", 0.2, finder=SignOnly((0.1, 0.4)))) == Reading(2.0, 1.0, 90, 5)
    assert said(ReuseConfig("expected_error", 0.0, finder=SignOnly())) == Reading(2.0, 1.0, 100, 5)


@pytest.mark.parametrize("fit", [0, 1])
def test_what_has_no_room_in_memory_is_let_go(tmp_path: Path, fit: int) -> None:
    with opened(tmp_path) as engine:
        first = engine.runtime.assembler.key(tokenizer()(TEXTS[0], add_special_tokens=False).input_ids)
        with engine.store.open(first) as reader:  # type: ignore[union-attr]
            size = reader.host_bytes
    told = list[int]()
    with opened(tmp_path, host_budget=fit * (size + size // 2)) as engine:
        for _ in range(3):
            with paused(engine):
                left = reuse(engine, Asked(slow=True), TEXTS)
            assert isinstance(left, NothingReused)
            told.append(left.left_on_disk)
            wait_for(lambda: not engine.runtime.prefetcher.coming and engine.store.stats().disk.pinned == 0)  # type: ignore[union-attr]
            wait_for(lambda: in_host(engine) == fit)
        # Afterwards, the one that is in memory need not be read, and there is room for another one in its place.
        assert told == [4 - fit] * 1 + [4 - 2 * fit] * 2
        wait_for(lambda: engine.store.stats().disk.pinned == 0)  # type: ignore[union-attr]
        wait_for(lambda: in_host(engine) == fit)


def test_no_more_is_read_behind_left_prompts_than_memory_holds(tmp_path: Path) -> None:
    """Otherwise a server that is asked for more than its disk gives would have ever more files open."""
    with opened(tmp_path) as engine:
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        sizes = [reader.host_bytes for reader in map(engine.store.open, keys) if reader is not None]
    with opened(tmp_path, host_budget=sum(sizes) - min(sizes) // 2) as engine:
        coming = engine.runtime.prefetcher
        with paused(engine):
            for _ in range(2):  # the same ones again are handed on and read on
                assert isinstance(reuse(engine, Asked(slow=True)), NothingReused)
                wait_for(lambda: coming.coming == set(keys[:3]))
            for _ in range(2):  # opened, and known from then on
                assert isinstance(left := reuse(engine, Asked(slow=True), TEXTS[3:]), NothingReused)
                assert left.left_on_disk == 1
            assert engine.store.stats().disk.pinned == 3  # type: ignore[union-attr]
        wait_for(lambda: in_host(engine) == 3 and not coming.coming)
        assert isinstance(left := reuse(engine, Asked(slow=True), TEXTS[3:]), NothingReused)
        assert left.left_on_disk == 0
        wait_for(lambda: bool(engine.store.touch_host(keys[3])))


def test_what_a_left_prompt_has_in_memory_is_there_the_next_time(tmp_path: Path) -> None:
    """Its chunks count as used although nobody opens them. Otherwise those that are read behind it would push the others out, and it would be left for ever."""
    with opened(tmp_path, host_budget=0) as engine:
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        size = max(reader.host_bytes for reader in map(engine.store.open, keys) if reader is not None)
    with opened(tmp_path, host_budget=2 * size + size // 2) as engine:
        engine.store.open(keys[3]).close()  # type: ignore[union-attr]
        for text in TEXTS[:2]:
            shown = engine.prompts.build(query="How?", chunks=[text])
            engine.runtime.executor.prefetch(lambda shown=shown: shown.chunk_ids).wait(30)
        used = list[object]()
        engine.store.tier("disk").touch = used.append  # type: ignore[method-assign, union-attr]
        prompt = [TEXTS[0], TEXTS[3]]
        assert isinstance(reuse(engine, Asked(slow=True, after=1e6), prompt), NothingReused)
        assert used == [keys[0], keys[3]]
        assert engine.runtime.prefetcher.take(keys) == {}
        assert isinstance(reuse(engine, Asked(slow=True), prompt), NothingReused)
        wait_for(lambda: bool(engine.store.touch_host(keys[3])))
        assert isinstance(reuse(engine, Asked(slow=True), prompt), PrefillState)


def test_what_has_no_room_is_counted_for_every_prompt_and_keeps_none_from_others(tmp_path: Path) -> None:
    with opened(tmp_path, host_budget=100) as engine:
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        coming = engine.runtime.prefetcher

        def left(*sizes: int, first: int = 0) -> int:
            given = dict(zip(keys[first:], sizes, strict=False))
            return coming.read_later(given, lambda reader: reader.layout.tokens, 1e6)

        for _ in range(2):
            assert left(60, 60) == 1
            assert coming.coming == {keys[0]}
        assert left(60, 60, first=1) == 2
        assert left(30, first=2) == 0
        assert coming.coming == {keys[0], keys[2]}
        assert coming.take(keys) == {}
        assert left(60, 40) == 0


def test_where_no_thread_can_be_started_nothing_is_read_behind_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is left as well, and what was reserved is given back."""

    def refused(_timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    with opened(tmp_path) as engine:
        coming = engine.runtime.prefetcher
        keys = [engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids) for text in TEXTS]
        size = sum(reader.host_bytes for reader in map(engine.store.open, keys[:3]) if reader is not None)
    with opened(tmp_path, host_budget=size) as engine:
        coming = engine.runtime.prefetcher
        for key in keys:
            engine.store.open(key).close()  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(threading.Timer, "start", refused)
            assert isinstance(left := reuse(engine, Asked(slow=True, after=1e6)), NothingReused)
            assert (left.left_on_disk, coming.coming) == (3, set())
        assert isinstance(left := reuse(engine, Asked(slow=True)), NothingReused)
        assert left.left_on_disk == 0
        wait_for(lambda: in_host(engine) == 3)


def test_a_tenants_chunks_are_read_for_that_tenant(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        for tenant in ("a", "b"):
            with CacheTune(llama(), tokenizer(), store, tenant=tenant) as engine:
                engine.precompute(TEXTS[:3])
    with ChunkStore(tmp_path) as store:
        store.read_speed = lambda tier: SPEED  # type: ignore[method-assign]
        with (
            CacheTune(llama(), tokenizer(), store, tenant="a") as first,
            CacheTune(llama(), tokenizer(), store, tenant="b") as second,
        ):
            assert isinstance(reuse(first, Asked(slow=True)), NothingReused)
            wait_for(lambda: in_host(first) == 3)
            assert isinstance(reuse(second, Asked(slow=True)), NothingReused)  # its own are on disk still
            assert isinstance(reuse(first, Asked(slow=True)), PrefillState)


def test_what_was_read_before_the_next_request_is_not_read_again(tmp_path: Path) -> None:
    """Otherwise requests that come one behind the other would read the beginning of a chunk for ever."""
    with opened(tmp_path) as engine:
        prefetcher = engine.runtime.prefetcher
        with paused(engine):
            assert isinstance(reuse(engine, Asked(slow=True)), NothingReused)
            wait_for(lambda: len(prefetcher.coming) == 3)
            readers = prefetcher.take(prefetcher.coming)
        for reader in readers.values():
            reader.read(0, reader.layout.tokens)
        first = sum(reader.head.plan.rows[0].size(reader.layout.tokens) for reader in readers.values())
        assert first
        with paused(engine):
            prefetcher.go_on(list(readers.values()))
            wait_for(lambda: len(prefetcher.coming) == 3)
            asked = Asked(slow=True)
            assert isinstance(left := reuse(engine, asked), NothingReused)
            assert left.report.bytes_read["disk"] >= first  # the readers that had read their first layers
            wait_for(lambda: len(prefetcher.coming) == 3)
        wait_for(lambda: in_host(engine) == 3)


def test_of_a_layer_that_was_read_in_part_the_rest_is_waited_for(tmp_path: Path) -> None:
    text = " ".join(TEXTS)
    with CacheTune(llama(), tokenizer(), tmp_path) as engine:
        engine.precompute([text])
    with CacheTune(llama(), tokenizer(), tmp_path, host_budget=0) as engine:
        key = engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids)
        with engine.store.open(key) as reader:  # type: ignore[union-attr]
            rows, forms = reader.layout.tokens, reader.head.plan.rows
            assert bytes_to_read(reader, rows) == sum(form.size(rows) for form in forms)
            reader.read(0, 1)
            there = reader.rows_there(0)
            assert 0 < there < rows
            assert bytes_to_read(reader, rows) == sum(form.size(rows) for form in forms) - forms[0].size(there)
            assert bytes_to_read(reader, there) == sum(form.size(there) for form in forms[1:])
