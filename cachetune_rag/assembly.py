"""Prefill of one prompt from the store: look up, select, assemble, recompute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.config import ReuseConfig
from cachetune_rag.context import RequestContext, ids_of, some_of
from cachetune_rag.leads import LeadIns
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.shift import ChunkShift
from cachetune_rag.pipeline.device import DeviceLoader, Streams
from cachetune_rag.pipeline.loader import DamagedSourceError, LayerLoader, Source
from cachetune_rag.prefix import PrefixCache
from cachetune_rag.prompt import Prompt
from cachetune_rag.report import Report
from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, make_key


@dataclass(frozen=True)
class PrefillState:
    """A prompt that has been read; decoding goes on from here.

    Attributes:
        logits: of the prompt's last token, [1, vocab].
        cache: an ordinary transformers cache of the whole prompt, in position order.
        report: what happened.
        prompt: the prompt.
        missed: numbers of the chunks of the prompt that were not in the store (each key once).
    """

    logits: Tensor
    cache: Cache
    report: Report
    prompt: Prompt
    missed: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """A prompt of which something is reused.

    Attributes:
        computed: bool [length], the tokens that go through the model.
        prefix: ids of what stands before the first chunk; its first `kept` rows are known already.
        kept: all of the prefix, or 0.
        sources: the reused chunks, whole.
        buffers, loader: where the KV is put together, and what brings it.
        shift: how the reused rows follow the recomputed ones, if they do.
    """

    computed: Tensor
    prefix: tuple[int, ...]
    kept: int
    sources: list[Source]
    buffers: KVBuffers
    loader: LayerLoader
    shift: ChunkShift | None


class Assembler:
    """Prefills prompts with one model from one store. The caller holds the model's lock."""

    def __init__(self, adapter: ModelAdapter, store: ChunkStore, lead_ins: LeadIns, pool: ThreadPoolExecutor):
        self._adapter, self._store, self._lead_ins, self._pool = adapter, store, lead_ins, pool
        self._prefixes = PrefixCache()
        self._streams: Streams | None = None

    def key(self, token_ids: Sequence[int]) -> ChunkKey:
        """The key of a chunk."""
        return make_key(self._lead_ins.namespace, token_ids)

    def full_prefill(self, prompt: Prompt, started: float) -> PrefillState:
        """The reference: every token through the model, nothing read."""
        logits, cache = self._adapter.full_forward(self._ids(prompt))
        self._wait()
        took = time.perf_counter() - started
        report = Report(len(prompt.ids), 0, 0, 0, {}, 1.0, "all", took, {"compute": took}, full=True)
        return PrefillState(logits, cache, report, prompt)

    def prefill(self, prompt: Prompt, config: ReuseConfig, started: float) -> PrefillState:
        """Prefill with reuse. A damaged chunk is set aside and the request starts over with that chunk missing."""
        damaged = 0
        while True:
            try:
                return self._attempt(prompt, config, started, damaged)
            except DamagedSourceError as error:
                self._store.discard(error.key)
                damaged += 1

    def _attempt(self, prompt: Prompt, config: ReuseConfig, started: float, damaged: int) -> PrefillState:
        with ExitStack() as stack:
            if self._adapter.device.type == "cuda":
                stack.enter_context(
                    torch.cuda.device(self._adapter.device)
                )  # kernels and streams go by the current one
            clock = _Clock()
            found, missed, first_missed = self._look_up(prompt, stack)
            timings = {"lookup": clock.lap()}
            plan, probed = self._plan(prompt, found, config, stack)
            timings["select"] = clock.lap()
            if plan is None:
                logits, cache = self._adapter.full_forward(self._ids(prompt))
            else:
                loaded = plan.loader.seconds
                if plan.shift is None:
                    plan.loader.set_sources(_needed(plan.sources, plan.computed))
                plan.loader.begin()
                ids, places = some_of(prompt, plan.computed)
                logits = self._adapter.selective_forward(ids, places, plan.buffers, plan.loader.load, plan.shift)
                cache = plan.buffers.to_cache()
                timings["load"] = plan.loader.seconds - loaded
            self._wait()
            timings["compute"] = clock.lap() - timings.get("load", 0.0)
            ttft = time.perf_counter() - started

            read: dict[str, int] = {}
            for reader in {id(r): r for _, r in found}.values():
                read[reader.tier] = read.get(reader.tier, 0) + reader.bytes_read
                self._promote(reader)
            if plan is not None:
                self._prefixes.keep(plan.prefix, plan.buffers)
            kept = 0 if plan is None else plan.kept
            reused = 0 if plan is None else int((~plan.computed).sum()) - kept
            report = Report(
                prompt_tokens=len(prompt.ids),
                reused=reused,
                recomputed=sum(r.layout.tokens for _, r in found) - reused,
                missed=missed,
                bytes_read=read,
                ratio=config.ratio,
                selector=config.selector,
                ttft=ttft,
                timings=timings,
                prefix_kept=kept,
                damaged=damaged,
                recognised=prompt.recognised,
                probed=probed,
            )
            return PrefillState(logits, cache, report, prompt, first_missed)

    def _plan(
        self, prompt: Prompt, found: list[tuple[int, ChunkReader]], config: ReuseConfig, stack: ExitStack
    ) -> tuple[_Plan | None, int]:
        """What is computed and where the rest goes, None if all of the prompt is computed; and the token-layers probed."""
        if not found or len(prompt.ids) <= self._adapter.reuse_beyond:
            return None, 0
        buffers = self._adapter.new_buffers(len(prompt.ids))
        prefix = prompt.ids[: min(span.start for span in prompt.spans if span.end > span.start)]
        kept = len(prefix) if self._prefixes.fill(prefix, buffers) else 0
        computed = torch.ones(len(prompt.ids), dtype=torch.bool)  # before the selector adds to it
        computed[:kept] = False
        for start, reader in found:
            computed[start : start + reader.layout.tokens] = False
        sources = [Source(reader, start, reader.layout.tokens) for start, reader in found]
        loader = self._loader(sources, buffers)
        stack.callback(loader.close)
        computed[-1] = True  # also where a prompt ends in a chunk: the answer starts from it
        context = RequestContext(self._adapter, prompt, found, computed, buffers, loader)
        selector = get_selector(config.selector)
        computed = computed.index_fill(0, selector.select(context, config.ratio), True)
        if bool(computed[kept:].all()):
            return None, context.probed
        shift = _shift(selector.shift, context.chunks, computed)
        return _Plan(computed, prefix, kept, sources, buffers, loader, shift), context.probed

    def _promote(self, reader: ChunkReader) -> None:
        """Let the next request find the chunk in host memory. The answer is out, so damage is only set aside."""
        try:
            reader.promote()
        except DamagedChunkError:
            self._store.discard(reader.key)

    def _look_up(self, prompt: Prompt, stack: ExitStack) -> tuple[list[tuple[int, ChunkReader]], int, tuple[int, ...]]:
        """Open the chunks of the prompt: (start, reader) of each that is stored, missed tokens, missed chunk numbers."""
        readers: dict[ChunkKey, ChunkReader | None] = {}
        found: list[tuple[int, ChunkReader]] = []
        missed, first_missed = 0, []
        namespace = self._lead_ins.namespace
        for span in prompt.spans:
            ids = prompt.chunk_ids[span.chunk]
            if not ids:
                continue
            key = make_key(namespace, ids)
            if key not in readers:
                reader = self._store.open(key)
                readers[key] = reader
                if reader is None:
                    first_missed.append(span.chunk)
                else:
                    stack.enter_context(reader)
            if (opened := readers[key]) is None:
                missed += len(ids)
            else:
                found.append((span.start, opened))
        return found, missed, tuple(first_missed)

    def _loader(self, sources: Sequence[Source], buffers: KVBuffers) -> LayerLoader:
        device = self._adapter.device
        if not self._adapter.cuda_kernels:
            return LayerLoader(self._adapter, sources, buffers, self._pool)
        if self._streams is None:
            self._streams = Streams(device, self._adapter.num_layers)
        return DeviceLoader(self._adapter, sources, buffers, self._pool, self._streams)

    def _ids(self, prompt: Prompt) -> Tensor:
        return ids_of(prompt).to(self._adapter.device)

    def _wait(self) -> None:
        if self._adapter.device.type == "cuda":
            torch.cuda.synchronize(self._adapter.device)


