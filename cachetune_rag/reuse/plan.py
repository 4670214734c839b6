"""The plan for one prompt: which tokens are computed, which stored rows are reused, and which of those are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.plain.shift import ChunkShift
from cachetune_rag.report import Prediction
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.device_loader import DeviceLoader
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.lookup import FoundChunks
from cachetune_rag.reuse.memory import KVMemory
from cachetune_rag.reuse.selection_context import PromptView
from cachetune_rag.reuse.slow_rows import CANT_READ
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.streams import Streams
from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_rag.selection.base import Selector, budget
from cachetune_rag.selection.choice import Choice
from cachetune_rag.text.prompts.finders import Finders
from cachetune_rag.text.prompts.prompt import Prompt


def _nothing() -> None:
    """The default of callbacks."""


@dataclass(frozen=True)
class Plan:
    """What is done for a prompt that reuses something.

    Attributes:
        computed: bool [length], the tokens that go through the model.
        exact: tokens before the first reused chunk: their rows are those of a full prefill.
        kept: how many of these were kept from an earlier prompt.
        ready: how many of the first tokens have their rows already: those that were kept, or all exact ones if the selector computed them.
        sources: the reused chunks, with all of their rows.
        buffers: where the prompt's keys and values are put together.
        loader: brings the stored rows there.
        shift: how the reused rows follow the recomputed ones; None if they don't.
    """

    computed: Tensor
    exact: int
    kept: int
    ready: int
    sources: list[Source]
    buffers: KVBuffers
    loader: LayerLoader
    shift: ChunkShift | None

    @property
    def reused(self) -> int:
        """Chunk tokens whose stored rows are used."""
        return int((~self.computed.numpy()).sum()) - self.ready

    def sources_to_read(self) -> list[Source]:
        """The reused chunks, with the rows of each that must be read."""
        # A shift compares each recomputed token with what is stored of it, so it needs those rows too.
        return needed_rows(self.sources, self.computed) if self.shift is None else self.sources


@dataclass(frozen=True)
class Prepared:
    """What a prompt's plan is made with.

    Attributes:
        sources: the reused chunks, without the rows that are not even read.
        exact, kept, buffers, loader: see `Plan`.
        selector: chooses the tokens to recompute; None: those whose rows are not read, and no others.
    """

    sources: list[Source]
    exact: int
    kept: int
    buffers: KVBuffers
    loader: LayerLoader
    selector: Selector | None

    @property
    def looks(self) -> bool:
        """Whether the selector may look at stored rows, or run the model."""
        return self.selector is not None and not self.selector.offline


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a prompt.

    Attributes:
        plan: the plan; None if all of the prompt is computed.
        probed: token-layers that the selector computed.
        ratio: the share of the chunk tokens that was asked for; None: the one of the request's settings.
        error_left, sign, prediction: see `Report`.
    """

    plan: Plan | None
    probed: int = 0
    ratio: float | None = None
    error_left: float | None = None
    sign: float | None = None
    prediction: Prediction | None = None


class Loaders:
    """Makes the loader of each prompt: on streams of its own where the model runs through the CUDA kernels, a plain one elsewhere."""

    def __init__(self, adapter: ModelAdapter, pool: DeadlinePool):
        self._adapter, self._pool = adapter, pool

    def make(self, sources: Sequence[Source], buffers: KVBuffers) -> LayerLoader:
        """A loader that brings the rows of `sources` into `buffers`."""
        if not self._adapter.cuda_kernels:
            return LayerLoader(self._adapter, sources, buffers, self._pool)
        return DeviceLoader(self._adapter, sources, buffers, self._pool, self._made_streams())

    def beside(self) -> AbstractContextManager[Any]:
        """While the context is open, what is made belongs to the stream that places rows, so that it need not wait for the computation
        that is under way."""
        if not self._adapter.cuda_kernels:
            return nullcontext()
        return torch.cuda.stream(self._made_streams().place)

    def _made_streams(self) -> Streams:
        # Engines on one model take turns at it. Had each its own streams (a server has an engine for each tenant), PyTorch would keep for
        # each of them the memory that rows were staged in.
        streams = _streams.get(self._adapter)
        if streams is None:
            streams = _streams[self._adapter] = Streams(self._adapter.device, self._adapter.num_layers)
        return streams


_streams: WeakKeyDictionary[ModelAdapter, Streams] = WeakKeyDictionary()


