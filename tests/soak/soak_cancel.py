"""Cancelling: a request or job ends in the middle, wherever that is; nothing stays pinned, locked or hooked.

A signal comes at a random moment and raises KeyboardInterrupt wherever Python takes notice of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from soak_common import Corpus, Outcome, open_files

import cachetune_rag
import cachetune_store
from cachetune_rag import CacheTune

PACKAGES = tuple(str(Path(package.__file__).parent) for package in (cachetune_rag, cachetune_store))
STANDARD_LOCKS = ("threading.py", "_base.py", "thread.py", "queue.py", "contextlib.py")
PATIENCE = 30.0


def run(folder: Path, *, interrupts: int, cancels: int, seed: int = 0, corpus: Corpus | None = None) -> Outcome:
    """So many Ctrl-Cs, and cancelled tasks of each adapter."""
    started = time.perf_counter()
    outcome = Outcome("cancel")
    corpus = corpus or Corpus(prompts=2)
    _interrupts(outcome, corpus, folder / "interrupts", interrupts, random.Random(seed))
    _cancelled_tasks(outcome, corpus, folder / "tasks", cancels, random.Random(seed))
    outcome.seconds = time.perf_counter() - started
    return outcome


# -- Ctrl-C --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Send this process a signal that raises KeyboardInterrupt, as Ctrl-C does, after so long; not any more when this ends."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _where(error: BaseException) -> tuple[str, bool]:
    """The line that was interrupted, and whether it is in one of the standard library's locks, which would stay locked."""
    frames = traceback.extract_tb(error.__traceback__)[:-1]  # the last one is the signal's handler
    last = frames[-1] if frames else None
    ours = next((f for f in reversed(frames) if f.filename.startswith(PACKAGES)), None)
    place = f"{Path(ours.filename).name}:{ours.lineno} ({ours.name})" if ours else "nowhere"
    if last is None or last is ours:
        return place, False
    return f"{place}, in {Path(last.filename).name}:{last.lineno}", Path(last.filename).name in STANDARD_LOCKS


def _interrupts(outcome: Outcome, corpus: Corpus, path: Path, count: int, rng: random.Random) -> None:
    kinds: dict[str, Callable[[CacheTune], None]] = {
        "prefill": lambda engine: _prefill(corpus, engine),
        "generate": lambda engine: _generate(corpus, engine),
        "stream, closed": lambda engine: _stream(corpus, engine),
        "precompute": lambda engine: _precompute(corpus, engine),
    }
    raised = dict.fromkeys(kinds, 0)
    inside = 0
    with corpus.engine(path, host_budget="150KB") as engine:
        _refill(corpus, engine)
        took = {}
        for name, work in kinds.items():
            times = []
            for _ in range(3):
                started = time.perf_counter()
                work(engine)
                times.append(time.perf_counter() - started)
                _refill(corpus, engine)
            took[name] = sorted(times)[1]
        before = open_files()
        for number in range(count):
            name = list(kinds)[number % len(kinds)]
            try:
                with interrupted_after(rng.uniform(1e-4, 1.05 * took[name])):
                    kinds[name](engine)
                continue
            except KeyboardInterrupt as error:
                raised[name] += 1
                where, standard = _where(error)
                del error
            if standard:
                inside += 1
            _all_free(outcome, corpus, engine, f"{name} interrupted at {where}")
            if len(outcome.problems) > 10:
                break
        gc.collect()
        more = open_files() - before
        # Threads that were made since have each a connection to the index.
        outcome.expect(more <= 24, f"{more} more open files after {count} interrupts")
    outcome.figures |= {"interrupts": sum(raised.values()), "interrupted": raised, "in the library's locks": inside}


def _prefill(corpus: Corpus, engine: CacheTune) -> None:
    prompt = corpus.prompts[0]
    engine.prefill(query=prompt.query, chunks=prompt.chunks, ratio=0.2)


def _generate(corpus: Corpus, engine: CacheTune) -> None:
    prompt = corpus.prompts[1]
    engine.generate(query=prompt.query, chunks=prompt.chunks, max_new_tokens=4)


def _stream(corpus: Corpus, engine: CacheTune) -> None:
    prompt = corpus.prompts[1]
    with engine.stream(query=prompt.query, chunks=prompt.chunks, max_new_tokens=6) as stream:
        next(iter(stream), None)


