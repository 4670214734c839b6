"""Answers, whole and as they grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cachetune_rag.config import ReuseConfig
from cachetune_rag.decoding import DecodingPlan, decode
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.prompt import Prompt
from cachetune_rag.report import Report

if TYPE_CHECKING:
    from cachetune_rag.request_runner import RequestRunner


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

    Nothing runs between two pieces, so a stream that is given up costs nothing; `close()` ends it early.
    """

    def __init__(
        self, requests: RequestRunner, prompt: Prompt, config: ReuseConfig | None, plan: DecodingPlan, started: float
    ):
        self._requests, self._prompt, self._config, self._plan, self._started = requests, prompt, config, plan, started
        self._report: Report | None = None
        self._answer: Answer | None = None
        self.looked_up: Callable[[], None] = lambda: None
        """Called once the prompt's chunks are open; set it before the first piece."""
        self._pieces = self._reserving()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def report(self) -> Report:
        """What happened to the prompt; there as soon as the first piece is."""
        if self._report is None:
            raise CacheTuneError("the report is there once the first piece was read: iterate first.")
        return self._report

    @property
    def answer(self) -> Answer:
        """The whole answer, once the last piece was read."""
        if self._answer is None:
            raise CacheTuneError("the answer is not finished: read all pieces first.")
        return self._answer

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reserving(self) -> Any:
        """The pieces; in between, background work stays away from the model."""
        with self._requests.reserved():
            yield from self._run()

    def _run(self) -> Any:
        requests = self._requests
        most = self._plan.max_new_tokens
        state = requests.prefill(self._prompt, self._config, self._started, self.looked_up, most)
        tokens: list[int] = []
        text: list[str] = []
        stream = self._plan.text_stream()
        self._report = state.report
        steps = requests.steps(state, most)
        for token in decode(lambda t: requests.forward(t, steps), self._plan, state.logits):
            if not tokens:
                # Choosing the first token is part of waiting for it.
                self._report = replace(state.report, ttft=time.perf_counter() - self._started)
            tokens.append(token)
            if piece := stream.push(token):
                text.append(piece)
                yield piece
        if piece := stream.finish():
            text.append(piece)
            yield piece
        self._report = requests.store_later(state, self._report)
        self._answer = Answer("".join(text), self._report, tuple(tokens), self._plan.finish_reason)
        requests.answered(state, self._answer, self._started)
