"""Prefills prompts, with reuse or without; where an attempt at a prompt (`attempt.py`) fails, it starts over without what failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.heads import PeerError
from cachetune_rag.model.libraries.neutral import neutrally
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.account import Account
from cachetune_rag.reuse.attempt import Attempts, Call
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.lookup import Faults, OpenReaders
from cachetune_rag.reuse.memory import EngineMemory, KVMemory
from cachetune_rag.reuse.on_device import Clock, current, wait
from cachetune_rag.reuse.opening import ChunkOpener
from cachetune_rag.reuse.plan import Loaders, sources_of
from cachetune_rag.reuse.reading import Reading, rows_of
from cachetune_rag.reuse.selection_context import ids_of
from cachetune_rag.reuse.slow_rows import DamagedSourceError
from cachetune_rag.reuse.state import NothingReused, PrefillState, full_report
from cachetune_rag.text.prompts.finders import NO_FINDERS, Finders
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, make_key


def _nothing() -> None:
    """The default of callbacks."""


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
        self._opener = ChunkOpener(store, lead_ins, adapter.heads, pool, prefetcher, tuned)
        self._loaders = Loaders(adapter, pool)
        self._finders = finders
        self._check = _on_no_servers_stream(check, self._loaders) if adapter.heads.in_turns else check
        self._attempts = Attempts(adapter, store, self._opener, self._loaders, self._check, finders)
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
            wait(self._adapter.device)
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
        call = Call(prompt, config, started, chunks_open, answer_tokens, memory or self.memory, account=account)
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
            too_slow: is asked, once in each attempt (see `prefill`), where the chunks aren't all in memory: before they are opened, if it is known where all of them are, else when they are open. It is given the time that their rows are likely to take to be read, at the
                least, and what is computed meanwhile and behind it. Where it gives seconds, nothing is reused, and the chunks are read into host memory in the background, after
                so many seconds: the server then has the prompt without reuse, and reading doesn't take the host from it. None: they are quick enough. It says the same on all
                workers of a shared model, and is given on all of them or on none.
        """
        call = Call(
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
        call = self._with_namespace(Call(prompt, config, time.perf_counter(), _nothing, answer_tokens, memory))
        return self._attempts.begin(call)

    def rows_needed(self, config: ReuseConfig, reader: ChunkReader) -> int:
        """How many rows of each layer of a chunk a request will read, as far as that is known before it comes: more, if it shows the chunk behind one
        that breaks off within a sentence."""
        return rows_of(self._opener.tuned(config, reader.tier, reader.layout.codec), reader.layout)

    @neutrally
    def transfer(self, prompt: Prompt) -> tuple[int, float]:
        """Load every row of a prompt's stored chunks and compute nothing: (rows of a layer, seconds)."""
        with ExitStack() as stack:
            stack.enter_context(current(self._adapter.device))
            readers = OpenReaders()
            stack.callback(readers.close)
            found = self._opener.find(prompt, readers)
            buffers = self._adapter.new_buffers(len(prompt.ids))
            wait(self._adapter.device)
            clock = Clock()
            sources = sources_of(found, len(prompt.ids))
            loader = self._loaders.make(sources, buffers)
            stack.callback(loader.close)
            loader.start()
            for layer in range(self._adapter.num_layers):
                loader.load(layer)
            wait(self._adapter.device)
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

    def _with_namespace(self, call: Call) -> Call:
        """The call, for the model's weights as they are now: the request may have come before `model_changed()`."""
        namespace = call.config.namespace
        if namespace is not None and namespace.model == self._lead_ins.model:
            return call
        return replace(call, config=replace(call.config, namespace=self._lead_ins.recent_namespace), begun=None)

    def _prefill(self, call: Call) -> PrefillState | NothingReused:
        call = self._with_namespace(call)
        faults = Faults() if call.begun is None else call.begun.opened.faults
        while True:
            try:
                try:
                    return self._attempts.read(call, faults)
                except DamagedSourceError as error:
                    faults.failed(error.key, set_aside=self._pool.call(self._store.discard, error.key))
            except StoreTimeoutError:
                faults.disk_gone = True
            except PeerError as error:
                if not error.again:
                    raise
            call = replace(call, begun=None)


def _on_no_servers_stream(check: Callable[[], None], loaders: Loaders) -> Callable[[], None]:
    """`check`, on another stream. Where prompts take turns, the stream that they are computed on is the server's: to look at weights there would wait
    for its steps."""

    def look() -> None:
        with loaders.beside():
            check()

    return look
