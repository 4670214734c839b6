"""Answers, whole and as they grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cachetune_rag.answering.decoding import DecodingPlan, decode_text
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.model.libraries.neutral import each_neutrally
from cachetune_rag.report import Report
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.text.prompts.prompt import Prompt

if TYPE_CHECKING:
    from cachetune_rag.answering.executor import RequestRunner
    from cachetune_rag.reuse.prefill import PrefillState


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without stop strings and special tokens.
        report: what happened to the prompt.
        token_ids: the generated tokens.
        finish_reason: "stop" (an end token or a stop string) or "length".
    """

    text: str
    report: Report
    token_ids: tuple[int, ...]
    finish_reason: str

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.report.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer, the end token included."""
        return len(self.token_ids)


class AnswerStream:
    """Text pieces of one answer, computed as they are asked for. An iterator and a context manager.

    Nothing runs between two pieces, so a stream that is given up costs nothing; `close()` ends it early. What its request missed
    is stored all the same. One thread reads it at a time; it can't be pickled or copied.
    """

    def __init__(
        self, requests: RequestRunner, prompt: Prompt, config: ReuseConfig | None, plan: DecodingPlan, started: float
    ):
        self._run = _Run(requests, prompt, config, plan, started)
        # The generator doesn't know this object: a stream that nobody holds any more ends at once, not at the next collection.
        self._pieces = self._run.pieces()

    @property
    def looked_up(self) -> Callable[[], None]:
        """Called once the prompt's chunks are open; set it before the first piece."""
        return self._run.looked_up

    @looked_up.setter
    def looked_up(self, call: Callable[[], None]) -> None:
        self._run.looked_up = call

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._run.check_process()
        with self._run.entered():
            return next(self._pieces)

    @property
    def report(self) -> Report:
        """What happened to the prompt; there as soon as the first piece is."""
        if self._run.report is None:
            raise CacheTuneError("the report is there once the first piece was read: iterate first.")
        return self._run.report

    @property
    def answer(self) -> Answer:
        """The whole answer, once the last piece was read."""
        if self._run.answer is None:
            raise CacheTuneError("the answer is not finished: read all pieces first.")
        return self._run.answer

    def close(self) -> None:
        """End the answer here. In a process that was forked since, nothing is to be done."""
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
    """One answer on its way.

    Attributes:
        report, answer: as soon as there are any.
        looked_up: called once the prompt's chunks are open.
        closing: the stream is being closed, by somebody who holds it.
        origin: the process that the stream was made in.
    """

    def __init__(
        self, requests: RequestRunner, prompt: Prompt, config: ReuseConfig | None, plan: DecodingPlan, started: float
    ):
        self._requests, self._prompt, self._config, self._plan, self._started = requests, prompt, config, plan, started
        self._reader = threading.Lock()
        self.origin = this_process()
        self.report: Report | None = None
        self.answer: Answer | None = None
        self.looked_up: Callable[[], None] = lambda: None
        self.closing = False

    def check_process(self) -> None:
        """Refuse what comes in another process than the stream's.

        Raises:
            ForkedError: it does.
        """
        self.origin.check("the stream", "its engine stayed there")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While somebody reads the stream, or closes it; nobody else may meanwhile."""
        if not self._reader.acquire(blocking=False):
            raise CacheTuneError(
                "the stream is being read already, by another thread or from within: read it on one thread at a time."
            )
        try:
            yield
        finally:
            self._reader.release()

    def pieces(self) -> Generator[str]:
        """The pieces; in between, background work stays away from the model."""
        self._requests.check_open()
        with self._requests.reserved():
            state = self._requests.prefill(
                self._prompt, self._config, self._started, self.looked_up, self._plan.max_new_tokens
            )
            try:
                yield from self._decode(state)
            finally:
                if self.answer is None:
                    self._keep_missed(state)

    def _decode(self, state: PrefillState) -> Generator[str]:
        requests, most, read = self._requests, self._plan.max_new_tokens, time.perf_counter()
        tokens: list[int] = []
        text: list[str] = []
        steps = requests.steps(state, most)
        for token, piece in each_neutrally(decode_text(lambda t: requests.forward(t, steps), self._plan, state.logits)):
            if not tokens:
                # Choosing the first token is part of waiting for it.
                now = time.perf_counter()
                timings = {**state.report.timings, "choose": now - read}
                self.report = replace(state.report, ttft=now - self._started, timings=timings)
                requests.served(self.report)
            tokens.append(token)
            if piece:
                text.append(piece)
                yield piece
        assert self.report is not None  # an answer has a token at least
        self.report = requests.store_later(state, self.report)
        self.answer = Answer("".join(text), self.report, tuple(tokens), self._plan.finish_reason)
        requests.answered(state, self.answer, self._started)

    def _keep_missed(self, state: PrefillState) -> None:
        """The answer ended early: what its prompt missed is there all the same."""
        if self.closing and self.report is not None:
            self.report = self._requests.store_later(state, self.report)
        else:
            # Perhaps on a thread that is collecting garbage, in the middle of whatever it was doing.
            self._requests.store_whenever(state)
