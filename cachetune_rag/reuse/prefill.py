"""Prefill of one prompt with reuse: look up its chunks, plan, load and compute layer by layer, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.heads import PeerError
from cachetune_rag.model.libraries.neutral import neutrally
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.account import Account, account_of
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.lookup import Faults, FoundChunks, OpenReaders
from cachetune_rag.reuse.memory import EngineMemory, KVMemory
from cachetune_rag.reuse.opening import ChunkOpener, Opened
from cachetune_rag.reuse.plan import Chosen, Loaders, Planner, sources_of
from cachetune_rag.reuse.prompt_forward import PromptForward
from cachetune_rag.reuse.reading import Reading, reading_of
from cachetune_rag.reuse.selection_context import ids_of
from cachetune_rag.reuse.slow_rows import CANT_READ, DamagedSourceError
from cachetune_rag.reuse.state import NothingReused, PrefillState, full_report, report_of
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.base import budget
from cachetune_rag.text.prompts.finders import NO_FINDERS, Finders
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkLayout, ChunkReader, ChunkStore, make_key

MEANWHILE = 0.0005
"""Seconds between two calls of what is done while the device computes: less than the device needs to copy a layer of a long prompt."""


def _nothing() -> None:
    """The default of callbacks."""


@dataclass(frozen=True)
class _Call:
    """What a caller asked the assembler for.

    Attributes:
        prompt, config, started, chunks_open, answer_tokens: see `Assembler.prefill`.
        memory: owns the rows.
        only_reuse: compute nothing where nothing is reused.
        begun: the prompt, if it was begun before its turn.
        meanwhile: called while the device computes.
        account: is given the account of the prompt.
        too_slow: says where that takes so long to read that nothing is reused.
    """

    prompt: Prompt
    config: ReuseConfig
    started: float
    chunks_open: Callable[[], None]
    answer_tokens: int
    memory: KVMemory
    only_reuse: bool = False
    begun: Begun | None = None
    meanwhile: Callable[[], None] | None = None
    account: Callable[[Account], None] | None = None
    too_slow: Callable[[Reading], float | None] | None = None


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
        finders: find what a prompt's tokens spell.

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
        finders: Finders = NO_FINDERS,
    ):
        self._adapter, self._store, self._lead_ins, self._pool = adapter, store, lead_ins, pool
        self._check = check
        self._opener = ChunkOpener(store, lead_ins, adapter.heads, pool, prefetcher, tuned)
        self._loaders = Loaders(adapter, pool)
        self._finders = finders
        self._planner = Planner(adapter, self._loaders, finders)
        self._forward = PromptForward(adapter)
        self.memory = EngineMemory(adapter)

    def key(self, token_ids: Sequence[int]) -> ChunkKey:
        """The key of a chunk."""
        return make_key(self._lead_ins.namespace, token_ids)

    def on(self, store: ChunkStore) -> Assembler:
        """One for the chunks of another store. Nothing is read ahead there, and every setting is taken as it is given."""
        return Assembler(
            self._adapter,
            store,
            self._lead_ins,
            self._pool,
            finders=self._finders,
        )

    def forget(self) -> None:
        """Drop the kept beginnings of prompts, which were computed with the weights before."""
        self.memory.forget()

    @neutrally
    def full_prefill(self, prompt: Prompt, started: float) -> PrefillState:
        """The reference: every token through the model, nothing read."""
        together = self._adapter.heads.together
        with self._same_weights(self.memory):
            together(self._check)
            logits, cache = self._adapter.full_forward(ids_of(prompt).to(self._adapter.device))
            self._wait()
            together(self._check)
            return PrefillState(logits, cache, full_report(prompt, time.perf_counter() - started), prompt)

    @neutrally
    def prefill(
        self,
        prompt: Prompt,
        config: ReuseConfig,
        started: float,
        chunks_open: Callable[[], None] = _nothing,
        answer_tokens: int = 0,
        memory: KVMemory | None = None,
        account: Callable[[Account], None] | None = None,
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
            answer_tokens: tokens that an answer behind the prompt is expected to have.
            memory: owns the rows; None: the engine's own.
            account: is given what became of each token and chunk, once the prompt is read; None: nobody wants to know.
        """
        call = _Call(prompt, config, started, chunks_open, answer_tokens, memory or self.memory, account=account)
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
        answer_tokens: int = 0,
        begun: Begun | None = None,
        meanwhile: Callable[[], None] | None = None,
        account: Callable[[Account], None] | None = None,
        too_slow: Callable[[Reading], float | None] | None = None,
    ) -> PrefillState | NothingReused:
        """As `prefill`, but where nothing of the prompt would be reused, nothing is computed of it (but for what a selector looked at),
        and `memory.keep` is not called.

        For a server that computes prompts without reuse itself.

        Args:
            prompt, config, started, memory, chunks_open, answer_tokens: see `prefill`.
            begun: what `begin` gave for this prompt, config and memory. The caller closes it in the end.
            meanwhile: called again and again while a GPU computes and this thread waits for it: the time to begin the next prompt.
            account: see `prefill`; not called where nothing is reused.
            too_slow: is asked, once, where the chunks aren't all in memory: before they are opened, if it is known where all of them are, else when they are open. It is given the time that their rows are likely to take to be read, at the
                least, and what is computed meanwhile and behind it. Where it gives seconds, nothing is reused, and the chunks are read into host memory in the background, after
                so many seconds: the server then has the prompt without reuse, and reading doesn't take the host from it. None: they are quick enough. It says the same on all
                workers of a shared model, and is given on all of them or on none.
        """
        call = _Call(
            prompt, config, started, chunks_open, answer_tokens, memory, True, begun, meanwhile, account, too_slow
        )
        with self._same_weights(memory):
            return self._prefill(call)

    @neutrally
    def begin(self, prompt: Prompt, config: ReuseConfig, memory: KVMemory, answer_tokens: int = 0) -> Begun | None:
        """Begin a prompt before its turn, while another one is computed: its chunks are opened and their rows brought to the model's device.

        The device copies rows and computes at the same time, so prompts that wait for each other are done sooner.

        Args:
            prompt, config, memory, answer_tokens: see `prefill`.

        Returns:
            For `reuse`. None where it is not begun: where workers share the model, or where a chunk isn't in memory. Reading from a disk may
            take long, and the prompt that is being computed must not wait for that.
        """
        if self._adapter.heads.shared or self._adapter.heads.in_turns:
            return None
        call = self._with_namespace(_Call(prompt, config, time.perf_counter(), _nothing, answer_tokens, memory))
        with ExitStack() as stack:
            self._enter_device(stack)
            kept = stack.enter_context(ExitStack())
            clock = _Clock()
            opened = self._opener.open_in_memory(call.prompt, call.config, kept)
            if opened is None:
                return None
            seconds = clock.lap()
            plan = None
            with self._loaders.beside():
                prepared = self._planner.prepare(prompt, opened.found, opened.config, memory, kept, answer_tokens)
                if prepared is not None and not prepared.looks:
                    plan = self._planner.choose(prompt, prepared, opened.config).plan
            if prepared is not None:
                prepared.loader.bring()  # this may fail, so what was begun is handed over behind it
            return Begun(opened, memory, prepared, plan, seconds, kept.pop_all())

    def rows_needed(self, config: ReuseConfig, reader: ChunkReader) -> int:
        """How many rows of each layer of a chunk a request will read, as far as that is known before it comes: more, if it shows the chunk behind one
        that breaks off within a sentence."""
        return self._rows(self._opener.tuned(config, reader.tier, reader.layout.codec), reader)

    def _rows(self, config: ReuseConfig, reader: ChunkReader) -> int:
        """As `rows_needed`, of settings that are tuned already."""
        return _rows_of(config, reader.layout)

    @neutrally
    def transfer(self, prompt: Prompt) -> tuple[int, float]:
        """Load every row of a prompt's stored chunks and compute nothing: (rows of a layer, seconds)."""
        with ExitStack() as stack:
            self._enter_device(stack)
            readers = OpenReaders()
            stack.callback(readers.close)
            found = self._opener.find(prompt, readers)
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
        """For what checks, before and after it uses the model, that its weights didn't change: where they did, forget what was kept."""
        try:
            yield
        except ModelChangedError:
            memory.forget()  # a kept beginning may hold rows of old and of new weights
            self.forget()
            raise

    def _with_namespace(self, call: _Call) -> _Call:
        """The call, for the model's weights as they are now: the request may have come before `model_changed()`."""
        namespace = call.config.namespace
        if namespace is not None and namespace.model == self._lead_ins.model:
            return call
        return replace(call, config=replace(call.config, namespace=self._lead_ins.recent_namespace), begun=None)

    def _prefill(self, call: _Call) -> PrefillState | NothingReused:
        call = self._with_namespace(call)
        faults = Faults() if call.begun is None else call.begun.opened.faults
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
            call = replace(call, begun=None)

    def _attempt(self, call: _Call, faults: Faults) -> PrefillState | NothingReused:
        prompt, memory = call.prompt, call.memory
        clock = _Clock()
        if call.too_slow is not None and call.begun is None and not faults.any:
            asked, left = self._foreseen(call, call.too_slow, clock)
            if left is not None:
                return left
            if asked:
                call = replace(call, too_slow=None)
        with ExitStack() as stack:
            self._enter_device(stack)
            opened = self._opened(call, faults, stack, clock)
            found, config = opened.found, opened.config
            timings = {"lookup": clock.lap() + (0.0 if call.begun is None else call.begun.seconds)}

            def nothing(chosen: Chosen) -> NothingReused:
                self._adapter.heads.together(self._check)
                report = report_of(
                    prompt, config, found, chosen, faults, self._finders, kept=0, skipped=0,
                    ttft=time.perf_counter() - call.started, timings=timings,
                )  # fmt: skip
                return NothingReused(report, found.to_store)

            if call.too_slow is not None and (reading := self._reading(prompt, opened)) is not None:
                after = call.too_slow(reading)
                if after is not None:
                    left = nothing(Chosen(None))
                    on_disk = self._opener.read_on(opened, partial(self._rows, config), after)
                    return replace(left, reading=reading, left_on_disk=on_disk)
            claim = _Claim(partial(self._opener.claim_disk, found, stack), call.chunks_open)
            chosen = self._planned(call, opened, stack, claim)
            plan = chosen.plan
            timings["select"] = clock.lap()
            if plan is None and call.only_reuse:
                return nothing(chosen)
            if plan is None:
                claim.free()
                done = self._forward.whole(prompt, memory, any_stored=bool(found.chunks))
            else:
                done = self._forward.planned(prompt, plan, memory, claim.free)

            def end() -> PrefillState:
                # No other prompt is begun before an account is made: making it may fail for a disk, and the next prompt may have this one's memory by then.
                self._wait(call.meanwhile if call.account is None else None)
                ended = time.perf_counter()
                timings.update({"compute": clock.lap()} if done.phases is None else done.phases.timings(ended))
                self._check()
                # Now, while the device has nothing to do: threads that read ahead while it computes would have to wait for it.
                self._store.settle_memory()
                # Before the readers are handed on, which may read more.
                report = report_of(
                    prompt, config, found, chosen, faults, self._finders, kept=done.kept, skipped=done.skipped,
                    ttft=ended - call.started, timings=timings,
                )  # fmt: skip
                if call.account is not None:
                    assert config.namespace is not None  # see `_with_namespace`
                    call.account(account_of(prompt, config.namespace, found, plan, faults, done.kept))
                self._opener.let_go(opened)
                buffers, exact = (None, len(prompt.ids)) if plan is None else (plan.buffers, plan.exact)
                memory.keep(prompt.ids_array, exact, buffers, done.cache)
                return PrefillState(done.logits, done.cache, report, prompt, found.to_store, buffers)

            return self._adapter.heads.together(end, CANT_READ)

    def _foreseen(
        self, call: _Call, too_slow: Callable[[Reading], float | None], clock: _Clock
    ) -> tuple[bool, NothingReused | None]:
        """Ask whether the prompt's disk is too slow before its chunks are opened, which takes many milliseconds. Says whether that could be asked, and what is left then."""
        prompt = call.prompt
        foreseen = self._opener.foresee(prompt, call.config, _rows_of)
        if foreseen is None or not foreseen.seconds:
            return False, None
        config, layers, in_turns = foreseen.config, self._adapter.num_layers, self._adapter.heads.in_turns
        reading = reading_of(foreseen.seconds, prompt, config, foreseen.spans, layers, in_turns=in_turns)
        after = too_slow(reading)
        if after is None:
            return True, None
        self._check()
        report = report_of(
            prompt, config, FoundChunks(()), Chosen(None), Faults(), NO_FINDERS, kept=0, skipped=0,
            ttft=time.perf_counter() - call.started, timings={"lookup": clock.lap()},
        )  # fmt: skip
        on_disk = self._opener.read_later(foreseen, partial(self._rows, config), after)
        return True, NothingReused(replace(report, recomputed=foreseen.tokens), reading=reading, left_on_disk=on_disk)

    def _opened(self, call: _Call, faults: Faults, stack: ExitStack, clock: _Clock) -> Opened:
        """The prompt's chunks and settings, if the model's weights are those that the chunks belong to."""

        def check() -> None:
            with clock.stopped():  # it is not part of the lookup
                self._check()

        if call.begun is None:
            return self._opener.open(call.prompt, call.config, faults, stack, check)
        check()
        stack.enter_context(call.begun.hand_over())
        return call.begun.opened

    def _reading(self, prompt: Prompt, opened: Opened) -> Reading | None:
        """What has to be read of the prompt's chunks, and what is computed meanwhile and behind it; None if nothing has to be waited for. The workers of a shared
        model all ask for it, or none does."""
        if not opened.waits:
            return None
        found, config = opened.found, opened.config
        seconds = self._opener.seconds_to_read(found, partial(self._rows, config))
        if not seconds:
            return None
        in_turns = self._adapter.heads.in_turns
        spans = [span for span, _ in found.chunks]
        return reading_of(seconds, prompt, config, spans, self._adapter.num_layers, in_turns=in_turns)

    def _planned(self, call: _Call, opened: Opened, stack: ExitStack, claim: _Claim) -> Chosen:
        """What is computed of the prompt, once background reads are stopped."""
        prompt, begun = call.prompt, call.begun
        if begun is not None and begun.prepared is not None:
            claim()
            prepared = begun.prepared
            prepared.loader.take_turn()
            if begun.plan is not None:
                return Chosen(begun.plan)
        else:
            made = self._planner.prepare(
                prompt, opened.found, opened.config, call.memory, stack, call.answer_tokens, claim
            )
            if made is None:
                return Chosen(None)
            prepared = made
        return self._planner.choose(prompt, prepared, opened.config)

    def _enter_device(self, stack: ExitStack) -> None:
        """Make the model's GPU the current one: kernels and streams go by that."""
        if self._adapter.device.type == "cuda":
            stack.enter_context(torch.cuda.device(self._adapter.device))

    def _wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until the current stream has done what is queued: not the whole device, on which others may compute.

        Args:
            meanwhile: called about every `MEANWHILE` seconds.
        """
        if self._adapter.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._adapter.device)
        if meanwhile is not None:
            done = stream.record_event()
            while not done.query():
                meanwhile()
                time.sleep(MEANWHILE)
        stream.synchronize()


def _rows_of(config: ReuseConfig, layout: ChunkLayout) -> int:
    """How many rows of each layer of a chunk a request will read at tuned settings."""
    selector = get_selector(config.selector)
    unread = config.ratio if selector.offline and not selector.shift else config.skipped
    return layout.tokens - budget(unread, layout.tokens)


class _Claim:
    """Stops background reads, and tells the caller that a prompt's chunks are open.

    Attributes:
        free: lets background reads go on; it does nothing before they were stopped.
    """

    def __init__(self, claim_disk: Callable[[], Callable[[], None]], chunks_open: Callable[[], None]):
        self._claim_disk, self._chunks_open = claim_disk, chunks_open
        self.free: Callable[[], None] = _nothing

    def __call__(self) -> None:
        self.free = self._claim_disk()
        self._chunks_open()


class _Clock:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """While the context is open, the lap doesn't grow."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - before
