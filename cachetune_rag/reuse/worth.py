"""Decides whether reuse pays for a prompt, for a server that could also compute the whole prompt itself.

Reuse has costs of its own that don't depend on how much is reused: looking chunks up, choosing tokens, and handing rows over. Its
attention over assembled rows is also slower for each computed token than that of a full prefill. A prompt with few stored tokens is
therefore answered sooner without reuse.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from cachetune_rag.checking.arguments import check_count, check_share
from cachetune_rag.selection.base import budget
from cachetune_rag.text.prompts.segments import Prompt

LEAST_REUSED = 1536
"""The fewest tokens that reuse has to save on a GPU to make up for its fixed costs: about as many as vLLM reads in that time, where nothing was
measured in the server itself. With the default selector on an H200 (8B parameters, 43 tokens a millisecond), a prompt of 4,196 tokens that spared 3,482 was answered after 58 ms by a server that
reads it in 113, so 26 ms went into reuse itself; one of 2,140 tokens, 528 of them in vLLM's prefix cache, spared 1,309 and was answered 4 ms later than without reuse: 34 ms. That is
as long as vLLM takes for 1,100 to 1,500 tokens."""
LEAST_REUSED_ON_CPU = 256
"""The same on a CPU, where the fixed costs are smaller beside the computing. Chosen, not measured."""
LEAST_SHARE = 0.4
"""The smallest share of the tokens to compute that reuse has to save. In a server that is answering other requests, what reuse computes runs
beside their steps, and took 1.6 times as long on an H200 as alone (16 answers, 16,384 tokens, 8B parameters), while vLLM reads a prompt in
the same steps, where they cost it nothing: what is left to compute must be less than 1 / 1.6 of the prompt."""


@dataclass(frozen=True)
class WorthLimits:
    """How much reuse has to save to be used.

    Attributes:
        least_reused: tokens; see `LEAST_REUSED`. 0: any number is enough.
        least_share: from 0 to 1; see `LEAST_SHARE`.

    Raises:
        ConfigError: a value out of range.
    """

    least_reused: int = LEAST_REUSED
    least_share: float = LEAST_SHARE

    def __post_init__(self) -> None:
        check_count(self.least_reused, "least_reused", "a number of tokens, 0 or more", least=0)
        check_share(self.least_share, "least_share", "a share from 0 to 1")


@dataclass(frozen=True)
class Savings:
    """What reuse would save for one prompt. Whether that is enough, `too_little` says of any limits.

    Attributes:
        chunks: stored chunks that stand in the prompt, and are perhaps known not to be stored.
        to_compute: tokens that a server computes without reuse.
        stored: those of them that are tokens of stored chunks.
        reused: those of them that would not be computed with reuse.
        twice: new tokens that would be computed twice with reuse.
    """

    chunks: int
    to_compute: int
    stored: int
    reused: int
    twice: int = 0

    @property
    def spared(self) -> int:
        """How many tokens less are computed with reuse."""
        return max(0, self.reused - self.twice)

    def too_little(self, limits: WorthLimits = WorthLimits()) -> str | None:
        """Why reuse doesn't pay, in words for an operator; None if it does."""
        if not self.chunks:
            return "no stored chunk stands in the prompt"
        if not self.reused:
            return "no token of a stored chunk would be spared"
        if not self.spared:
            return "reuse would compute as many new tokens twice as it spares"
        if self.spared < limits.least_reused:
            return f"reuse would spare {self.spared} tokens, and least_reused is {limits.least_reused}"
        if self.spared < limits.least_share * self.to_compute:
            share = 100 * self.spared // self.to_compute
            return (
                f"reuse would spare {share}% of {self.to_compute} tokens, and from {limits.least_share:.0%} on it is used (a number of your own for "
                "least_reused stands in place of that)"
            )
        return None


def stored_tokens(prompt: Prompt, cached: int = 0, missing: Container[int] = ()) -> int:
    """How many tokens of stored chunks a prompt has, without its first `cached` tokens and its last one, which is computed in any case.

    Args:
        prompt: the prompt, with the chunks that were found in it.
        cached, missing: see `savings_of`.
    """
    last = len(prompt.ids) - 1
    return sum(
        max(0, min(span.end, last) - max(span.start, cached)) for span in prompt.spans if span.chunk not in missing
    )


def savings_of(
    prompt: Prompt,
    ratio: float,
    *,
    cached: int = 0,
    missing: Container[int] = (),
    twice: bool = False,
) -> Savings:
    """Say what reuse would save for a prompt.

    Args:
        prompt: the prompt, with the chunks that were found in it.
        ratio: share of the chunk tokens that would be recomputed.
        cached: tokens at the start of the prompt whose rows the server has already; reuse saves nothing for these.
        missing: numbers of chunks that are known not to be stored.
        twice: whether new passages behind the first stored chunk are computed twice, because the selector looks at them as well: where the request
            has a bound.
    """
    stored = stored_tokens(prompt, cached, missing)
    again = 0
    if twice:
        first = min((span.start for span in prompt.spans if span.chunk not in missing), default=len(prompt.ids))
        again = len(prompt.ids) - max(first, cached) - stored
    to_compute = max(0, len(prompt.ids) - cached)
    return Savings(len(prompt.spans), to_compute, stored, stored - budget(ratio, stored), again)
