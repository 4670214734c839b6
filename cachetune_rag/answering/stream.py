"""An answer piece by piece, computed as its reader asks for the pieces."""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from cachetune_rag.answering.answer import Answer
from cachetune_rag.answering.decoding import decode_text
from cachetune_rag.answering.doubt import DoubtingSteps, Step
from cachetune_rag.answering.executor import Executor
from cachetune_rag.answering.request import Finished, Request
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.model.libraries.neutral import each_neutrally, neutrally
from cachetune_rag.report import ReadAgain, Report
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
        try:
            return next(self._pieces)
        except ValueError as error:
            _refuse_second_reader(error)
            raise

    @property
    def report(self) -> Report:
        """What happened to the prompt; available once the first piece was read. With `min_sure`, a later piece may change it: see `Report.read_again`."""
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
        try:
            self._pieces.throw(_ClosedByReader())
        except _ClosedByReader:
            return
        except ValueError as error:
            _refuse_second_reader(error)
            raise

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


class _ClosedByReader(Exception):
    """Ends an answer for its reader. The garbage collector ends it by GeneratorExit."""


def _refuse_second_reader(error: ValueError) -> None:
    """Say what Python means by "generator already executing".

    A lock of our own would do the same, but could stay locked: Ctrl-C may come between taking it and remembering to release it.

    Args:
        error: what reading or closing the generator has raised.
    """
    raised = error.__traceback__
    if raised is not None and raised.tb_next is None:  # by Python itself, and not by the code of the generator
        raise CacheTuneError(
            "the stream is being read already, by another thread or from within: read it on one thread at a time."
        ) from None


class _Run:
    """The state of one answer while it is computed.

    Attributes:
        report: what happened to the prompt; None before the first token.
        answer: the whole answer; None before its end.
        chunks_open: called once the prompt's chunks are open.
        origin: the process that the stream was made in.
    """

    _state: PrefillState
    """The prompt as it was read, there once it was."""

    def __init__(self, executor: Executor, request: Request):
        self._executor, self._request = executor, request
        self.origin = this_process()
        self.report: Report | None = None
        self.answer: Answer | None = None
        self.chunks_open: Callable[[], None] = lambda: None
        self._again: ReadAgain | None = None

    def check_process(self) -> None:
        """Refuse use in another process than the one the stream was made in.

        Raises:
            ForkedError: it is another one.
        """
        self.origin.check("the stream", "its engine stayed there")

    def pieces(self) -> Generator[str]:
        """The pieces; between two of them, background work stays away from the model."""
        self._executor.check_open()
        with self._executor.reserved():
            # Nothing else refers to the state, so that its memory is free once the prompt is read again.
            self._state = self._executor.prefill(self._request, self.chunks_open)
            ended_by_reader = False
            try:
                yield from self._decode()
            except (_ClosedByReader, CancelledError):  # a reader whose task was cancelled would close the stream next
                ended_by_reader = True
                raise
            finally:
                if self.answer is None:
                    self._end_early(ended_by_reader)

    def _decode(self) -> Generator[str]:
        executor, request, read = self._executor, self._request, time.perf_counter()
        assert request.decoding is not None  # a request for an answer has it
        tokens: list[int] = []
        text: list[str] = []
        step, logits = self._steps()
        # The caller's torch settings hold between two pieces.
        for decoded in each_neutrally(decode_text(step, request.decoding, logits)):
            if not tokens:
                # Choosing the first token is part of waiting for it, and so is reading the prompt again.
                now, report = time.perf_counter(), self._state.report
                phases = {} if self._again is None else {"read_again": self._again.seconds}
                phases["choose"] = now - read - sum(phases.values())
                self.report = replace(
                    report, ttft=now - request.started, timings={**report.timings, **phases}, read_again=self._again
                )
                executor.prefilled(request, self.report)
            tokens.append(decoded.token)
            if decoded.text:
                text.append(decoded.text)
                yield decoded.text
        assert self.report is not None  # an answer has a token at least
        self._finish(self.report, Answer("".join(text), self.report, tuple(tokens), decoded.finish_reason))

    @neutrally
    def _steps(self) -> tuple[Step, Tensor]:
        """The steps that decode the answer, and the logits that its first token is chosen by."""
        step, least = self._executor.steps(self._state, self._request.new_tokens), self._request.min_sure
        if least is None or not self._state.report.reused:  # what is computed whole is as sure as full prefill is
            return step, self._state.logits
        doubting = DoubtingSteps(step, least, self._read_again)
        del step  # it holds the memory of the first reading
        return doubting, doubting.first(self._state.logits)

    def _read_again(self, said: Sequence[int], sure: float) -> tuple[Tensor, Step]:
        """See `doubt.ReadAgain`."""
        executor, request, began = self._executor, self._request, time.perf_counter()
        assert request.min_sure is not None
        self._state = first = self._state.without_memory()
        full, logits = executor.read_again(request, said)
        self._state = replace(full, report=first.report, missed=first.missed)
        tokens = len(request.prompt.ids) + len(said)
        self._again = ReadAgain(len(said), sure, request.min_sure, tokens, time.perf_counter() - began)
        if self.report is not None:
            self.report = replace(self.report, read_again=self._again)
        executor.was_read_again(request, self._again)
        return logits, executor.steps(full, request.new_tokens - len(said))

    def _end_early(self, ended_by_reader: bool) -> None:
        if ended_by_reader and self.report is not None:
            self._finish(self.report, None)
        else:
            # Perhaps on a thread that is collecting garbage in the middle of other work.
            self._executor.abandon(self._request, self._state)

    def _finish(self, report: Report, answer: Answer | None) -> None:
        seconds = time.perf_counter() - self._request.started
        end = self._executor.finish(Finished(self._request, self._state, report, answer, seconds))
        self.report, self.answer = end.report, end.answer
