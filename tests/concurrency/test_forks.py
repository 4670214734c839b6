"""An engine made before a fork: refused in the child at once, and undisturbed in the parent."""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document, ForkedError
from cachetune_rag.concurrency.workers import Workers
from cachetune_rag.model import shared
from cachetune_store import ChunkReader, StoreForkedError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
CHUNKS = [f"Passage {i}: the lighthouse was built in 187{i} by three brothers." for i in range(3)]
QUICK = 20
"""Seconds that nothing in a child may take; what it does takes none, but the machine may be busy."""


def in_child(work: Callable[[], Any]) -> str:
    """What `work` returned in a forked child, or the error that it raised; "hung" if it took too long."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(into, said.encode()[:60000])
        os._exit(0)
    os.close(into)
    try:
        if not select.select([out], [], [], QUICK)[0]:
            os.kill(child, signal.SIGKILL)
            return "hung"
        return os.read(out, 1 << 16).decode()
    finally:
        os.close(out)
        os.waitpid(child, 0)


@pytest.fixture(params=["on disk", "on disk, no timeout", "in memory"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CacheTune]:
    store = None if request.param == "in memory" else tmp_path / "kv"
    timeout = None if "no timeout" in request.param else 30.0
    with CacheTune(
        llama(), tokenizer(), store, lead_in="first_token", host_budget=0 if store else "1GiB", read_timeout=timeout
    ) as made:
        made.precompute(Document("d", CHUNKS))
        made.generate("Who?", CHUNKS, max_new_tokens=2)  # all its threads are there
        yield made


LOCKS = (type(threading.Lock()), type(threading.RLock()))


def iter_readers(engine: CacheTune) -> Iterator[ChunkReader]:
    """Open chunks."""
    for document in engine.documents():
        for key in document.chunks:
            reader = engine.store.open(key)
            assert reader is not None
            yield reader


def connections() -> list[Any]:
    """All of this process's to databases."""
    return [each for each in gc.get_objects() if type(each).__name__ == "Connections"]


def every_use(engine: CacheTune, stream: Any) -> list[Callable[[], Any]]:
    prompt = engine.prompts.build(query="Who?", chunks=CHUNKS)
    return [
        lambda: engine.generate("Who?", CHUNKS),
        lambda: engine.stream("Who?", CHUNKS),
        lambda: next(stream),
        lambda: engine.generate_many([prompt]),
        lambda: engine.prefill("Who?", CHUNKS),
        lambda: engine.full_prefill("Who?"),
        lambda: engine.prefetch(CHUNKS),
        lambda: engine.precompute(CHUNKS),
        lambda: engine.remove("d"),
        lambda: engine.documents(),
        lambda: engine.prompt_from_text("Who?"),
        lambda: engine.prompt_from_messages([{"role": "user", "content": "Who?"}]),
        lambda: engine.warmup(),
        lambda: engine.calibrate([prompt]),
        lambda: engine.calibrated_ratio(),
        lambda: engine.tune([prompt]),
        lambda: engine.flush(),
        lambda: engine.stats(),
        lambda: engine.ttft_histograms(),
        lambda: engine.namespace,
        lambda: engine.model_changed(),
        lambda: engine.ttft_histograms(),
        lambda: engine.prompts.build(query="Who?", chunks=CHUNKS),
        lambda: engine.prompts.build_messages([{"role": "user", "content": "Who?"}]),
        lambda: engine.prompts.build_text(["Who?"]),
        lambda: engine.prompts.encode("Who?"),
        lambda: engine.prompts.split_template("Who?"),
        lambda: engine.lead_ins.namespace,
        lambda: engine.lead_ins.choose_from([[5, 6]], indexing=True),
        lambda: engine.profiles.load("ratio", {}),
        lambda: engine.profiles.save("ratio", {}, {}),
    ]


