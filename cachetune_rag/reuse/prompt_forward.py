"""Runs a prompt through the model: the planned tokens while stored rows are loaded, or all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.memory import KVMemory
from cachetune_rag.reuse.phases import ForwardPhases
from cachetune_rag.reuse.plan import Plan
from cachetune_rag.reuse.selection_context import ids_of, some_of
from cachetune_rag.text.prompts.prompt import Prompt

SHARE_WORTH = 0.125
"""The least share of a prompt without stored chunks that must be kept from earlier prompts for computing only the rest: attention with
the mask that this needs is slower than in a prompt that is computed whole."""


@dataclass(frozen=True)
class Computed:
    """What the model computed of a prompt.

    Attributes:
        logits: of the last token.
        cache: of the whole prompt.
        kept: tokens whose rows were kept from an earlier prompt.
        skipped: tokens of reused chunks whose stored rows were not read.
        phases: measures the forward, where stored rows were loaded meanwhile.
    """

    logits: Tensor
    cache: Cache
    kept: int
    skipped: int = 0
    phases: ForwardPhases | None = None


class PromptForward:
    """Computes prompts. The caller holds the model's lock."""

    def __init__(self, adapter: ModelAdapter):
        self._adapter = adapter

    def planned(self, prompt: Prompt, plan: Plan, memory: KVMemory, disk_free: Callable[[], None]) -> Computed:
        """Compute the planned tokens, layer by layer, while the reused rows are loaded.

        Args:
            prompt: the prompt.
            plan: which tokens are computed, and what brings the rows of the others.
            memory: told of each layer that is final.
            disk_free: called once no more rows will be read from disk.
        """
        buffers, loader, last = plan.buffers, plan.loader, self._adapter.num_layers - 1
        skipped = sum(len(source.skipped) for source in plan.sources_to_read())
        loader.sources_are_final(disk_free)
        phases = ForwardPhases(self._adapter, loader)
        ids, places = some_of(prompt, plan.computed)

        def before(layer: int) -> None:
            if layer:  # the layer before has computed its attention
                memory.layer_ready(buffers, layer - 1)
            loader.load(layer)

        # Rows need no turn: they are brought while it is waited for.
        with self._adapter.heads.computing(loader.bring if self._adapter.cuda_kernels else None):
            loader.start()
            logits = self._adapter.selective_forward(ids, places, buffers, before, plan.shift)
            memory.layer_ready(buffers, last)
            phases.finish()  # what a server queues behind the turn doesn't count
        return Computed(logits, buffers.to_cache(), plan.kept, skipped, phases)

    def whole(self, prompt: Prompt, memory: KVMemory, *, any_stored: bool) -> Computed:
        """Compute a prompt of which no chunk is reused.

        Without stored chunks, only what follows its kept beginning is computed. Where stored chunks are all recomputed, everything is
        computed by the model's own prefill: that is what a ratio of 1 promises.

        Args:
            prompt: the prompt.
            memory: may have kept its beginning.
            any_stored: whether the prompt has stored chunks.
        """
        ids, device = ids_of(prompt), self._adapter.device
        beginning = None if any_stored else memory.beginning(prompt.ids_array)
        if beginning is None or beginning.count < SHARE_WORTH * len(ids):
            with self._adapter.heads.computing():
                return Computed(*self._adapter.full_forward(ids.to(device)), kept=0)
        cache = beginning.buffers.to_cache(beginning.count)
        with self._adapter.heads.computing():
            logits = self._adapter.forward(ids[beginning.count :].to(device), cache)
        return Computed(logits, cache, beginning.count)
