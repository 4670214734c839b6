"""Decides whether reuse makes a request faster: a prompt with little to reuse is read sooner by vLLM alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cachetune_rag.reuse.config import AUTO
from cachetune_rag.reuse.worth import Savings, WorthLimits, savings_of, stored_tokens
from cachetune_rag.selection import get_selector, names
from cachetune_vllm.measured import TRIED, Measured, shown
from cachetune_vllm.messages import Hello
from cachetune_vllm.reasons import Left
from cachetune_vllm.recognition import Recognised
from cachetune_vllm.settings import RequestSettings, ServerSettings


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
        if not get_selector(name).uses_ratio:
            return 1.0 if name == names.ALL else 0.0
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

    def decide(self, found: Recognised, settings: RequestSettings, cached: int) -> tuple[Left | None, str | None]:
        """Why a request is left to vLLM, in a word and in a sentence; None and None if it reuses its chunks.

        Args:
            found: its chunks.
            settings: its settings.
            cached: tokens at the start of its prompt that vLLM has in its prefix cache.
        """
        assert found.prompt is not None
        why, only_measured = self._why_left(found, settings, cached)
        if only_measured:
            self._slow[self.kind(settings)] += 1
        if why is None or (only_measured and self._slow[self.kind(settings)] % TRIED == 0):
            return None, None
        if all(span.chunk in found.missing for span in found.prompt.spans):
            return Left.MISSED, "none of the chunks that the request names is stored"
        return (Left.CACHED if self._why_left(found, settings, 0)[0] is None else Left.FEW), why

    def kind(self, settings: RequestSettings) -> str:
        """Requests of one kind choose as many tokens in the same way, so it takes as long for prompts of one length."""
        name = names.DEFAULT if settings.selector == "auto" else settings.selector
        return f"{name} {'bounded' if settings.bounded else self.ratio(settings)}"

    def _why_left(self, found: Recognised, settings: RequestSettings, cached: int) -> tuple[str | None, bool]:
        """Why reuse wouldn't make a request faster, None if it would; and whether nothing but measurements says so."""
        prompt = found.prompt
        assert prompt is not None

        def savings(limits: WorthLimits) -> Savings:
            return savings_of(
                prompt, self.ratio(settings), cached=cached, missing=found.missing, limits=limits, twice=settings.bounded
            )  # fmt: skip

        spared = savings(replace(self._limits, least_reused=0))
        if spared.worthwhile and self._measured is not None:
            stored = stored_tokens(prompt, cached, found.missing)
            computed = spared.to_compute - spared.spared
            times = self._measured.times(self.kind(settings), stored, computed, spared.to_compute)
            if times is not None:
                reuse, plain = times
                if reuse < plain:
                    return None, False
                ours, theirs = shown(times)
                why = f"reuse would take {ours} and vLLM {theirs}, by what this server took lately"
                return why, savings(self._limits).worthwhile
        return savings(self._limits).reason, False