def test_every_use_is_refused_at_once_and_the_parent_goes_on(engine: CacheTune) -> None:
    stream = engine.stream("Who?", CHUNKS, max_new_tokens=50, eos_token_id=[])
    next(stream)
    uses = every_use(engine, stream)

    def try_all() -> list[int]:
        accepted = []
        for i, use in enumerate(uses):
            try:
                use()
            except ForkedError as error:
                if "post_fork" in str(error):
                    continue
            accepted.append(i)
        return accepted

    assert in_child(try_all) == "[]"
    rest = list(stream)
    assert rest
    assert engine.generate("Who?", CHUNKS, max_new_tokens=2).report.missed == 0


def locks_of(root: Any) -> list[Any]:
    """Every lock that `root` has, itself or in what it consists of."""
    found, seen, todo = [], {id(root)}, [root]
    while todo:
        each = todo.pop()
        if isinstance(each, LOCKS):
            found.append(each)
        ours = type(each).__module__.split(".")[0] in ("cachetune_rag", "cachetune_store", "threading")
        if ours or isinstance(each, (dict, list, tuple, set, *LOCKS)):
            for part in gc.get_referents(each):
                if id(part) not in seen and not isinstance(part, type | ModuleType | FunctionType | str | int):
                    seen.add(id(part))
                    todo.append(part)
    return found


@contextmanager
def held_elsewhere(locks: list[Any]) -> Iterator[None]:
    """Hold those that nobody holds, on another thread."""
    ready, over = threading.Event(), threading.Event()

    def hold() -> None:
        mine = [lock for lock in locks if lock.acquire(blocking=False)]
        ready.set()
        over.wait()
        for lock in mine:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_no_lock_that_another_thread_held_at_the_fork_is_waited_for(engine: CacheTune) -> None:
    stream = engine.stream("Who?", [*CHUNKS, "This one is missed."], max_new_tokens=50, eos_token_id=[])
    next(stream)
    prefetch, reader = engine.prefetch(CHUNKS), next(iter_readers(engine))
    uses = every_use(engine, stream)

    def try_all() -> str:
        accepted = []
        for i, use in enumerate(
            [*uses, lambda: reader.read(0, 1), lambda: engine.store.stats(), lambda: engine.store.revision()]
        ):
            try:
                use()
            except (ForkedError, StoreForkedError):
                continue
            accepted.append(i)
        prefetch.cancel()
        stream.close()
        reader.close()
        engine.store.settle_memory()
        engine.close()
        return str(accepted)

    given = [engine, stream, prefetch, reader]

    def leave() -> str:
        given.clear()
        uses.clear()
        gc.collect()
        return "left"

    # A fork waits for what holds these, rather than leave them held.
    waited_for = {id(engine.runtime.model.lock)} | {id(lock) for c in connections() for lock in locks_of(c)}
    locks = [lock for lock in locks_of([engine, stream, prefetch, reader]) if id(lock) not in waited_for]
    assert len(locks) > 20
    with held_elsewhere(locks):
        assert in_child(try_all) == "[]"
        assert in_child(leave) == "left"
    reader.close()
    assert list(stream)
    assert engine.flush(60)


def test_closing_and_collecting_in_the_child_release_nothing(engine: CacheTune) -> None:
    stream = engine.stream("Who?", [*CHUNKS, "This one is missed."], max_new_tokens=50, eos_token_id=[])
    next(stream)
    given = [engine, stream]

    def leave() -> str:
        given[1].close()
        with given[0]:
            pass
        given[0].close()
        given.clear()
        gc.collect()
        return "left"

    assert in_child(leave) == "left"
    assert in_child(lambda: (engine.close(), gc.collect(), "left")[2]) == "left"
    assert list(stream)
    assert engine.flush(60)
    assert engine.generate("Who?", [*CHUNKS, "This one is missed."], max_new_tokens=2).report.missed == 0


def test_a_fork_in_the_middle_of_requests_and_of_storing(engine: CacheTune) -> None:
    over = threading.Event()
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for i in range(10**6):
                if over.is_set():
                    return
                engine.generate("Who?", [*CHUNKS, f"Only {thread} misses this, {i}."], max_new_tokens=3)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            assert in_child(lambda: engine.generate("Who?", CHUNKS)).startswith("ForkedError: ")
            assert in_child(lambda: (engine.close(), gc.collect(), "left")[2]) == "left"
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not failed