def _shift(strength: float, chunks: Sequence[ReusedChunk], computed: Tensor) -> ChunkShift | None:
    """The chunk shift of what is reused; None where nothing moves.

    Only a chunk that is a mean over lead-ins is shifted. What was captured behind one lead-in is off by that lead-in too,
    which the shift would carry along (docs/selection.md, "Cautions about the shift").
    """
    spans = []
    for chunk in chunks if strength else ():
        start, end = chunk.start, chunk.start + chunk.tokens
        if chunk.deviations is not None and 0 < int(computed[start:end].sum()) < chunk.tokens:
            spans.append((start, end))
    return ChunkShift(strength, spans) if spans else None


def _needed(sources: Sequence[Source], computed: Tensor) -> list[Source]:
    """Rows to read of each chunk: all but the last ones in ranking order that are recomputed anyway (sparse transfer)."""
    places = np.concatenate([s.places.numpy() for s in sources])
    reused = (~computed.numpy()[places]).nonzero()[0]
    ends = np.cumsum([s.reader.layout.tokens for s in sources])
    needed = []
    for source, end, before in zip(sources, ends, np.searchsorted(reused, ends), strict=True):
        tokens = source.reader.layout.tokens
        # The last reused row before the chunk's end, if it is one of this chunk.
        last = int(reused[before - 1]) - (int(end) - tokens) if before else -1
        needed.append(source.first(max(0, last + 1)))
    return needed


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took
