"""A finished answer."""

from __future__ import annotations

from dataclasses import dataclass

from cachetune_rag.report import Report


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: the answer, without stop strings and special tokens.
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
        """How many tokens the prompt has."""
        return self.report.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """How many tokens the answer has, the end token included."""
        return len(self.token_ids)
