"""Reading ahead: what the next request needs comes from disk while this one computes, and nothing else changes.

No test goes by the clock. A disk of one's own stops where it is told to, and waits end in a failure after a while.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document, PromptError
from cachetune_rag.answering.request import Request
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.errors import EngineClosedError
from cachetune_rag.readahead import batch_work
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.slow_rows import READ_AHEAD
from cachetune_rag.reuse.source import Source
from cachetune_store import ChunkKey, ChunkStore, DamagedChunkError
from cachetune_store.disk_reader import DiskReader

TEXTS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
REQUESTS = [
    {"query": "Who built it?", "chunks": TEXTS[:2]},
    {"query": "How many steps?", "chunks": TEXTS[2:]},
    {"query": "What burned?", "chunks": TEXTS[1:3], "ratio": 0.5},
]
PATIENCE = 20.0


class Disk:
    """Every read from disk, in order, by the thread that asks for it; `hold` makes reads of some chunks wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reads: list[tuple[str, str]] = []
        self.changed = threading.Condition()
        self.hold: Callable[[str], bool] = lambda _key: False
        self.fail: Callable[[str], bool] = lambda _key: False
        real = DiskReader.read

        def read(reader: DiskReader, layer: int, rows: int) -> torch.Tensor:
            key = str(reader.key)
            with self.changed:
                self.reads.append((key, threading.current_thread().name))
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: not self.hold(key), PATIENCE)
            if self.fail(key):
                raise DamagedChunkError(f"chunk {key}: made to fail")
            return real(reader, layer, rows)

        monkeypatch.setattr(DiskReader, "read", read)

    def ahead(self) -> set[str]:
        """Chunks that were read behind a request."""
        return {key for key, thread in self.reads if thread.startswith("cachetune-prefetch")}

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)

    def release(self) -> None:
        with self.changed:
            self.hold = lambda _key: False
            self.changed.notify_all()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[CacheTune]:
    """An engine whose chunks are on disk, with room for them in host memory."""
    with opened(tmp_path) as engine:
        yield engine


def opened(folder: Path, **options: Any) -> CacheTune:
    with CacheTune(llama(), tokenizer(), folder / "kv") as engine:
        engine.precompute([Document("a", TEXTS)])
    return CacheTune(llama(), tokenizer(), folder / "kv", **options)


def key_of(engine: CacheTune, text: str) -> ChunkKey:
    return engine.runtime.assembler.key(tuple(engine.prompts.encode(text)))


def keys_of(engine: CacheTune, texts: list[str]) -> set[str]:
    return {str(key_of(engine, text)) for text in texts}


def in_host_memory(engine: CacheTune) -> set[str]:
    return {str(key_of(engine, text)) for text in TEXTS if engine.store.touch_host(key_of(engine, text))}


# -- generate_many ------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_generate_in_order(cold: CacheTune) -> None:
    answers = list(cold.generate_many(iter(REQUESTS), max_new_tokens=5, selector="frequency"))
    with CacheTune(llama(), tokenizer()) as alone:
        alone.precompute([Document("a", TEXTS)])
        for request, answer in zip(REQUESTS, answers, strict=True):
            expected = alone.generate(**{"max_new_tokens": 5, "selector": "frequency", **request})
            assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
            assert answer.report.ratio == expected.report.ratio
            assert answer.report.missed == 0


