"""An answer piece by piece, computed as its reader asks for the pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from cachetune_rag.answering.answer import Answer
from cachetune_rag.answering.decoding import decode_text
from cachetune_rag.answering.executor import Executor
from cachetune_rag.answering.request import Finished, Request
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.model.libraries.neutral import each_neutrally
from cachetune_rag.report import Report
from cachetune_rag.reuse.state import PrefillState
from cachetune_store.printing import shown


class AnswerStream:
    """Text pieces of one answer, computed as they are asked for. An iterator and a context manager.

    Nothing runs between two pieces, so a stream that is given up costs nothing; `close()` ends it early. The chunks that its request
    missed are stored all the same. One thread reads it at a time; it can't be pickled or copied.
    """

    def __init__(self, executor: Executor, request: Request):
        self._run = _Run(executor, request)
        # The generator doesn't refer to this object, so a stream that nobody holds any more ends at once, and not at the next
        # garbage collection.
        self._pieces = self._run.pieces()

    @property
    def looked_up(self) -> Callable[[], None]:
        """Called once the prompt's chunks are open; set it before the first piece is read."""
        return self._run.chunks_open

    @looked_up.setter
    def looked_up(self, call: Callable[[], None]) -> None:
        if not callable(call):
            raise ConfigError(f"looked_up is {shown(call)}: use a function without arguments.")
        self._run.chunks_open = call

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._run.check_process()
        with self._run.entered():
            return next(self._pieces)

    @property
    def report(self) -> Report:
        """What happened to the prompt; available once the first piece was read."""
        if self._run.report is None:
            raise CacheTuneError("the report is there once the first piece was read: iterate first.")
        return self._run.report

    @property
    def answer(self) -> Answer:
        """The whole answer; available once the last piece was read."""
        if self._run.answer is None:
            raise CacheTuneError("the answer is not finished: read all pieces first.")
        return self._run.answer

    def close(self) -> None:
        """End the answer here. In a process that was forked since the stream was made, this does nothing."""
        if not self._run.origin.here:
            return
        with self._run.entered():
            self._run.closing = True
            self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheTuneError(
            "a stream can't be pickled or copied: it runs on an engine of this process. Read it to its end, and send its answer."
        )


class _Run:
    """The state of one answer while it is computed.

    Attributes:
        report: what happened to the prompt; None before the first token.
        answer: the whole answer; None before its end.
        chunks_open: called once the prompt's chunks are open.
        closing: whether the stream's holder is closing it (and not the garbage collector).
        origin: the process that the stream was made in.
    """

    def __init__(self, executor: Executor, request: Request):
        self._executor, self._request = executor, request
        self._reader = threading.Lock()
        self.origin = this_process()
        self.report: Report | None = None
        self.answer: Answer | None = None
        self.chunks_open: Callable[[], None] = lambda: None
        self.closing = False

    def check_process(self) -> None:
        """Refuse use in another process than the one the stream was made in.

        Raises:
            ForkedError: it is another one.
        """
        self.origin.check("the stream", "its engine stayed there")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Held while the stream is read or closed; another thread is refused meanwhile."""
        if not self._reader.acquire(blocking=False):
            raise CacheTuneError(
                "the stream is being read already, by another thread or from within: read it on one thread at a time."
            )
        try:
            yield
        finally:
            self._reader.release()

    def pieces(self) -> Generator[str]:
        """The pieces; between two of them, background work stays away from the model."""
        self._executor.check_open()
        with self._executor.reserved():
            state = self._executor.prefill(self._request, self.chunks_open)
            try:
                yield from self._decode(state)
            finally:
                if self.answer is None:
                    self._end_early(state)

    def _decode(self, state: PrefillState) -> Generator[str]:
        executor, request, read = self._executor, self._request, time.perf_counter()
        assert request.decoding is not None  # a request for an answer has it
        tokens: list[int] = []
        text: list[str] = []
        step = executor.steps(state, request.new_tokens)
        # The caller's torch settings hold between two pieces.
        for decoded in each_neutrally(decode_text(step, request.decoding, state.logits)):
            if not tokens:
                # Choosing the first token is part of waiting for it.
                now = time.perf_counter()
                timings = {**state.report.timings, "choose": now - read}
                self.report = replace(state.report, ttft=now - request.started, timings=timings)
                executor.prefilled(request, self.report)
            tokens.append(decoded.token)
            if decoded.text:
                text.append(decoded.text)
                yield decoded.text
        assert self.report is not None  # an answer has a token at least
        self._finish(state, self.report, Answer("".join(text), self.report, tuple(tokens), decoded.finish_reason))

    def _end_early(self, state: PrefillState) -> None:
        if self.closing and self.report is not None:
            self._finish(state, self.report, None)
        else:
            # Perhaps on a thread that is collecting garbage in the middle of other work.
            self._executor.abandon(self._request, state)

    def _finish(self, state: PrefillState, report: Report, answer: Answer | None) -> None:
        seconds = time.perf_counter() - self._request.started
        end = self._executor.finish(Finished(self._request, state, report, answer, seconds))
        self.report, self.answer = end.report, end.answer
