"""What calibration and tuning measure on: an engine's model and a store, used beside the engine's requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from cachetune_rag.answering.admission import Admission
from cachetune_rag.answering.decoding import decode, prepare
from cachetune_rag.answering.executor import Executor
from cachetune_rag.chunks.chunk_computer import ChunkComputer
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.chunks.owners import ChunkToStore
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.concurrency.lifetime import Lifetime
from cachetune_rag.measuring.teacher import rewind, teacher_forced
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.engine_model import EngineModel
from cachetune_rag.reuse.account import Account
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.prefill import Assembler
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkStore, Namespace


@dataclass(frozen=True, eq=False)
class Bench:
    """Measures on an engine's model. Nothing of it counts as a request. The model is free between two calls, so a request waits for
    one of them at most. Calls that use the model are refused once the engine is closed.

    Attributes:
        model: the engine's part in the model.
        store: where chunks are read from.
        tokenizer: the engine's own.
        lead_ins: know under which namespace chunks are stored.
        pool: makes the store's disk calls.
        lifetime: tells whether the engine is closed.
        admission: checks and builds prompts as for requests.
        executor: takes the steps of a continuation.
        assembler: reads prompts, with chunks of `store` reused.
        chunk_computer: computes and stores chunks in the engine's store.
        flush: waits until the chunks that requests missed are stored.
    """

    model: EngineModel
    store: ChunkStore
    tokenizer: Any
    lead_ins: LeadIns
    pool: DeadlinePool
    lifetime: Lifetime
    admission: Admission
    executor: Executor
    assembler: Assembler
    chunk_computer: ChunkComputer
    flush: Callable[[], bool]

    def on(self, store: ChunkStore) -> Bench:
        """The same for the chunks of another store. Nothing is read ahead there, and every setting is taken as it is given."""
        return replace(self, store=store, assembler=self.assembler.on(store))

    @property
    def adapter(self) -> ModelAdapter:
        """Runs the model."""
        return self.model.adapter

    @property
    def namespace(self) -> Namespace:
        """What chunks' keys are made with; it changes when lead-ins are chosen, by this process or another."""
        return self.lead_ins.namespace

    # -- prompts and their chunks ---------------------------------------------------------------------------------

    def prompt(self, query: str, chunks: Iterable[str], prefix: str | None = None) -> Prompt:
        """A prompt as for `CacheTune.generate`.

        Raises:
            ConfigError, PromptError: the prompt can't be used.
        """
        return self.admission.prompt(query, chunks, prefix, None)

    def checked(self, prompt: Prompt) -> Prompt:
        """The given prompt, if requests could use it.

        Raises:
            ConfigError, PromptError: they couldn't.
        """
        return self.admission.prompt(None, (), None, prompt)

    def key(self, token_ids: Sequence[int]) -> ChunkKey:
        """The key of a chunk in the store."""
        return self.assembler.key(token_ids)

    def codec_of(self, key: ChunkKey) -> str | None:
        """The codec that a chunk is stored with; None if it isn't stored."""
        reader = self.store.open(key)
        if reader is None:
            return None
        with reader:
            return reader.layout.codec

    def store_missing(self, prompts: Iterable[Prompt]) -> set[str]:
        """Precompute the prompts' chunks that aren't stored: a request would compute them exactly, and reuse nothing of them.

        Returns:
            The codecs of the chunks that were stored before.
        """
        prompts = list(prompts)
        self.lifetime.check()
        self.flush()  # chunks that are just being stored can't be stored here
        while True:
            namespace = self.namespace
            codecs = self._store_missing(prompts)
            # The first chunks of a store may choose its lead-ins. Chunks that were stored before the choice are stored once more.
            if self.namespace == namespace:
                return codecs

    def _store_missing(self, prompts: Iterable[Prompt]) -> set[str]:
        missing: dict[ChunkKey, ChunkToStore] = {}
        codecs: set[str] = set()
        for prompt in prompts:
            for ids, text, document, since in zip(
                prompt.chunk_ids, prompt.chunk_texts, prompt.chunk_documents, prompt.chunk_since, strict=True
            ):
                if not ids or (key := self.key(ids)) in missing:
                    continue
                codec = self.codec_of(key)
                if codec is None:
                    missing[key] = ChunkToStore(ids, text, {document: since})
                else:
                    codecs.add(codec)
        if missing:
            self.chunk_computer.store_chunks(missing.values())
        return codecs

    # -- measuring ------------------------------------------------------------------------------------------------

    def prefill(
        self, prompt: Prompt, config: ReuseConfig | None, account: Callable[[Account], None] | None = None
    ) -> PrefillState:
        """Read a prompt; without a config all of it is computed. The time in its report begins when the model is free.

        `account` is as for `Assembler.prefill`; full prefill gives none.
        """
        with self.model.lock.reserved(), self.model.lock:
            self.lifetime.check()
            started = time.perf_counter()
            if config is None:
                return self.assembler.full_prefill(prompt, started)
            return self.assembler.prefill(prompt, config, started, account=account)

    def transfer(self, prompt: Prompt) -> tuple[int, float]:
        """Move all rows of a prompt's chunks to the model and compute nothing: (rows of a layer, seconds)."""
        with self.model.lock.reserved(), self.model.lock:
            self.lifetime.check()
            return self.assembler.transfer(prompt)

    def continuation(self, state: PrefillState, tokens: int) -> tuple[int, ...]:
        """What greedy decoding says behind a prompt, at most `tokens` of it. The prompt's cache is then as it was before."""
        length, limit = len(state.prompt.ids), self.adapter.max_positions
        most = tokens if limit is None else min(tokens, limit - length)
        plan = prepare(self.adapter.model, self.tokenizer, state.prompt.ids, max_new_tokens=most, do_sample=False)
        found = tuple(decode(self.executor.steps(state, most), plan, state.logits))
        rewind(state.cache, length)
        return found

    def logits_behind(self, state: PrefillState, target: Sequence[int]) -> list[Tensor]:
        """The logits from which each token of `target` would be chosen behind a prompt, all in one forward; see `teacher_forced`."""
        with self.model.lock.reserved(), self.model.lock:
            self.lifetime.check()
            logits = list(teacher_forced(self.adapter, state.logits, state.cache, target))
            self.model.check()
            return logits