def test_the_next_request_is_read_while_this_one_computes(
    cold: CacheTune, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request's last forward waits until all of the second's chunks were read: it would wait for ever otherwise."""
    second = keys_of(cold, TEXTS[2:])
    real = cold.adapter.forward
    during: list[set[str]] = []

    def forward(*args: Any) -> torch.Tensor:
        if not during:
            disk.wait_for(lambda: second <= disk.ahead())
            during.append(disk.ahead())
        return real(*args)

    monkeypatch.setattr(cold.adapter, "forward", forward)
    first, next_ = list(cold.generate_many(REQUESTS[:2], max_new_tokens=3, ratio=0.2, selector="frequency"))
    assert set(first.report.bytes_read) == {"disk"}
    assert second <= during[0]
    # In memory by then, or taken over as far as it was read.
    assert set(next_.report.bytes_read) <= {"host", "disk"}
    assert next_.report.missed == 0


def test_it_opens_chunks_once_those_of_the_request_at_hand_are_open_and_reads_them_once_its_rows_are_read(
    cold: CacheTune, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So two requests never share the disk while the first one waits for it, and the disk has work the moment it is free.
    opened: list[str] = []
    real, own = cold.store.open, keys_of(cold, TEXTS[:2])

    def open_(key: Any, **kwargs: Any) -> Any:
        opened.append(str(key))
        return real(key, **kwargs)

    monkeypatch.setattr(cold.store, "open", open_)
    disk.hold = own.__contains__
    answers = cold.generate_many(REQUESTS[:2], max_new_tokens=1, ratio=0.2, selector="frequency")
    first = threading.Thread(target=lambda: next(answers))
    first.start()
    while len(opened) < 4:  # none of the first one's rows is read
        assert first.is_alive()
        first.join(0.005)
    disk.release()
    first.join(PATIENCE)
    assert not first.is_alive()
    assert set(opened[:2]) == own
    assert set(opened[2:]) == keys_of(cold, TEXTS[2:])
    disk.wait_for(lambda: keys_of(cold, TEXTS[2:]) <= disk.ahead())
    ahead_at = [n for n, (_, thread) in enumerate(disk.reads) if thread.startswith("cachetune-prefetch")]
    needed = [n for n, (_, thread) in enumerate(disk.reads) if thread.startswith("cachetune-read")]
    assert len(needed) == 2 * cold.adapter.num_layers
    assert max(needed) < min(ahead_at)
    list(answers)


def test_chunks_that_the_request_at_hand_has_open_are_not_read_for_the_next_one_too(
    cold: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches = Fetches(cold, monkeypatch)
    shared = [{"query": "?", "chunks": TEXTS[:2]}, {"query": "And?", "chunks": TEXTS[1:3]}]
    answers = list(cold.generate_many(shared, max_new_tokens=1))
    assert [a.report.missed for a in answers] == [0, 0]
    assert sorted(fetches.seen) == [(n, layer, len(TEXTS[n])) for n in range(3) for layer in range(3)]


def test_a_chunk_that_a_request_has_read_meanwhile_is_not_read_again(
    cold: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on disk alone when it was opened to be read ahead, and is in memory when its rows are to be read."""
    fetches, real = Fetches(cold, monkeypatch), cold.store.open
    opened, done = threading.Event(), threading.Event()

    def open_(key: Any, **kwargs: Any) -> Any:
        reader = real(key, **kwargs)
        if threading.current_thread().name.startswith("cachetune-prefetch"):
            opened.set()
            assert done.wait(PATIENCE)
        return reader

    monkeypatch.setattr(cold.store, "open", open_)
    job = cold.prefetch(TEXTS[:1])
    assert opened.wait(PATIENCE)
    assert cold.prefill(query="?", chunks=TEXTS[:1]).report.missed == 0
    done.set()
    assert job.wait(PATIENCE)
    assert sorted(fetches.seen) == [(0, layer, len(TEXTS[0])) for layer in range(3)]


class Fetches:
    """What is really read from files: (chunk, layer, rows), in order; chunks by their number in `TEXTS`."""

    def __init__(self, engine: CacheTune, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[int, int, int]] = []
        numbers = {str(key_of(engine, text)): number for number, text in enumerate(TEXTS)}
        real = DiskReader.fetch

        def fetch(reader: DiskReader, layer: int, rows: int) -> int:
            self.seen.append((numbers[str(reader.key)], layer, rows))
            return real(reader, layer, rows)

        monkeypatch.setattr(DiskReader, "fetch", fetch)


@pytest.mark.parametrize("at", range(6))
def test_a_request_goes_on_from_what_was_read_ahead_of_it(
    cold: CacheTune, disk: Disk, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Whichever read is under way when it comes: nothing is read twice."""
    fetches = Fetches(cold, monkeypatch)
    monkeypatch.setattr(batch_work, "THREADS", 1)
    layers = cold.adapter.num_layers
    assert 2 * layers == 6
    disk.hold = lambda _key: len(disk.reads) == at + 1 and len(fetches.seen) == at
    job = cold.prefetch(TEXTS[:2])
    disk.wait_for(lambda: len(disk.reads) == at + 1)
    found: list[Any] = []
    request = threading.Thread(target=lambda: found.append(cold.prefill(query="?", chunks=TEXTS[:2])))
    request.start()
    while cold.runtime.prefetcher.coming:
        request.join(0.01)  # until they are the request's
    assert not job.wait(0)
    disk.release()
    request.join(PATIENCE)
    assert job.wait(PATIENCE)
    assert sorted(fetches.seen) == [(n, layer, len(TEXTS[n])) for n in range(2) for layer in range(layers)]
    whole = {"host"} if at == 5 else set()  # the first chunk was, when the request came
    assert set(found[0].report.bytes_read) == {"disk"} | whole
    cold.runtime.prefetcher.take([key_of(cold, text) for text in TEXTS])  # what the request left is in memory then
    assert in_host_memory(cold) == keys_of(cold, TEXTS[:2])
    with CacheTune(llama(), tokenizer()) as alone:
        alone.precompute([Document("a", TEXTS)])
        expected = alone.prefill(query="?", chunks=TEXTS[:2])
    assert float((found[0].logits - expected.logits).abs().max()) <= 1e-5


def test_a_request_that_takes_over_reads_on_at_once_where_reading_ahead_stopped(tmp_path: Path) -> None:
    """Not only when what computes comes near: the disk would do nothing until then."""
    layers, there = 3 * READ_AHEAD, 2 * READ_AHEAD
    asked: list[int] = []

    class Pool(DeadlinePool):
        def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
            asked.append(args[1])
            return super().submit(work, *args, **kwargs)

    with CacheTune(llama(layers=layers), tokenizer(), tmp_path / "kv", host_budget=0) as engine:
        engine.precompute([Document("a", TEXTS[:1])])
        with closing(Pool(None)) as pool, engine.store.open(key_of(engine, TEXTS[0])) as reader:
            rows = reader.layout.tokens
            for layer in range(there):
                reader.read(layer, rows)
            buffers = engine.adapter.new_buffers(rows)
            loader = LayerLoader(engine.adapter, [Source(reader, 0, rows)], buffers, pool)
            loader.start_first_layers()
            assert asked == list(range(there, layers))
            for layer in range(layers):
                loader.load(layer)
            assert asked == list(range(there, layers))  # what was there is not read by a thread
            loader.close()
        with CacheTune(llama(layers=layers), tokenizer()) as alone:
            alone.precompute([Document("a", TEXTS[:1])])
            with alone.store.open(key_of(alone, TEXTS[0])) as reader:
                expected = alone.adapter.new_buffers(rows)
                whole = LayerLoader(alone.adapter, [Source(reader, 0, rows)], expected, alone.runtime.pool)
                for layer in range(layers):
                    whole.load(layer)
        for one, other in zip(
            buffers.key_rows + buffers.value_rows, expected.key_rows + expected.value_rows, strict=True
        ):
            assert torch.equal(one, other)


def test_the_first_layers_of_all_chunks_come_first(cold: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(cold, monkeypatch)
    monkeypatch.setattr(batch_work, "THREADS", 1)
    assert cold.prefetch(TEXTS).wait(PATIENCE)
    assert [(n, layer) for n, layer, _ in fetches.seen] == [(n, layer) for layer in range(3) for n in range(4)]


def test_what_the_request_will_read_comes_before_the_rest(cold: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = DiskReader.read

    def read(reader: DiskReader, layer: int, rows: int) -> torch.Tensor:
        seen.append(rows)
        return real(reader, layer, rows)

    monkeypatch.setattr(DiskReader, "read", read)
    monkeypatch.setattr(batch_work, "THREADS", 1)
    count = len(TEXTS[0])
    for selector, first in (("frequency", count - int(0.25 * count)), ("expected_error", count)):
        seen.clear()
        config = cold.runtime.admission.config(selector, 0.25)
        assert cold.runtime.executor.prefetch(cold.runtime.admission.chunk_ids(TEXTS[:1], None), config).wait(PATIENCE)
        assert seen[:3] == 3 * [first]
        assert in_host_memory(cold) == keys_of(cold, TEXTS[:1])
        cold.store.tier("host").remove(key_of(cold, TEXTS[0]))


def test_while_a_request_waits_for_the_disk_nothing_else_is_read(
    cold: CacheTune, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[bool] = []
    real = cold.adapter.selective_forward

    def forward(*args: Any) -> torch.Tensor:
        before = args[3]

        def watched(layer: int) -> None:
            paused.append(cold.runtime.prefetcher.paused)
            before(layer)

        return real(*args[:3], watched, *args[4:])

    monkeypatch.setattr(cold.adapter, "selective_forward", forward)
    cold.prefill(query="?", chunks=TEXTS[:1], ratio=0.5, selector="frequency")
    assert paused[0]
    assert not cold.runtime.prefetcher.paused

    priority, third = cold.runtime.prefetcher.priority(), key_of(cold, TEXTS[2])
    priority.claim()
    disk.reads.clear()
    job = cold.prefetch(TEXTS[2:3])
    while not cold.runtime.prefetcher.is_coming(third):
        assert not job.wait(0.001)
    assert str(third) not in disk.ahead()
    priority.release()
    assert job.wait(PATIENCE)
    assert in_host_memory(cold) >= {str(third)}


def test_requests_and_reading_ahead_share_chunks_without_harm(cold: CacheTune) -> None:
    """Prefetches that are given up or not, of the chunks that requests want at the same time."""
    wanted = {n: cold.prefill(query="?", chunks=TEXTS[: n + 1]).logits for n in range(4)}
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        randoms = random.Random(seed)
        try:
            for _ in range(30):
                job = cold.prefetch(randoms.sample(TEXTS, randoms.randint(1, 4)))
                if randoms.random() < 0.5:
                    job.cancel()
                number = randoms.randrange(4)
                state = cold.prefill(query="?", chunks=TEXTS[: number + 1])
                assert state.report.missed == 0
                assert float((state.logits - wanted[number]).abs().max()) <= 1e-5
                for text in randoms.sample(TEXTS, 2):
                    cold.store.tier("host").remove(key_of(cold, text))
                if randoms.random() < 0.3:
                    assert job.wait(PATIENCE)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors, errors
    cold.runtime.prefetcher.close()
    assert not cold.runtime.prefetcher.coming
    assert not cold.runtime.prefetcher.paused
    assert cold.store.stats().disk.pinned == 0  # type: ignore[union-attr]


def test_a_bad_request_is_refused_on_its_turn(cold: CacheTune) -> None:
    answers = cold.generate_many([REQUESTS[0], {"query": "?", "chunks": "no list"}, REQUESTS[1]], max_new_tokens=1)
    assert next(answers).report.missed == 0
    with pytest.raises(ConfigError, match=r"chunks is a string.*use a list of strings"):
        next(answers)
    assert list(answers) == []
    answers = cold.generate_many([REQUESTS[0], "How many?"], max_new_tokens=1)
    next(answers)
    with pytest.raises(ConfigError, match="a request is a str: use a dict"):
        next(answers)
    answers = cold.generate_many([REQUESTS[0], {"query": "?", "chunks": ["\ud800"]}], max_new_tokens=1)
    next(answers)
    with pytest.raises(PromptError):
        next(answers)


def test_an_error_of_the_iterable_comes_after_the_answers_before_it(cold: CacheTune) -> None:
    def requests() -> Iterator[Any]:
        yield REQUESTS[0]
        raise KeyError("the retriever failed")

    answers = cold.generate_many(requests(), max_new_tokens=1)
    next(answers)
    with pytest.raises(KeyError, match="retriever"):
        next(answers)


def test_chunks_that_fail_as_they_come_fail_on_their_requests_turn(cold: CacheTune) -> None:
    def chunks() -> Iterator[str]:
        yield TEXTS[0]
        raise KeyError("the retriever failed")

    answers = cold.generate_many([REQUESTS[0], {"query": "?", "chunks": chunks()}], max_new_tokens=1)
    next(answers)
    with pytest.raises(KeyError, match="retriever"):
        next(answers)


def test_a_request_that_is_none_ends_nothing_in_silence(cold: CacheTune) -> None:
    answers = cold.generate_many([REQUESTS[0], None, REQUESTS[1]], max_new_tokens=1)
    next(answers)
    with pytest.raises(ConfigError, match="a request is a NoneType: use a dict"):
        next(answers)


@pytest.mark.parametrize("requests", [5, None, "Who?", {"query": "Who?"}])
def test_what_is_no_list_of_requests_is_refused_at_once(cold: CacheTune, requests: Any) -> None:
    with pytest.raises(ConfigError, match="use a list"):
        cold.generate_many(requests)


def test_arguments_of_a_request_have_names(cold: CacheTune) -> None:
    with pytest.raises(ConfigError, match="an argument named 5"):
        list(cold.generate_many([{5: "Who?"}]))


def test_prompts_and_no_requests(cold: CacheTune) -> None:
    assert list(cold.generate_many([])) == []
    prompt = cold.prompts.build(query="Who built it?", chunks=TEXTS[:2])
    (one,) = cold.generate_many([prompt], max_new_tokens=3)
    assert one.token_ids == cold.generate(prompt=prompt, max_new_tokens=3).token_ids
    (full,) = cold.generate_many([REQUESTS[1]], reuse=False, max_new_tokens=1)
    assert full.report.full


# -- giving up --------------------------------------------------------------------------------------------------------


def test_a_generator_that_is_given_up_stops_reading(
    cold: CacheTune, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = keys_of(cold, TEXTS[2:])
    disk.hold = second.__contains__
    monkeypatch.setattr(batch_work, "THREADS", 2)  # so that not all is under way at once
    answers = cold.generate_many(REQUESTS[:2], max_new_tokens=1)
    next(answers)
    disk.wait_for(lambda: bool(second & disk.ahead()))
    answers.close()  # type: ignore[attr-defined]
    disk.release()
    cold.runtime.prefetcher.close()  # waits for what had begun
    assert not in_host_memory(cold) & second
    assert cold.store.stats().disk.pinned == 0  # type: ignore[union-attr]
    assert cold.generate(**REQUESTS[1], max_new_tokens=1).report.missed == 0  # type: ignore[arg-type]


def test_closing_the_engine_ends_what_is_being_read(
    cold: CacheTune, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.hold = lambda _key: True
    monkeypatch.setattr(batch_work, "THREADS", 2)
    job = cold.prefetch(TEXTS)
    disk.wait_for(lambda: bool(disk.ahead()))
    closing = threading.Thread(target=cold.close)
    closing.start()
    while not cold.runtime.prefetcher.closing:
        closing.join(0.01)
    disk.release()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert job.wait(0)
    assert job.bytes == 0
    assert len(disk.reads) <= 2  # those that had begun
    with pytest.raises(EngineClosedError):
        cold.prefetch(TEXTS)
    with pytest.raises(EngineClosedError):
        cold.generate_many(REQUESTS)


def test_what_a_request_left_is_given_up_by_close_too(cold: CacheTune, disk: Disk) -> None:
    state = cold.runtime.executor.prefill(Request.measured(cold.prompts.build(query="?", chunks=TEXTS), _frequency()))
    cold.close()
    assert state.report.missed == 0
    assert cold.runtime.prefetcher.leftovers.waiting == 0


def _frequency() -> Any:
    from cachetune_rag.reuse.config import ReuseConfig

    return ReuseConfig("frequency", 0.5)


# -- bounds and failures ------------------------------------------------------------------------------------------


def test_it_fills_no_more_than_the_host_budget_and_keeps_what_came_first(tmp_path: Path, disk: Disk) -> None:
    with opened(tmp_path) as engine:
        assert engine.prefetch(TEXTS).wait(PATIENCE)
        sizes = [engine.store.touch_host(key_of(engine, text)) for text in TEXTS]
    budget = sizes[0] + sizes[1] + sizes[2] // 2
    with CacheTune(llama(), tokenizer(), tmp_path / "kv", host_budget=budget) as engine:
        job = engine.prefetch(TEXTS)
        assert job.wait(PATIENCE)
        assert in_host_memory(engine) == keys_of(engine, TEXTS[:2])
        assert job.bytes == sizes[0] + sizes[1]
        assert engine.store.stats().host.bytes <= budget
        assert engine.store.stats().host.evictions == 0


def test_a_bound_of_ones_own_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        keys = [key_of(engine, text) for text in TEXTS]
        assert engine.prefetch(TEXTS[:1]).wait(PATIENCE)
        size = engine.store.touch_host(keys[0])
        store = engine.store
        prefetcher = Prefetcher(store, limit=size + size // 2)
        job = prefetcher.fetch(lambda: keys)
        assert job.wait(PATIENCE)
        prefetcher.close()
        # The first is there already: it takes its part of the bound, and nothing is read for it.
        assert in_host_memory(engine) == {str(keys[0])}
        assert job.bytes == 0


def test_without_host_memory_nothing_is_read_ahead(tmp_path: Path, disk: Disk) -> None:
    with opened(tmp_path, host_budget=0) as engine:
        job = engine.prefetch(TEXTS)
        assert job.wait(0)
        answers = list(engine.generate_many(REQUESTS, max_new_tokens=1))
        assert [a.report.missed for a in answers] == [0, 0, 0]
        assert disk.ahead() == set()


def test_a_read_that_fails_is_no_error_and_the_request_handles_the_damage(tmp_path: Path, disk: Disk) -> None:
    with opened(tmp_path) as engine:
        bad = str(key_of(engine, TEXTS[2]))
        disk.fail = lambda key: key == bad
        job = engine.prefetch(TEXTS[2:])
        assert job.wait(PATIENCE)
        assert in_host_memory(engine) == keys_of(engine, TEXTS[3:])
        assert engine.store.stats().damaged == 0
        (answer,) = engine.generate_many([REQUESTS[1]], max_new_tokens=3)
        assert (answer.report.damaged, answer.report.missed) == (1, len(TEXTS[2]))
        expected = engine.generate(**REQUESTS[1], max_new_tokens=3, reuse=False)  # type: ignore[arg-type]
        assert answer.report.recomputed + answer.report.reused == len(TEXTS[3])
        assert expected.report.full


def test_damage_in_what_a_request_left_is_set_aside(tmp_path: Path, disk: Disk) -> None:
    with opened(tmp_path) as engine:
        bad = str(key_of(engine, TEXTS[0]))
        disk.fail = lambda key: key == bad and threading.current_thread().name.startswith("cachetune-prefetch")
        engine.runtime.executor.prefill(
            Request.measured(engine.prompts.build(query="?", chunks=TEXTS[:1]), _frequency())
        )
        disk.wait_for(lambda: bad in disk.ahead())
        engine.runtime.prefetcher.take([key_of(engine, TEXTS[0])])
        assert engine.store.stats().damaged == 1
        assert engine.prefill(query="?", chunks=TEXTS[:1]).report.missed == len(TEXTS[0])


def test_chunks_that_are_not_stored_are_left_to_the_request(cold: CacheTune) -> None:
    assert cold.prefetch(["This was never stored.", TEXTS[0], ""]).wait(PATIENCE)
    assert in_host_memory(cold) == keys_of(cold, TEXTS[:1])


def test_what_cannot_be_fetched_is_refused_by_name(cold: CacheTune) -> None:
    with pytest.raises(ConfigError, match=r"chunks is a string.*use a list of strings"):
        cold.prefetch("text")
    with pytest.raises(ConfigError, match="either chunks="):
        cold.prefetch(TEXTS, prompt=cold.prompts.build(query="?", chunks=TEXTS))
    assert cold.prefetch(prompt=cold.prompts.build(query="?", chunks=TEXTS[:1])).wait(PATIENCE)
    assert in_host_memory(cold) == keys_of(cold, TEXTS[:1])


def test_a_prefetch_counts_as_no_hit_where_the_chunk_is_in_memory() -> None:
    with ChunkStore(None) as store, CacheTune(llama(), tokenizer(), store) as engine:
        engine.precompute([Document("a", TEXTS)])
        before = store.stats().hits
        assert engine.prefetch(TEXTS).wait(PATIENCE)
        assert store.stats().hits == before
