"""Prefill of one prompt from the store: look up, select, assemble, recompute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.libraries.neutral import neutrally
from cachetune_rag.model.plain.shift import ChunkShift
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.report import Report
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.device_loader import DeviceLoader, Streams
from cachetune_rag.reuse.layer_loader import DamagedSourceError, LayerLoader, Source
from cachetune_rag.reuse.lookup import Faults, OpenReaders
from cachetune_rag.reuse.phases import ForwardPhases
from cachetune_rag.reuse.prefix_cache import PrefixCache
from cachetune_rag.reuse.selection_context import RequestContext, ids_of, some_of
from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_rag.selection.base import budget
from cachetune_rag.selection.frequency import FrequencySelector
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, Namespace, make_key

TIERS = ("device", "host", "disk")
"""Fast ones first; any other is slower than these."""


def _nothing() -> None:
    """Nobody is to be told."""


SHARE_WORTH = 0.125
"""Share of a prompt without stored chunks that must be kept for the rest to be computed behind it: attention takes longer with the mask
that this needs than in a prompt that is computed whole."""

KNOWN_KEYS = 2048
"""Chunks whose key is remembered: those of a few dozen long prompts."""


@dataclass(frozen=True)
class PrefillState:
    """A prompt that has been read; decoding goes on from here.

    Attributes:
        logits: of the prompt's last token, [1, vocab].
        cache: an ordinary transformers cache of the whole prompt, in position order.
        report: what happened.
        prompt: the prompt.
        buffers: the memory that `cache` shows; None where the whole prompt was computed.
        missed: numbers of the chunks of the prompt that were not in the store (each key once) and are to be stored.
    """

    logits: Tensor
    cache: Cache
    report: Report
    prompt: Prompt
    missed: tuple[int, ...] = ()
    buffers: KVBuffers | None = None


@dataclass(frozen=True)
class _Plan:
    """A prompt of which something is reused.

    Attributes:
        computed: bool [length], the tokens that go through the model.
        exact: tokens before the first chunk that is reused: their rows are those of full prefill.
        kept: how many of them were there from an earlier prompt.
        sources: the reused chunks, whole.
        buffers, loader: where the KV is put together, and what brings it.
        shift: how the reused rows follow the recomputed ones, if they do.
    """

    computed: Tensor
    exact: int
    kept: int
    sources: list[Source]
    buffers: KVBuffers
    loader: LayerLoader
    shift: ChunkShift | None


class Assembler:
    """Prefills prompts with one model from one store. The caller holds the model's lock.

    Args:
        pool: threads that read ahead, layer by layer, and look chunks up.
        prefetcher: takes over chunks that a request read in part; None: what a request leaves unread stays on disk.
        tuned: settings for a tier and codec in place of a request's that left them to the engine.
        check: refuses a model whose weights were changed, before and behind each prompt.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        store: ChunkStore,
        lead_ins: LeadIns,
        pool: DeadlinePool,
        prefetcher: Prefetcher | None = None,
        tuned: Callable[[ReuseConfig, str, str], ReuseConfig] | None = None,
        check: Callable[[], None] = _nothing,
    ):
        self._adapter, self._store, self._lead_ins, self._pool = adapter, store, lead_ins, pool
        self._prefetcher, self._tuned, self._check = prefetcher, tuned, check
        self._prefixes = PrefixCache()
        self._streams: Streams | None = None
        self._known_keys: tuple[Namespace, Callable[[tuple[int, ...]], ChunkKey]] | None = None

    def key(self, token_ids: Sequence[int]) -> ChunkKey:
        """The key of a chunk."""
        return make_key(self._lead_ins.namespace, token_ids)

    def forget(self) -> None:
        """Drop the kept beginnings of prompts, which were computed with the weights before."""
        self._prefixes = PrefixCache()

    @contextmanager
    def _same_weights(self) -> Iterator[None]:
        """Check before and after what is done inside that the model's weights didn't change."""
        try:
            self._check()
            yield
            self._check()
        except ModelChangedError:
            self.forget()  # a kept beginning may hold rows of old and of new weights
            raise

    @neutrally
    def full_prefill(self, prompt: Prompt, started: float) -> PrefillState:
        """The reference: every token through the model, nothing read."""
        with self._same_weights():
            return self._full(prompt, started)

    def _full(self, prompt: Prompt, started: float) -> PrefillState:
        logits, cache = self._adapter.full_forward(self._ids(prompt))
        self._wait()
        took = time.perf_counter() - started
        report = Report(
            len(prompt.ids), 0, 0, 0, {}, 1.0, "all", took, {"compute": took}, full=True, retrieved=prompt.retrieved
        )
        return PrefillState(logits, cache, report, prompt)

    @neutrally
    def prefill(
        self,
        prompt: Prompt,
        config: ReuseConfig,
        started: float,
        looked_up: Callable[[], None] = _nothing,
        room: int = 0,
    ) -> PrefillState:
        """Prefill with reuse. When a chunk can't be read the request starts over with that chunk missing (a damaged one is set
        aside), and when the disk doesn't answer in time, with the chunks in host memory alone.

        `looked_up()` is called once its chunks are open (again if it starts over): what is read behind requests from then on gives
        way to it. An answer of `room` tokens is to be expected behind it.
        """
        with self._same_weights():
            return self._prefill(prompt, config, started, looked_up, room)

    def _prefill(
        self, prompt: Prompt, config: ReuseConfig, started: float, looked_up: Callable[[], None], room: int
    ) -> PrefillState:
        faults = Faults()
        if config.namespace is None or config.namespace.model != self._lead_ins.model:
            # The request came before `model_changed()`, and is answered with the weights as they are now.
            config = replace(config, namespace=self._lead_ins.lately)
        while True:
            try:
                try:
                    return self._attempt(prompt, config, started, faults, looked_up, room)
                except DamagedSourceError as error:
                    faults.failed(error.key, set_aside=self._pool.call(self._store.discard, error.key))
            except StoreTimeoutError:
                faults.disk_gone = True

    def rows_needed(self, config: ReuseConfig, reader: ChunkReader) -> int:
        """How many rows of each layer of a chunk a request will read, as far as that is known before it comes."""
        if config.tunable and self._tuned is not None:
            config = self._tuned(config, reader.tier, reader.layout.codec)
        offline = config.selector == FrequencySelector.name and not FrequencySelector.shift
        tokens = reader.layout.tokens
        return tokens - budget(config.ratio if offline else config.skipped, tokens)

    @neutrally
    def transfer(self, prompt: Prompt) -> tuple[int, float]:
        """Bring every row of a prompt's stored chunks to its place and compute nothing: (rows of a layer, seconds)."""
        with ExitStack() as stack:
            if self._adapter.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._adapter.device))
            readers = OpenReaders()
            stack.callback(readers.close)
            found, *_ = self._look_up(prompt, self._lead_ins.lately, readers, Faults())
            buffers = self._adapter.new_buffers(len(prompt.ids))
            self._wait()
            clock = _Clock()
            loader = self._loader([Source(r, start, r.layout.tokens) for start, r in found], buffers)
            stack.callback(loader.close)
            loader.begin()
            for layer in range(self._adapter.num_layers):
                loader.load(layer)
            self._wait()
            return sum(r.layout.tokens for _, r in found), clock.lap()

    def _attempt(
        self,
        prompt: Prompt,
        config: ReuseConfig,
        started: float,
        faults: Faults,
        looked_up: Callable[[], None],
        room: int,
    ) -> PrefillState:
        with ExitStack() as stack:
            if self._adapter.device.type == "cuda":
                stack.enter_context(
                    torch.cuda.device(self._adapter.device)
                )  # kernels and streams go by the current one
            clock = _Clock()
            readers = OpenReaders()
            stack.callback(readers.close)
            namespace = config.namespace or self._lead_ins.last_known
            if faults.disk_gone:
                found, missed, first_missed = self._look_up(prompt, namespace, readers, faults)
            else:
                found, missed, first_missed = self._pool.call(self._look_up, prompt, namespace, readers, faults)
            timings = {"lookup": clock.lap()}
            disk_free = _nothing
            if self._prefetcher is not None and not all(r.in_memory for _, r in found):
                # Until its rows are there, what is read behind requests would be read at the cost of this one.
                hold = self._prefetcher.hold(r.key for _, r in found if not r.in_memory)
                stack.callback(hold.end)
                hold.begin()
                disk_free = hold.release
            looked_up()
            if config.tunable and self._tuned is not None and found:
                config = self._tuned(config, *_slowest(r for _, r in found))
            plan, probed = self._plan(prompt, found, config, stack, room)
            timings["select"] = clock.lap()
            skipped, phases = 0, None
            if plan is None:
                disk_free()
                logits, cache, kept = self._compute_all(prompt, behind=not found)
            else:
                kept = plan.kept
                # A shift needs what is stored of the recomputed tokens too.
                needed = _needed(plan.sources, plan.computed) if plan.shift is None else plan.sources
                skipped = sum(s.reader.layout.tokens - s.rows for s in needed)
                plan.loader.set_sources(needed)
                plan.loader.settled(disk_free)
                phases = ForwardPhases(self._adapter, plan.loader)
                plan.loader.begin()
                ids, places = some_of(prompt, plan.computed)
                logits = self._adapter.selective_forward(ids, places, plan.buffers, plan.loader.load, plan.shift)
                cache = plan.buffers.to_cache()
                phases.finish()
            self._wait()
            ended = time.perf_counter()
            ttft = ended - started
            timings |= {"compute": clock.lap()} if phases is None else phases.timings(ended)
            # While the device has nothing to do: who reads ahead while it computes would wait for it.
            self._store.settle_memory()

            read: dict[str, int] = {}
            for reader in {id(r): r for _, r in found}.values():
                read[reader.tier] = read.get(reader.tier, 0) + reader.bytes_read
                if reader.tier == "disk" and self._prefetcher is not None:
                    readers.release(reader)
                    self._prefetcher.finish(reader)
                elif reader.tier == "host":
                    reader.promote()  # to the device, if the store keeps chunks there
            self._keep_beginning(prompt, cache, plan)
            reused = 0 if plan is None else int((~plan.computed.numpy()).sum()) - kept
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
                damaged=len(faults.damaged),
                unreadable=len(faults.unreadable),
                timed_out=len(faults.timed_out),
                recognised=prompt.recognised,
                probed=probed,
                skipped=skipped,
                retrieved=prompt.retrieved,
            )
            return PrefillState(logits, cache, report, prompt, first_missed, None if plan is None else plan.buffers)

    def _compute_all(self, prompt: Prompt, *, behind: bool) -> tuple[Tensor, Cache, int]:
        """A prompt without reuse of chunks: logits, cache, and how many tokens were there from an earlier prompt.

        Args:
            prompt: the prompt.
            behind: compute it behind what is kept of its beginning. Where stored chunks are all recomputed, nothing but the
                model's own prefill of the whole will do: it is what a ratio of 1 promises.
        """
        ids = ids_of(prompt)
        beginning = self._prefixes.find(ids.numpy(), len(ids) - 1, self._short(prompt)) if behind else None
        if beginning is None or beginning.count < SHARE_WORTH * len(ids):
            return *self._adapter.full_forward(ids.to(self._adapter.device)), 0
        cache = beginning.buffers.to_cache(beginning.count)
        logits = self._adapter.forward(ids[beginning.count :].to(self._adapter.device), cache)
        return logits, cache, beginning.count

    def _keep_beginning(self, prompt: Prompt, cache: Cache, plan: _Plan | None) -> None:
        """Keep what is exact of a prompt that was just read, for prompts that begin alike."""
        ids = ids_of(prompt).numpy()
        if plan is not None:
            buffers = plan.buffers
            self._prefixes.keep(ids[: plan.exact], buffers.row_bytes, buffers.copy_first)
        else:
            copy = partial(self._adapter.rows_of_cache, cache)
            self._prefixes.keep(ids, self._adapter.row_bytes, copy, self._short(prompt))

    def _short(self, prompt: Prompt) -> bool:
        """Whether a long-rope model computes the prompt with its short factors."""
        return len(prompt.ids) <= self._adapter.reuse_beyond

    def _plan(
        self, prompt: Prompt, found: list[tuple[int, ChunkReader]], config: ReuseConfig, stack: ExitStack, room: int
    ) -> tuple[_Plan | None, int]:
        """What is computed and where the rest goes, None if all of the prompt is computed; and the token-layers probed."""
        if not found or len(prompt.ids) <= self._adapter.reuse_beyond:
            return None, 0
        buffers = self._adapter.new_buffers(len(prompt.ids), room)
        exact = min(start for start, _ in found)
        beginning = self._prefixes.find(ids_of(prompt).numpy(), exact)
        kept = 0
        if beginning is not None:
            kept = beginning.count
            buffers.fill_first(kept, beginning.buffers)
        # NumPy throughout: for some ten thousand numbers, waking torch's threads takes longer than the work, and as long as
        # other processes please where the processor is busy.
        computed = np.ones(len(prompt.ids), np.bool_)  # before the selector adds to it
        computed[:kept] = False
        unread = np.zeros_like(computed)
        sources = []
        for start, reader in found:
            tokens = reader.layout.tokens
            source = Source(reader, start, tokens - budget(config.skipped, tokens))
            # What is skipped is computed from the first layer on, also by a selector that looks at layers.
            computed[source.places[: source.rows]] = False
            unread[source.places[source.rows :]] = True
            sources.append(source)
        loader = self._loader(sources, buffers)
        stack.callback(loader.close)
        selector = get_selector(config.selector) if config.skipped < config.ratio or not config.skipped else None
        if selector is not None and selector.layers(self._adapter.num_layers):
            loader.hurry()
        computed[-1] = True  # also where a prompt ends in a chunk: the answer starts from it
        context = RequestContext(self._adapter, prompt, sources, torch.from_numpy(computed), buffers, loader)
        shift = None
        if selector is not None:
            selected = selector.select(context, config.ratio)
            computed = computed.copy()  # the context keeps what it was given
            computed[selected.numpy()] = True
            shift = _shift(selector.shift, context.chunks, computed & ~unread)
        if computed[kept:].all():
            return None, context.probed
        return _Plan(torch.from_numpy(computed), exact, kept, sources, buffers, loader, shift), context.probed

    def _look_up(
        self, prompt: Prompt, namespace: Namespace, opened: OpenReaders, faults: Faults
    ) -> tuple[list[tuple[int, ChunkReader]], int, tuple[int, ...]]:
        """Open the chunks of the prompt: (start, reader) of each that is stored, missed tokens, missed chunk numbers.

        `opened` gets every reader, for the caller to close.
        """
        key_of = self._keys(namespace)
        keys = [key_of(ids) if ids else None for ids in prompt.chunk_ids]
        wanted = dict.fromkeys(key for key in keys if key is not None)
        taken: dict[ChunkKey, ChunkReader] = {}
        if self._prefetcher is not None and not faults.disk_gone:
            taken = self._prefetcher.take(wanted)
        readers = faults.open(self._store, wanted, opened, self._pool.submit, taken)
        found: list[tuple[int, ChunkReader]] = []
        missed, first_missed, seen = 0, [], set()
        for span in prompt.spans:
            key = keys[span.chunk]
            if key is None:
                continue
            if (reader := readers[key]) is not None:
                found.append((span.start, reader))
                continue
            missed += len(prompt.chunk_ids[span.chunk])
            if key not in faults.timed_out and key not in seen:
                first_missed.append(span.chunk)
            seen.add(key)
        return found, missed, tuple(first_missed)

    def _keys(self, namespace: Namespace) -> Callable[[tuple[int, ...]], ChunkKey]:
        """Keys by token ids. Hashing a prompt's chunks takes the host a millisecond, and prompts repeat chunks."""
        known = self._known_keys
        if known is None or known[0] is not namespace:
            # A namespace as part of each entry would be hashed for each chunk: a thousand numbers of lead-ins.
            known = self._known_keys = namespace, lru_cache(KNOWN_KEYS)(partial(make_key, namespace))
        return known[1]

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