def test_an_engine_made_in_the_child_works_and_both_answer_alike(tmp_path: Path) -> None:
    model = llama()
    with CacheTune(model, tokenizer(), tmp_path / "kv", lead_in="first_token") as engine:
        engine.precompute(Document("d", CHUNKS))
        answer = engine.generate("Who?", CHUNKS, max_new_tokens=4)

        def anew() -> str:
            with CacheTune(model, tokenizer(), tmp_path / "kv", lead_in="first_token") as own:
                got = own.generate("Who?", CHUNKS, max_new_tokens=4)
            return f"{got.token_ids} {got.report.reused}"

        assert in_child(anew) == f"{answer.token_ids} {answer.report.reused}"
        assert engine.generate("Who?", CHUNKS, max_new_tokens=4).token_ids == answer.token_ids


def _use(engine: CacheTune, results: Any) -> None:
    try:
        results.put(str(engine.generate("Who?", CHUNKS)))
    except ForkedError as error:
        results.put(f"{error}")


def test_multiprocessing_by_fork(engine: CacheTune) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_use, args=(engine, results))
    process.start()
    assert "by 'spawn'" in results.get(timeout=QUICK)
    process.join(QUICK)
    assert process.exitcode == 0


def test_a_child_that_ends_as_processes_do_ends(tmp_path: Path) -> None:
    """Not by os._exit: exit handlers and finalisers run, while the parent has chunks waiting to be stored."""
    code = """
import os, sys
from tiny import llama, tokenizer
from cachetune_rag import CacheTune
from cachetune_rag.chunks import backfill
backfill.PATIENCE = 1e6
engine = CacheTune(llama(), tokenizer(), sys.argv[1], lead_in="first_token", fidelity_sample=1.0)
with engine.runtime.model.lock.reserved():
    engine.generate("Who?", ["A passage.", "Another."], max_new_tokens=2)
    child = os.fork()
    if child == 0:
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), engine.stats().storing)
engine.close()
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "kv")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["7", "2"], done.stderr


def test_workers_of_another_process_are_refused_rather_than_waited_for() -> None:
    release = threading.Event()
    with Workers(1, "test") as workers:
        job = workers.submit(release.wait, 60)
        began = time.monotonic()
        assert in_child(lambda: job.result()).startswith("ForkedError")
        assert in_child(lambda: workers.submit(int)).startswith("ForkedError")
        assert in_child(workers.shutdown) == "None"
        assert time.monotonic() - began < 3 * QUICK
        release.set()
        assert job.result() is True


def test_torch_computes_with_several_threads_in_a_child_of_a_process_that_did() -> None:
    """GNU's OpenMP would wait for the parent's threads for ever."""
    code = """
import os, signal, torch
import cachetune_rag.model.shared
torch.set_num_threads(2)
numbers = torch.ones(1 << 20)
expected = float((numbers + numbers).sum())
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(7 if float((numbers + numbers).sum()) == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), float((numbers + numbers).sum()) == expected)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["7", "True"], done.stderr


def test_an_engine_is_refused_in_a_child_that_was_forked_in_the_middle_of_a_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch had locked then is locked for ever there."""
    model = llama()
    with CacheTune(model, tokenizer(), None, lead_in="first_token") as engine:
        with held_elsewhere([engine.runtime.model.lock]), monkeypatch.context() as patch:
            patch.setattr(shared, "FORK_SECONDS", 0.01)
            said = in_child(lambda: CacheTune(model, tokenizer(), None))
        assert said.startswith("ForkedError: ")
        assert "spawn" in said
        assert "ForkedError" not in in_child(lambda: CacheTune(model, tokenizer(), None))
        assert engine.generate("Who?", CHUNKS, max_new_tokens=2).report.missed
