"""Forks: a process with an open engine is forked again and again, at random moments, while its threads use the engine.

In the child every public method of what it inherited is refused, closing and collecting it is quick, or an engine of the child's own
on the parent's model and store answers as a fresh one does. In the parent nothing changes: its threads' answers stay right, and the
store whole.
"""

from __future__ import annotations

import faulthandler
import gc
import inspect
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from soak_common import RATIO, SELECTOR, Corpus, Outcome, Worker

from cachetune_rag import CacheTune, ForkedError, StoreForkedError

AT_ONCE = 10.0
"""Seconds within which what should come at once has come, on a busy machine too."""
SECONDS = 60.0
"""A child that takes longer hangs."""
HARMLESS = {"close", "from_pretrained", "settle_memory"}
"""Methods that need not be refused."""
KINDS = ("use", "leave", "own engine")


def run(folder: Path, *, forks: int, seed: int = 0, corpus: Corpus | None = None) -> Outcome:
    """Fork `forks` times."""
    started = time.perf_counter()
    outcome, corpus, rng = Outcome("forks"), corpus or Corpus(prompts=2), random.Random(seed)
    counts, stop, longest = dict.fromkeys(("answers", "streams", "documents"), 0), threading.Event(), 0.0
    with corpus.engine(folder / "store", host_budget=0, fidelity_sample=0.5) as engine:
        documents = [prompt.document for prompt in corpus.prompts]
        engine.precompute(documents)
        at_hand = [*_stream(corpus, engine), *_adapters(engine), engine]

        def answer() -> None:
            wrong = corpus.generate(engine, counts["answers"] % len(corpus.prompts))
            assert wrong is None, wrong
            counts["answers"] += 1

        def stream() -> None:
            for each in _stream(corpus, engine):
                each.close()
            counts["streams"] += 1

        def index() -> None:
            document = documents[counts["documents"] % len(documents)]
            engine.remove(document.id)
            engine.precompute(document)
            counts["documents"] += 1

        def repeat(work: Callable[[], None]) -> None:
            while not stop.is_set():
                try:
                    work()
                except Exception as error:
                    outcome.problems.append(f"parent: {type(error).__name__}: {error}")
                    return

        threads = [threading.Thread(target=repeat, args=[work], daemon=True) for work in (answer, stream, index)]
        for thread in threads:
            thread.start()
        slowest = dict.fromkeys(KINDS, 0.0)
        for number in range(forks):
            time.sleep(rng.uniform(0.0, 0.1))
            kind, begun = KINDS[number % len(KINDS)], time.perf_counter()
            worker = Worker(lambda tell, kind=kind: _child(kind, corpus, folder / "store", at_hand, tell))  # type: ignore[misc]
            longest = max(longest, time.perf_counter() - begun)
            status = worker.join(SECONDS)
            if status is None:
                worker.kill()
                worker.join(SECONDS)
            found = [message for (message,) in worker.of_kind("error")]
            outcome.expect(status == 0, f"fork {number} ({kind}): {'; '.join(found) or 'the child hangs'}")
            slowest[kind] = max([slowest[kind], *(seconds for (seconds,) in worker.of_kind("slowest"))])
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
            outcome.expect(not thread.is_alive(), "a thread of the parent's hangs")
        rest = list(at_hand[0])  # of the stream that was begun before all forks
        outcome.expect(rest, "a stream that was open at the forks ends early")
        engine.precompute(documents)
        engine.flush()
        report = engine.store.verify()
        outcome.expect((report.damaged, report.adopted, report.dropped) == ((), 0, 0), f"the store: {report}")
        for number in range(len(corpus.prompts)):
            wrong = corpus.ask(engine, number)
            outcome.expect(wrong is None, f"at the end: {wrong}")
    outcome.figures |= {"forks": forks, **counts, "longest fork": round(longest, 3)}
    outcome.figures |= {f"slowest: {kind}": round(seconds, 4) for kind, seconds in slowest.items()}
    outcome.seconds = time.perf_counter() - started
    return outcome


def _stream(corpus: Corpus, engine: CacheTune) -> Iterator[Any]:
    prompt = corpus.prompts[0]
    stream = engine.stream(
        prompt.query, prompt.chunks, ratio=RATIO, selector=SELECTOR, max_new_tokens=40, eos_token_id=[]
    )
    next(stream)
    yield stream


def _adapters(engine: CacheTune) -> list[Any]:
    """The engine as frameworks have it, where they are installed."""
    found: list[Any] = []
    try:
        from langchain_cachetune import ChatCacheTune

        found.append(ChatCacheTune(engine=engine))
    except ImportError:
        pass
    try:
        from llama_index.llms.cachetune import CacheTuneLLM

        found.append(CacheTuneLLM(engine))
    except ImportError:
        pass
    return found


def _child(kind: str, corpus: Corpus, store: Path, at_hand: list[Any], tell: Callable[..., None]) -> None:
    faulthandler.dump_traceback_later(SECONDS / 2)  # where it hangs
    if kind == "own engine":
        begun = time.perf_counter()
        with corpus.engine(store, host_budget=0) as own:
            for number in range(len(corpus.prompts)):
                wrong = corpus.ask(own, number)
                assert wrong is None, f"child: {wrong}"
        tell("slowest", time.perf_counter() - begun)
        return
    slowest = 0.0
    for name, use in _uses(at_hand) if kind == "use" else _leaving(at_hand):
        begun = time.perf_counter()
        refused = _is_refused(use)
        assert refused == (kind == "use"), f"{name} is {'refused' if refused else 'not refused'}"
        took = time.perf_counter() - begun
        assert took < AT_ONCE, f"{name} took {took:.1f} s"
        slowest = max(slowest, took)
    tell("slowest", slowest)


def _is_refused(use: Callable[[], Any]) -> bool:
    try:
        use()
    except (ForkedError, StoreForkedError):
        return True
    return False


def _uses(at_hand: list[Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every public method of what the parent has, called with nothing but what it demands: the fork is noticed first."""
    stream, *adapters, engine = at_hand
    yield "stream", lambda: next(stream)
    yield "engine.namespace", lambda: engine.namespace
    for owner, name in ((engine, "engine"), (engine.store, "store"), (engine.prompts, "prompts")):
        for method, function in inspect.getmembers(type(owner), inspect.isfunction):
            if method.startswith("_") or method in HARMLESS:
                continue
            parameters = list(inspect.signature(function).parameters.values())[1:]
            needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            places = [None for p in needed if p.kind is not p.KEYWORD_ONLY]
            named = {p.name: None for p in needed if p.kind is p.KEYWORD_ONLY}
            yield f"{name}.{method}", lambda o=owner, m=method, a=places, k=named: _all(getattr(o, m)(*a, **k))  # type: ignore[misc]
    for adapter in adapters:
        ask = adapter.invoke if hasattr(adapter, "invoke") else adapter.complete
        yield type(adapter).__name__, lambda ask=ask: ask("q?")  # type: ignore[misc]


def _all(result: Any) -> Any:
    """What a method returns; a generator is refused when it is asked for something."""
    return list(result) if inspect.isgenerator(result) else result


def _leaving(at_hand: list[Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    stream, engine = at_hand[0], at_hand[-1]
    yield "closing the stream", stream.close
    yield "closing the engine", engine.close
    yield "closing the store", engine.store.close
    yield "leaving the engine", partial(engine.__exit__, None, None, None)
    yield "collecting", gc.collect