def _precompute(corpus: Corpus, engine: CacheTune) -> None:
    engine.remove(corpus.prompts[0].document.id, missing_ok=True)
    engine.precompute([corpus.prompts[0].document])


def _refill(corpus: Corpus, engine: CacheTune) -> None:
    engine.precompute([prompt.document for prompt in corpus.prompts])


def _all_free(outcome: Outcome, corpus: Corpus, engine: CacheTune, name: str) -> None:
    """Nothing is held, and the next request is right, on this thread and on others."""
    until = time.monotonic() + PATIENCE
    if engine.store.stats().disk.pinned:
        gc.collect()
    while (pinned := engine.store.stats().disk.pinned) and time.monotonic() < until:
        time.sleep(0.005)
    outcome.expect(not pinned, f"{name}: {pinned} chunks stay pinned")
    said: list[str | None] = []

    def ask() -> None:
        try:
            _refill(corpus, engine)
            said.append(corpus.ask(engine, 0))
        except Exception as error:
            said.append(repr(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    outcome.expect(said == [None], f"{name}: the next request on another thread: {said or 'hangs'}")
    wrong = corpus.ask(engine, 1) if said else None
    outcome.expect(wrong is None, f"{name}: the next request: {wrong}")
    outcome.expect(not engine.runtime.model.lock.wanted, f"{name}: the model's lock still counts a request")


# -- cancelled tasks -----------------------------------------------------------------------------------------------------


def _cancelled_tasks(outcome: Outcome, corpus: Corpus, path: Path, count: int, rng: random.Random) -> None:
    with corpus.engine(path, host_budget="150KB") as engine:
        engine.precompute([prompt.document for prompt in corpus.prompts])
        forwards = _Forwards(engine)
        cancelled = dict.fromkeys(_tasks(engine, corpus), 0)
        for name, ask in _tasks(engine, corpus).items():
            for number in range(count):
                engine_busy = asyncio.run(_cancel_one(ask, forwards, 2 + rng.randrange(8)))
                cancelled[name] += 1
                # One token may have been about to begin.
                outcome.expect(
                    engine_busy <= 1, f"{name}: {engine_busy} tokens were computed after the task was cancelled"
                )
                _all_free(outcome, corpus, engine, f"{name} cancelled, {number}")
        outcome.figures |= {"cancelled tasks": cancelled}


def _tasks(engine: CacheTune, corpus: Corpus) -> dict[str, Callable[[], Any]]:
    from langchain_cachetune import ChatCacheTune
    from llama_index.llms.cachetune import CacheTuneLLM

    prompt = corpus.prompts[0]
    text = "\n\n".join([*prompt.chunks, prompt.query])
    index_llm = CacheTuneLLM(engine=engine, max_new_tokens=400)
    chat = ChatCacheTune(engine=engine, max_tokens=400)

    async def index_stream() -> None:
        async for _ in await index_llm.astream_complete(text):
            pass

    async def chat_stream() -> None:
        async for _ in chat.astream(text):
            pass

    return {
        "LlamaIndex acomplete": lambda: index_llm.acomplete(text),
        "LlamaIndex astream_complete": index_stream,
        "LangChain ainvoke": lambda: chat.ainvoke(text),
        "LangChain astream": chat_stream,
    }


class _Forwards:
    """Counts decoding steps."""

    def __init__(self, engine: CacheTune):
        self.count = 0
        steps = engine.runtime.executor.steps

        def counting(*arguments: Any) -> Callable[[int], Any]:
            step = steps(*arguments)

            def counted(token: int) -> Any:
                self.count += 1
                return step(token)

            return counted

        engine.runtime.executor.steps = counting  # type: ignore[method-assign]


async def _cancel_one(ask: Callable[[], Any], forwards: _Forwards, after: int) -> int:
    """Cancel once some tokens are there; how many were computed after that."""
    start = forwards.count
    task = asyncio.ensure_future(ask())
    while forwards.count < start + after and not task.done():
        await asyncio.sleep(0.001)
    task.cancel()
    at = forwards.count  # not before: this thread may have to wait for the interpreter in between
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.2)
    return forwards.count - at