class Planner:
    """Decides what of a prompt is computed and what is reused.

    Args:
        adapter: the model.
        loaders: make the loader of each prompt.
        finders: find what a prompt's tokens spell.
    """

    def __init__(self, adapter: ModelAdapter, loaders: Loaders, finders: Finders):
        self._adapter, self._loaders, self._finders = adapter, loaders, finders

    def prepare(
        self,
        prompt: Prompt,
        found: FoundChunks,
        config: ReuseConfig,
        memory: KVMemory,
        stack: ExitStack,
        answer_tokens: int,
        first: Callable[[], None] = _nothing,
    ) -> Prepared | None:
        """Take memory for a prompt, and make what loads its chunks.

        Args:
            prompt: the prompt.
            found: its stored chunks.
            config: selector, ratio, and the share of the rows that is not even read.
            memory: gives the buffers.
            stack: closes the loader in the end.
            answer_tokens: tokens that an answer behind the prompt is expected to have.
            first: is called before, in any case. It may fail as reading stored rows may.

        Returns:
            None if all of the prompt is computed.
        """
        heads = self._adapter.heads
        reusable = found.chunks and len(prompt.ids) > self._adapter.reuse_beyond
        sources = sources_of(found, len(prompt.ids), config.skipped) if reusable else []
        if not sources:
            heads.together(first, CANT_READ)
            return None
        exact = min(span.start for span, _ in found.chunks)
        selector = selector_of(config)

        def take() -> tuple[Prepared, int]:
            first()
            buffers, kept = memory.take(prompt.ids_array, exact, answer_tokens)
            loader = self._loaders.make(sources, buffers)
            stack.callback(loader.close)
            prepared = Prepared(sources, exact, kept, buffers, loader, selector)
            if selector is not None and selector.uses_deviations:
                loader.start_deviations()
            if prepared.looks and heads.in_turns:
                loader.settle()
                self._begin_look(prepared)  # here, because taking memory may fail on one peer alone
            return prepared, kept

        prepared, told = heads.agreed(take, CANT_READ)
        return replace(prepared, kept=min(told))

    def choose(self, prompt: Prompt, prepared: Prepared, config: ReuseConfig) -> Chosen:
        """Choose what is recomputed."""
        heads, selector, kept, loader = self._adapter.heads, prepared.selector, prepared.kept, prepared.loader
        computed, unread = _without_selection(prepared.sources, len(prompt.ids))
        computed[:kept] = False
        context = PromptView(
            self._adapter,
            prompt,
            prepared.sources,
            torch.from_numpy(computed),
            prepared.buffers,
            loader,
            kept,
            self._finders,
        )
        choice = None
        if selector is not None:
            # Where peers take turns, `prepare` has begun it: what fails here on one peer alone, the others would wait for.
            if not (prepared.looks and heads.in_turns):
                self._begin_look(prepared)
            with heads.computing() if prepared.looks else nullcontext():
                choice = selector.choose(context, config.ratio, config.finder)

        def planned(choice: Choice | None) -> Plan | None:
            shift, mine = None, computed
            if selector is not None and choice is not None:
                mine, shift = _selected(selector, context, choice.places, computed, unread)
            if mine[kept:].all():
                return None
            mine[: context.ready] = False  # the selector computed those that weren't kept
            plan = Plan(
                torch.from_numpy(mine), prepared.exact, kept, context.ready, prepared.sources, prepared.buffers,
                loader, shift,
            )  # fmt: skip
            loader.set_sources(plan.sources_to_read())
            if heads.in_turns:
                loader.settle()
            return plan

        said = None if choice is None or not heads.shared else _Told.of(choice)
        plan, told = heads.agreed(lambda: (planned(choice), said), CANT_READ)
        if (decided := told[0]) is not None:
            # Peers have the same scores, but for rounding: one of them decides.
            choice = decided.choice()
            if any(other is None or other.places != decided.places for other in told):
                plan = heads.together(partial(planned, choice), CANT_READ)
        if choice is None:
            return Chosen(plan, context.probed)
        return Chosen(plan, context.probed, choice.ratio, choice.error_left, choice.sign, choice.prediction)

    def _begin_look(self, prepared: Prepared) -> None:
        """Have the first layers brought that a selector looks at, if it does."""
        if prepared.selector is not None and prepared.selector.layers(self._adapter.num_layers):
            prepared.loader.start_first_layers()


