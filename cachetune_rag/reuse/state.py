"""What a prefill gives: the prompt's logits and cache, and the report of what was reused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cachetune_rag.model import KVBuffers
from cachetune_rag.report import Report
from cachetune_rag.reuse.advice import advice_of, cut_sentences
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.lookup import Faults, FoundChunks
from cachetune_rag.reuse.plan import Chosen
from cachetune_rag.reuse.reading import Reading
from cachetune_rag.selection import get_selector
from cachetune_rag.text.prompts.finders import Finders
from cachetune_rag.text.prompts.prompt import Prompt


@dataclass(frozen=True)
class PrefillState:
    """A prompt that has been read; decoding goes on from here.

    Attributes:
        logits: of the prompt's last token, [1, vocab].
        cache: an ordinary transformers cache of the whole prompt, in position order.
        report: what happened.
        prompt: the prompt.
        missed: numbers of the prompt's chunks that were not in the store and should be stored now (equal chunks once).
        buffers: the memory that `cache` shows; None where the whole prompt was computed.
    """

    logits: Tensor
    cache: Cache
    report: Report
    prompt: Prompt
    missed: tuple[int, ...] = ()
    buffers: KVBuffers | None = None

    def without_memory(self) -> PrefillState:
        """The same with an empty cache, for a prompt that is going to be read again."""
        return replace(self, cache=DynamicCache(), buffers=None)


@dataclass(frozen=True)
class NothingReused:
    """A prompt that was left alone, because nothing of it would be reused.

    Attributes:
        report: what its lookup found; its `ttft` is the time that this took.
        missed: numbers of the prompt's chunks that were not in the store and should be stored (equal chunks once).
        reading: how its chunks would have been read, if it was left alone for the time that this takes.
        left_on_disk: how many of its chunks are then not read behind it, because there is no room for them.
    """

    report: Report
    missed: tuple[int, ...] = ()
    reading: Reading | None = None
    left_on_disk: int = 0


def full_report(prompt: Prompt, seconds: float) -> Report:
    """The report of a full prefill, which reads nothing."""
    return Report(
        len(prompt.ids), 0, 0, 0, {}, 1.0, "all", seconds, {"compute": seconds}, full=True, retrieved=prompt.retrieved
    )


def report_of(
    prompt: Prompt,
    config: ReuseConfig,
    found: FoundChunks,
    chosen: Chosen,
    faults: Faults,
    finders: Finders,
    *,
    kept: int,
    skipped: int,
    ttft: float,
    timings: dict[str, float],
) -> Report:
    """The report of a prefill with reuse.

    Args:
        prompt: the prompt.
        config: the settings that were used.
        found: the chunks that were open; the bytes that were read of them are counted now.
        chosen: what was computed, and why.
        faults: chunks that could not be read.
        finders: find what the prompt's tokens spell.
        kept: tokens whose rows were kept from an earlier prompt.
        skipped: recomputed tokens whose stored rows were not read.
        ttft, timings: seconds to the first token, and by phase.
    """
    reused = 0 if chosen.plan is None else chosen.plan.reused
    computed = np.ones(len(prompt.ids), np.bool_) if chosen.plan is None else chosen.plan.computed.numpy()
    stored = [span for span, _ in found.chunks]
    cut = cut_sentences(stored, finders.continuations(prompt), computed)
    ratio = config.ratio if chosen.ratio is None else chosen.ratio
    share = ratio if get_selector(config.selector).uses_ratio else None
    # Chunks that are not stored are no questions and answers.
    last = max((span.end for span in prompt.spans), default=len(prompt.ids))
    return Report(
        prompt_tokens=len(prompt.ids),
        reused=reused,
        recomputed=found.tokens - reused,
        missed=found.missed,
        bytes_read=found.bytes_read(),
        ratio=ratio,
        selector=config.selector,
        ttft=ttft,
        timings=timings,
        prefix_kept=kept,
        damaged=len(faults.damaged),
        unreadable=len(faults.unreadable),
        timed_out=len(faults.timed_out),
        recognised=prompt.recognised,
        probed=chosen.probed,
        skipped=skipped,
        retrieved=prompt.retrieved,
        error_left=chosen.error_left,
        sign=chosen.sign,
        prediction=chosen.prediction,
        continued=cut.recomputed,
        advice=advice_of(
            cut, len(stored), share if reused else 1.0, len(prompt.ids) - last, lambda: finders.shapes(prompt, stored)
        ),
    )
