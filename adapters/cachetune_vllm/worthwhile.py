"""Decides whether reuse makes a request faster: a prompt with little to reuse is read sooner by vLLM alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from cachetune_rag.reuse.config import AUTO
from cachetune_rag.reuse.worth import Savings, WorthLimits, savings_of
from cachetune_rag.selection import get_selector, names
from cachetune_vllm.measured import TRIED, Measured, shown
from cachetune_vllm.messages import Hello
from cachetune_vllm.reasons import Left
from cachetune_vllm.recognition import Recognised
from cachetune_vllm.settings import RequestSettings, ServerSettings


@dataclass(frozen=True)
class Verdict:
    """What was decided of a request, and what it was decided by.

    Attributes:
        kind: requests of one kind choose as many tokens in the same way, so it takes as long for prompts of one length.
        cached: tokens at the start of its prompt that vLLM had in its prefix cache.
        savings: what reuse would save behind these.
        left: why it is left to vLLM, in a word; None if it reuses its chunks.
        why: the same in a sentence.
    """

    kind: str
    cached: int
    savings: Savings
    left: Left | None = None
    why: str | None = None


class Worthwhile:
    """The decision for requests of one server.

    Args:
        settings: the server's.
        hello: what the workers say of their device.
        measured: how long vLLM and reuse take in this server.
    """

    def __init__(self, settings: ServerSettings, hello: Hello, measured: Measured):
        self._ratios, self._tenant = hello.ratios, settings.tenant
        self._settings = settings
        least = settings.least_reused
        # An operator who gives a number of tokens decides by that alone.
        self._limits = WorthLimits(hello.least_reused) if isinstance(least, str) else WorthLimits(least, 0.0)
        self._measured = measured if isinstance(least, str) else None
        self._slow = Counter[str]()

    def ratio(self, settings: RequestSettings) -> float:
        """The share of its chunks that a request recomputes, as far as that is known before its chunks are opened."""
        name = names.DEFAULT if settings.selector == "auto" else settings.selector
        selector = get_selector(name)
        if not selector.uses_ratio:
            return selector.share(AUTO.ratio)
        if settings.bounded:
            return AUTO.ratio  # what it will be isn't known yet: anything from the smallest calibrated one to 1
        if not isinstance(settings.ratio, str):
            return settings.ratio
        if settings.tenant != self._tenant:
            return AUTO.ratio  # the worker looks up what was calibrated for that tenant
        return self._ratios.get(name, AUTO.ratio)

    def why_all_recomputed(self, settings: RequestSettings) -> str | None:
        """Why nothing is reused at these settings, whatever a prompt shows; None if it may be."""
        if self.ratio(settings) != 1:
            return None
        name = names.DEFAULT if settings.selector == "auto" else settings.selector
        if not get_selector(name).uses_ratio:
            return f"selector {name} recomputes all tokens: use another one."
        if not isinstance(settings.ratio, str):
            return "the ratio is 1, at which all tokens are recomputed: use a smaller one."
        return (
            f"the ratio that was calibrated for selector {name} is 1, at which all tokens are recomputed: no smaller one kept the bound that `cachetune calibrate` "
            "had. Run it with a wider bound, or name a ratio."
        )

    @property
    def why_server_reuses_nothing(self) -> str | None:
        """As `why_all_recomputed`, for requests that say nothing."""
        return self.why_all_recomputed(RequestSettings.of(None, self._settings))

    def plain(self, tokens: int) -> float | None:
        """Seconds in which vLLM is expected to read so many tokens; None where that isn't known, or where measurements don't decide."""
        return None if self._measured is None else self._measured.plain(tokens)

    def weigh(self, found: Recognised, settings: RequestSettings, cached: int) -> Verdict:
        """Decide of a request, once: where nothing but measurements speaks against reuse, every so many requests reuse their chunks all the same.

        Args:
            found: its chunks.
            settings: its settings.
            cached: tokens at the start of its prompt that vLLM has in its prefix cache.
        """
        assert found.prompt is not None
        verdict, only_measured = self._judged(found, settings, cached)
        if only_measured:
            self._slow[verdict.kind] += 1
            if self._slow[verdict.kind] % TRIED == 0:
                return replace(verdict, why=None)
        if verdict.why is None:
            return verdict
        if all(span.chunk in found.missing for span in found.prompt.spans):
            return replace(verdict, left=Left.MISSED, why="none of the chunks that the request names is stored")
        # It is for the cache that a request is left to vLLM if it would reuse its chunks with nothing cached.
        fresh = self._judged(found, settings, 0)[0] if cached else verdict
        return replace(verdict, left=Left.FEW if fresh.why else Left.CACHED)

    def _judged(self, found: Recognised, settings: RequestSettings, cached: int) -> tuple[Verdict, bool]:
        """A verdict that says why reuse wouldn't make a request faster, if it wouldn't; and whether nothing but measurements says so."""
        assert found.prompt is not None
        ratio, name = self.ratio(settings), names.DEFAULT if settings.selector == "auto" else settings.selector
        savings = savings_of(found.prompt, ratio, cached=cached, missing=found.missing, twice=settings.bounded)
        verdict = Verdict(f"{name} {'bounded' if settings.bounded else ratio}", cached, savings)
        too_little = savings.too_little(self._limits)
        if self._measured is not None and savings.too_little(replace(self._limits, least_reused=0)) is None:
            computed = savings.to_compute - savings.spared
            times = self._measured.times(verdict.kind, savings.stored, computed, savings.to_compute)
            if times is not None:
                reuse, plain = times
                if reuse < plain:
                    return verdict, False
                ours, theirs = shown(times)
                why = f"reuse would take {ours} and vLLM {theirs}, by what this server took lately"
                return replace(verdict, why=why), too_little is None
        return replace(verdict, why=too_little), False
