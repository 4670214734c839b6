"""A request as one value, and who is told what becomes of it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cachetune_rag.answering.decoding import DecodingPlan
from cachetune_rag.report import ReadAgain, Report
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.text.prompts.segments import Prompt

if TYPE_CHECKING:
    from cachetune_rag.answering.answer import Answer


def new_request_id() -> str:
    """16 hex characters, unique for all practical purposes."""
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True, eq=False)
class Request:
    """What a caller asked for, checked and tokenised. Nothing in it changes while it is served.

    Attributes:
        prompt: the prompt to read.
        config: how stored chunks are reused; None computes every token.
        decoding: how the answer is decoded; None if only the prompt's logits are wanted.
        started: when the request came (`time.perf_counter`).
        id: names the request in reports and logs.
        min_sure: the least probability of the model's likeliest token at every token of the answer, below which the prompt is read again without
            reuse; None: any.
    """

    prompt: Prompt
    config: ReuseConfig | None
    decoding: DecodingPlan | None = None
    started: float = field(default_factory=time.perf_counter)
    id: str = field(default_factory=new_request_id)
    min_sure: float | None = None

    @classmethod
    def measured(cls, prompt: Prompt, config: ReuseConfig | None) -> Request:
        """A request for a prompt's logits, as measurements and tests make it: it starts now and has no answer."""
        return cls(prompt, config)

    @property
    def new_tokens(self) -> int:
        """The most tokens that can follow the prompt: 1 without an answer."""
        return 1 if self.decoding is None else self.decoding.max_new_tokens


@dataclass(frozen=True, eq=False)
class Finished:
    """A request that is over.

    Attributes:
        request: what was asked for.
        state: the prompt as it was read.
        report: what happened to the prompt.
        answer: the whole answer; None if its stream was closed before its end.
        seconds: since the request came.
    """

    request: Request
    state: PrefillState
    report: Report
    answer: Answer | None
    seconds: float


class RequestListener:
    """Is told about each request that is served. Every method does nothing here; listeners define those they need.

    Methods are called on the thread that serves the request, so they are quick and raise nothing.
    """

    def prefilled(self, request: Request, report: Report) -> None:
        """The prompt was read, and the first token chosen if one is wanted."""

    def read_again(self, request: Request, again: ReadAgain) -> None:
        """The prompt was read again without reuse; before `prefilled`, if the model was not sure of the first token."""

    def finished(self, end: Finished) -> Report:
        """The request is over. Returns the report, with what this listener adds to it."""
        return end.report

    def abandoned(self, request: Request, state: PrefillState) -> None:
        """The answer was given up before its end, perhaps by the garbage collector in the middle of anything: wait for no lock here."""
