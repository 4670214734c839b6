"""A prompt whose chunks a disk gives more slowly than a server reads the prompt: it is left, and its chunks are in memory the next time."""

from __future__ import annotations

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
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_rag.selection.base import budget
from cachetune_store import ChunkStore, read_speed

TEXTS = [f"Ship {number} came in at noon with {number * 7} barrels of salt, and left again." for number in range(4)]
SPEED = 1000.0
CONFIG = ReuseConfig("frequency", 0.2)


class Asked:
    """Says whether the disk is too slow, and notes what it was asked."""

    def __init__(self, slow: bool):
        self.slow, self.seconds = slow, list[float]()

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return self.slow


def opened(folder: Path, speed: float | None = SPEED, **options: Any) -> CacheTune:
    """An engine that has nothing in memory, whose disk has given so many bytes a second lately."""
    with CacheTune(llama(), tokenizer(), folder) as filling:
        filling.precompute(TEXTS)
    engine = CacheTune(llama(), tokenizer(), folder, **options)
    engine.store.read_speed = lambda tier: speed if tier == "disk" else None  # type: ignore[method-assign]
    return engine


def reuse(engine: CacheTune, asked: Callable[[float], bool] | None, shown: list[str] = TEXTS[:3]) -> Any:
    assembler = engine.runtime.assembler
    prompt = engine.prompts.build(query="How many barrels?", chunks=shown, prefix="The log.")
    return assembler.reuse(prompt, CONFIG, time.perf_counter(), assembler.memory, too_slow=asked)


def wanted_bytes(engine: CacheTune, texts: list[str]) -> int:
    """Bytes of the rows that are read of these chunks."""
    total = 0
    for text in texts:
        key = engine.runtime.assembler.key(tokenizer()(text, add_special_tokens=False).input_ids)
        with engine.store.open(key) as reader:  # type: ignore[union-attr]
            rows = reader.layout.tokens - budget(CONFIG.ratio, reader.layout.tokens)
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
        assert (left.reading, left.report.reused, left.missed) == (asked.seconds[0], 0, ())
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


@pytest.mark.parametrize("fit", [0, 1])
def test_what_has_no_room_in_memory_is_let_go(tmp_path: Path, fit: int) -> None:
    with opened(tmp_path) as engine:
        first = engine.runtime.assembler.key(tokenizer()(TEXTS[0], add_special_tokens=False).input_ids)
        with engine.store.open(first) as reader:  # type: ignore[union-attr]
            size = reader.host_bytes
    with opened(tmp_path, host_budget=fit * (size + size // 2)) as engine:
        for _ in range(3):
            assert isinstance(reuse(engine, Asked(slow=True), TEXTS), NothingReused)
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
            assert isinstance(reuse(engine, Asked(slow=True), TEXTS[3:]), NothingReused)
            assert engine.store.stats().disk.pinned == 3  # type: ignore[union-attr]
        wait_for(lambda: in_host(engine) == 3 and not coming.coming)
        assert isinstance(reuse(engine, Asked(slow=True), TEXTS[3:]), NothingReused)
        wait_for(lambda: bool(engine.store.touch_host(keys[3])))


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