def _shift(strength: float, chunks: Sequence[ReusedChunk], selected: NDArray[np.bool_]) -> ChunkShift | None:
    """The chunk shift of what is reused; None where nothing moves.

    Only a chunk that is a mean over lead-ins is shifted. What was captured behind one lead-in is off by that lead-in too,
    which the shift would carry along (docs/selection.md, "Cautions about the shift").

    Args:
        strength: the selector's.
        chunks: the reused chunks.
        selected: bool [length], the recomputed tokens whose stored rows are read: of others no difference is known.
    """
    spans = []
    before = [0, *np.cumsum(selected).tolist()] if strength else []
    for chunk in chunks if strength else ():
        start, end = chunk.start, chunk.start + chunk.tokens
        if chunk.deviations is not None and 0 < before[end] - before[start] < chunk.tokens - chunk.skipped:
            spans.append((start, end))
    if not spans:
        return None
    return ChunkShift(strength, spans, torch.from_numpy(selected) if any(c.skipped for c in chunks) else None)


def _slowest(readers: Iterable[ChunkReader]) -> tuple[str, str]:
    """The slowest tier among chunks, and the codec of most of their tokens there."""
    tokens: dict[tuple[int, str, str], int] = {}
    for reader in readers:
        rank = TIERS.index(reader.tier) if reader.tier in TIERS else len(TIERS)
        place = rank, reader.tier, reader.layout.codec
        tokens[place] = tokens.get(place, 0) + reader.layout.tokens
    slowest = max(rank for rank, *_ in tokens)
    _, tier, codec = max((place for place in tokens if place[0] == slowest), key=lambda place: tokens[place])
    return tier, codec


def _needed(sources: Sequence[Source], computed: Tensor) -> list[Source]:
    """Rows to read of each chunk: all but the last ones in ranking order that are recomputed anyway (sparse transfer)."""
    places = np.concatenate([s.places for s in sources])
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
