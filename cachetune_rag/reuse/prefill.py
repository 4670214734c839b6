"""Prefill of one prompt with reuse: look up its chunks, plan, load and compute layer by layer, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.heads import PeerError
from cachetune_rag.model.libraries.neutral import neutrally
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.layer_loader import CANT_READ, DamagedSourceError
from cachetune_rag.reuse.lookup import ChunkLookup, Faults, FoundChunks, OpenReaders
from cachetune_rag.reuse.memory import EngineMemory, KVMemory
from cachetune_rag.reuse.plan import Loaders, Planner, sources_of
from cachetune_rag.reuse.prompt_forward import PromptForward
from cachetune_rag.reuse.selection_context import ids_of
from cachetune_rag.reuse.state import NothingReused, PrefillState, full_report, report_of
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.base import budget
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, make_key


def _nothing() -> None:
    """The default of callbacks."""


@dataclass(frozen=True)
class _Call:
    """What a caller asked the assembler for.

    Attributes:
        prompt, config, started, chunks_open, room: see `Assembler.prefill`.
        memory: owns the rows.
        only_reuse: compute nothing where nothing is reused.
    """

    prompt: Prompt
    config: ReuseConfig
    started: float
    chunks_open: Callable[[], None]
    room: int
    memory: KVMemory
    only_reuse: bool = False


class Assembler:
    """Prefills prompts with one model from one store. The caller holds the model's lock.

    Args:
        adapter: the model.
        store: where chunks are.
        lead_ins: know the namespace of the chunks' keys.
        pool: threads that read ahead, layer by layer, and look chunks up.
        prefetcher: goes on reading chunks that a request read in part; None: what a request leaves unread stays on disk.
        tuned: replaces settings that a request left to the engine by those tuned for a tier and codec.
        check: refuses a model whose weights were changed; called before and after each prompt.

    Attributes:
        memory: the engine's own memory for prompts.
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
        self._lookup = ChunkLookup(store, pool, prefetcher)
        self._loaders = Loaders(adapter, pool)
        self._planner = Planner(adapter, self._loaders)
        self._forward = PromptForward(adapter)
        self.memory: KVMemory = EngineMemory(adapter)

    def key(self, token_ids: Sequence[int]) -> ChunkKey:
        """The key of a chunk."""
        return make_key(self._lead_ins.namespace, token_ids)

    def forget(self) -> None:
        """Drop the kept beginnings of prompts, which were computed with the weights before."""
        self.memory.forget()

    @neutrally
    def full_prefill(self, prompt: Prompt, started: float) -> PrefillState:
        """The reference: every token through the model, nothing read."""
        with self._same_weights(self.memory):
            logits, cache = self._adapter.full_forward(ids_of(prompt).to(self._adapter.device))
            self._wait()
            return PrefillState(logits, cache, full_report(prompt, time.perf_counter() - started), prompt)

    @neutrally
    def prefill(
        self,
        prompt: Prompt,
        config: ReuseConfig,
        started: float,
        chunks_open: Callable[[], None] = _nothing,
        room: int = 0,
        memory: KVMemory | None = None,
    ) -> PrefillState:
        """Prefill with reuse.

        When a chunk can't be read, the request starts over with that chunk missing (a damaged one is set aside). When the disk doesn't
        answer in time, it starts over with the chunks in memory alone.

        Args:
            prompt: the prompt.
            config: what is recomputed.
            started: when the request came, by `time.perf_counter`.
            chunks_open: called once the prompt's chunks are open (again if it starts over): background reads that are started from
                then on give way to this request.
            room: tokens of an answer that is expected behind the prompt.
            memory: owns the rows; None: the engine's own.
        """
        call = _Call(prompt, config, started, chunks_open, room, memory or self.memory)
        with self._same_weights(call.memory):
            state = self._prefill(call)
        assert isinstance(state, PrefillState)
        return state

    @neutrally
    def reuse(
        self,
        prompt: Prompt,
        config: ReuseConfig,
        started: float,
        memory: KVMemory,
        chunks_open: Callable[[], None] = _nothing,
        room: int = 0,
    ) -> PrefillState | NothingReused:
        """As `prefill`, but where nothing of the prompt would be reused, nothing is computed of it (but for what a selector looked at),
        and `memory.keep` is not called.

        For a server that computes prompts without reuse itself.
        """
        call = _Call(prompt, config, started, chunks_open, room, memory, only_reuse=True)
        with self._same_weights(memory):
            return self._prefill(call)

    def rows_needed(self, config: ReuseConfig, reader: ChunkReader) -> int:
        """How many rows of each layer of a chunk a request will read, as far as that is known before it comes."""
        if config.tunable and self._tuned is not None:
            config = self._tuned(config, reader.tier, reader.layout.codec)
        selector = get_selector(config.selector)
        unread = config.ratio if selector.offline and not selector.shift else config.skipped
        return reader.layout.tokens - budget(unread, reader.layout.tokens)

    @neutrally
    def transfer(self, prompt: Prompt) -> tuple[int, float]:
        """Load every row of a prompt's stored chunks and compute nothing: (rows of a layer, seconds)."""
        with ExitStack() as stack:
            self._enter_device(stack)
            readers = OpenReaders()
            stack.callback(readers.close)
            found = self._lookup.find(prompt, self._lead_ins.recent_namespace, readers, Faults())
            buffers = self._adapter.new_buffers(len(prompt.ids))
            self._wait()
            clock = _Clock()
            sources = sources_of(found, len(prompt.ids))
            loader = self._loaders.make(sources, buffers)
            stack.callback(loader.close)
            loader.start()
            for layer in range(self._adapter.num_layers):
                loader.load(layer)
            self._wait()
            return sum(source.rows for source in sources), clock.lap()

    @contextmanager
    def _same_weights(self, memory: KVMemory) -> Iterator[None]:
        """Check before and after what is done inside that the model's weights didn't change."""
        try:
            self._adapter.heads.together(self._check)
            yield
            self._adapter.heads.together(self._check)
        except ModelChangedError:
            memory.forget()  # a kept beginning may hold rows of old and of new weights
            self.forget()
            raise

    def _prefill(self, call: _Call) -> PrefillState | NothingReused:
        faults = Faults()
        if call.config.namespace is None or call.config.namespace.model != self._lead_ins.model:
            # The request came before `model_changed()`, and is answered with the weights as they are now.
            call = replace(call, config=replace(call.config, namespace=self._lead_ins.recent_namespace))
        while True:
            try:
                try:
                    return self._attempt(call, faults)
                except DamagedSourceError as error:
                    faults.failed(error.key, set_aside=self._pool.call(self._store.discard, error.key))
            except StoreTimeoutError:
                faults.disk_gone = True
            except PeerError as error:
                if not error.again:
                    raise

    def _attempt(self, call: _Call, faults: Faults) -> PrefillState | NothingReused:
        prompt, memory = call.prompt, call.memory
        with ExitStack() as stack:
            self._enter_device(stack)
            clock = _Clock()
            readers = OpenReaders()
            stack.callback(readers.close)
            found, config, disk_free = self._open(call, readers, faults, stack)
            timings = {"lookup": clock.lap()}
            plan, probed = self._planner.plan(prompt, found, config, memory, stack, call.room)
            timings["select"] = clock.lap()
            if plan is None and call.only_reuse:
                report = report_of(
                    prompt, config, found, None, faults, kept=0, skipped=0, probed=probed,
                    ttft=time.perf_counter() - call.started, timings=timings,
                )  # fmt: skip
                return NothingReused(report, found.to_store)
            if plan is None:
                disk_free()
                done = self._forward.whole(prompt, memory, any_stored=bool(found.chunks))
            else:
                done = self._forward.planned(prompt, plan, memory, disk_free)

            def end() -> PrefillState:
                self._wait()
                ended = time.perf_counter()
                timings.update({"compute": clock.lap()} if done.phases is None else done.phases.timings(ended))
                # Now, while the device has nothing to do: threads that read ahead while it computes would have to wait for it.
                self._store.settle_memory()
                # Before the readers are handed on, which may read more.
                report = report_of(
                    prompt, config, found, plan, faults, kept=done.kept, skipped=done.skipped, probed=probed,
                    ttft=ended - call.started, timings=timings,
                )  # fmt: skip
                self._let_go(found, readers)
                buffers, exact = (None, len(prompt.ids)) if plan is None else (plan.buffers, plan.exact)
                memory.keep(ids_of(prompt).numpy(), exact, buffers, done.cache)
                return PrefillState(done.logits, done.cache, report, prompt, found.to_store, buffers)

            return self._adapter.heads.together(end)

    def _open(
        self, call: _Call, readers: OpenReaders, faults: Faults, stack: ExitStack
    ) -> tuple[FoundChunks, ReuseConfig, Callable[[], None]]:
        """The prompt's chunks, the settings, and what lets background reads go on; the first two are the same on all peers."""

        def find() -> tuple[FoundChunks, ReuseConfig, Callable[[], None]]:
            found = self._find(call, readers, faults)
            disk_free = self._claim_disk(found, stack)
            call.chunks_open()
            return found, self._settings(call.config, found), disk_free

        heads = self._adapter.heads
        found, config, disk_free = heads.together(find, CANT_READ)
        if heads.shared:
            # A chunk that one of them can't read is recomputed by all, and one of them says which settings were tuned.
            told = heads.tell((frozenset(reader.key for reader in found.readers), config))
            found, config = found.only(frozenset.intersection(*(keys for keys, _ in told))), told[0][1]
        return found, config, disk_free

    def _find(self, call: _Call, readers: OpenReaders, faults: Faults) -> FoundChunks:
        """Look the prompt's chunks up, within the deadline of disk reads."""
        namespace = call.config.namespace or self._lead_ins.known_namespace
        if faults.disk_gone:
            return self._lookup.find(call.prompt, namespace, readers, faults)
        return self._pool.call(self._lookup.find, call.prompt, namespace, readers, faults)

    def _claim_disk(self, found: FoundChunks, stack: ExitStack) -> Callable[[], None]:
        """Stop background reads while the prompt's rows are read from disk, which would slow them; gives what lets them go on."""
        keys = found.on_disk
        if self._prefetcher is None or not keys:
            return _nothing
        priority = self._prefetcher.priority(keys)
        stack.callback(priority.end)
        priority.claim()
        return priority.release

    def _settings(self, config: ReuseConfig, found: FoundChunks) -> ReuseConfig:
        """The settings of a request, tuned for where its chunks are if it left them to the engine."""
        if config.tunable and self._tuned is not None and found.chunks:
            return self._tuned(config, *found.slowest())
        return config

    def _let_go(self, found: FoundChunks, readers: OpenReaders) -> None:
        """Hand chunks on: the prefetcher reads the rest of those on disk; those in host memory go to the device, if it keeps chunks."""
        for reader in found.readers:
            if reader.in_memory:
                reader.promote()
            elif self._prefetcher is not None:
                readers.release(reader)
                self._prefetcher.finish(reader)

    def _enter_device(self, stack: ExitStack) -> None:
        """Make the model's GPU the current one: kernels and streams go by that."""
        if self._adapter.device.type == "cuda":
            stack.enter_context(torch.cuda.device(self._adapter.device))

    def _wait(self) -> None:
        if self._adapter.device.type == "cuda":
            torch.cuda.synchronize(self._adapter.device)


class _Clock:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took