@dataclass(frozen=True)
class _Told:
    """A choice as peers tell each other: without a tensor, since pickling one takes as long as telling it.

    Attributes:
        places: their bytes.
        ratio, error_left, sign, prediction: see `Choice`.
    """

    places: bytes
    ratio: float
    error_left: float | None
    sign: float | None
    prediction: Prediction | None

    @classmethod
    def of(cls, choice: Choice) -> _Told:
        """What is told of a choice."""
        places = choice.places.numpy().tobytes()
        return cls(places, choice.ratio, choice.error_left, choice.sign, choice.prediction)

    def choice(self) -> Choice:
        """The choice that was told."""
        places = torch.from_numpy(np.frombuffer(self.places, np.int64).copy())
        return Choice(places, self.ratio, self.error_left, self.sign, self.prediction)


def selector_of(config: ReuseConfig) -> Selector | None:
    """What chooses tokens; None where those whose rows are not read are all that is recomputed."""
    return get_selector(config.selector) if config.skipped < config.ratio or not config.skipped else None


def sources_of(found: FoundChunks, length: int, skipped: float = 0.0) -> list[Source]:
    """The stored chunks of a prompt of `length` tokens, each without the share `skipped` of its rows, which is not read."""
    last = length - 1
    # The last token is computed in any case: the answer starts from it. So it is where the rows go that the prompt has no tokens
    # for. Where there are such rows, and the prompt ends in a chunk, that chunk is read as if it ended a token earlier.
    if all(span.end - span.start == reader.layout.tokens for span, reader in found.chunks):
        last = length
    sources = []
    for span, reader in found.chunks:
        tokens, start, end = reader.layout.tokens, span.start, min(span.end, last)
        if start < end:
            whole = end - start == tokens
            inside = None if whole else range(span.first, span.first + end - start)
            rows = tokens - budget(skipped, tokens)
            sources.append(Source(reader, start - span.first, rows, inside, length - 1))
    return sources


def _without_selection(sources: Sequence[Source], length: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens are computed whatever is selected, and of which tokens of chunks no rows are read."""
    # NumPy, not torch: for some ten thousand numbers, waking torch's threads takes longer than the work itself, and far longer on a busy
    # machine.
    computed, unread = np.ones(length, np.bool_), np.zeros(length, np.bool_)
    for source in sources:
        # Rows that are not read are computed from the first layer on, also while a selector looks at layers.
        computed[source.places[: source.rows]] = False
        unread[source.places[source.rows :]] = True
    computed[-1] = True  # also where a prompt ends in a chunk
    if any(source.inside is not None for source in sources):
        unread[-1] = False
    return computed, unread


def _selected(
    selector: Selector,
    context: PromptView,
    selected: Tensor,
    computed: NDArray[np.bool_],
    unread: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], ChunkShift | None]:
    """The computed tokens, with those that the selector chose, and the shift of the reused rows."""
    computed = computed.copy()  # the context goes on using the one that it was given
    computed[selected.numpy()] = True
    return computed, chunk_shift(selector.shift, context.chunks, computed & ~unread)


def chunk_shift(strength: float, chunks: Sequence[ReusedChunk], selected: NDArray[np.bool_]) -> ChunkShift | None:
    """The chunk shift of the reused rows; None if no chunk is shifted.

    Only a chunk that is a mean over lead-ins is shifted. The rows of a chunk that was captured behind one lead-in also differ because of
    that lead-in, and the shift would carry this difference over (docs/selection.md, "Cautions about the shift").

    Args:
        strength: how much of the difference is carried over; the selector says it.
        chunks: the reused chunks.
        selected: bool [length], the recomputed tokens whose stored rows are read. For other tokens no difference is known.
    """
    spans = []
    before = [0, *np.cumsum(selected).tolist()] if strength else []
    for chunk in chunks if strength else ():
        start, end = chunk.start, chunk.start + chunk.tokens
        if chunk.read_deviations is not None and 0 < before[end] - before[start] < chunk.tokens - chunk.skipped:
            spans.append((start, end))
    if not spans:
        return None
    return ChunkShift(strength, spans, torch.from_numpy(selected) if any(c.skipped for c in chunks) else None)


def needed_rows(sources: Sequence[Source], computed: Tensor) -> list[Source]:
    """The rows to read of each chunk. The last ones in ranking order are left out if their tokens are recomputed (sparse transfer)."""
    places = np.concatenate([s.places for s in sources])
    reused = (~computed.numpy()[places]).nonzero()[0]
    ends = np.cumsum([s.reader.layout.tokens for s in sources])
    needed = []
    for source, end, before in zip(sources, ends, np.searchsorted(reused, ends), strict=True):
        tokens = source.reader.layout.tokens
        # The last reused row before the chunk's end, if it belongs to this chunk.
        last = int(reused[before - 1]) - (int(end) - tokens) if before else -1
        needed.append(source.first(max(0, last + 1)))
    return needed
