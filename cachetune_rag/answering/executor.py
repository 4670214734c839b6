"""Runs requests on the model, and tells listeners what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cachetune_rag.answering.decoding import check_finite
from cachetune_rag.answering.request import Finished, Request, RequestListener
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.async_calls import check_cancelled
from cachetune_rag.concurrency.lifetime import Lifetime
from cachetune_rag.errors import ConfigError
from cachetune_rag.model.engine_model import EngineModel
from cachetune_rag.readahead.batch import Prefetch
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.report import ReadAgain, Report
from cachetune_rag.reuse.account import Account
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.memory import KVMemory
from cachetune_rag.reuse.prefill import Assembler
from cachetune_rag.reuse.reading import Reading
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_store import ChunkKey, make_key


def _nothing() -> None:
    pass


class Executor:
    """Reads prompts and decodes answers under the model's lock. Safe to use from many threads.

    Args:
        model: runs one forward at a time.
        assembler: reads a prompt, with stored chunks reused.
        prefetcher: reads chunks from disk before the requests that need them.
        lead_ins: know under which namespace chunks are stored.
        lifetime: ends requests once the engine is closed.
        listeners: told about each request, in this order.
    """

    def __init__(
        self,
        model: EngineModel,
        assembler: Assembler,
        prefetcher: Prefetcher,
        lead_ins: LeadIns,
        lifetime: Lifetime,
        listeners: Sequence[RequestListener] = (),
    ):
        self._model, self._assembler, self._prefetcher = model, assembler, prefetcher
        self._lead_ins, self._lifetime, self._listeners = lead_ins, lifetime, tuple(listeners)

    def check_open(self) -> None:
        """Refuse requests once the engine is closed, and in other processes.

        Raises:
            EngineClosedError, ForkedError: it is so.
        """
        self._lifetime.check()

    def reserved(self) -> AbstractContextManager[None]:
        """While the context is open, background work stays away from the model."""
        return self._model.lock.reserved()

    # -- the prompt -----------------------------------------------------------------------------------------------

    def prefill(self, request: Request, chunks_open: Callable[[], None] = _nothing) -> PrefillState:
        """Read the prompt. The listeners are not told yet: a request that fails before its first token is not counted.

        Args:
            request: what to read.
            chunks_open: called once the prompt's chunks are open.
        """
        model = self._model
        self._check_wanted()
        with model.lock.reserved(), model.lock:
            self._check_wanted()
            if request.config is None:
                chunks_open()
                state = self._assembler.full_prefill(request.prompt, request.started)
            else:
                state = self._assembler.prefill(
                    request.prompt, request.config, request.started, chunks_open, request.new_tokens - 1
                )
        return replace(state, report=replace(state.report, request_id=request.id))

    def begin(self, request: Request, memory: KVMemory) -> Begun | None:
        """See `Assembler.begin`. Called from `meanwhile` of another `reuse`, which has the model."""
        if request.config is None:
            raise ConfigError(f"request {request.id} has no settings of reuse: make it with a ReuseConfig.")
        self._lifetime.check()
        with self._model.lock:
            return self._assembler.begin(request.prompt, request.config, memory, request.new_tokens - 1)

    def reuse(
        self,
        request: Request,
        memory: KVMemory,
        chunks_open: Callable[[], None] = _nothing,
        begun: Begun | None = None,
        meanwhile: Callable[[], None] | None = None,
        account: Callable[[Account], None] | None = None,
        too_slow: Callable[[Reading], float | None] | None = None,
    ) -> PrefillState | NothingReused:
        """Put a prompt's keys and values together in somebody else's memory, if anything of it is reused.

        For a server that computes prompts itself where nothing is reused. The listeners are not told: the server knows when its
        request is over.

        Args:
            request: what to read, with the settings of its reuse.
            memory: where the keys and values go.
            chunks_open: called once the prompt's chunks are open.
            begun: what `begin` gave for this request and memory.
            meanwhile: called again and again while the device computes.
            account: see `Assembler.prefill`; not called where nothing is reused.
            too_slow: see `Assembler.reuse`.
        """
        if request.config is None:
            raise ConfigError(f"request {request.id} has no settings of reuse: make it with a ReuseConfig.")
        model = self._model
        self._check_wanted()
        with model.lock.reserved(), model.lock:
            self._check_wanted()
            state = self._assembler.reuse(
                request.prompt,
                request.config,
                request.started,
                memory,
                chunks_open,
                request.new_tokens - 1,
                begun,
                meanwhile,
                account,
                too_slow,
            )
        return replace(state, report=replace(state.report, request_id=request.id))

    def read(self, request: Request) -> PrefillState:
        """Read the prompt of a request that wants its logits alone, and tell the listeners.

        Raises:
            NonFiniteLogitsError: the logits are NaN or infinite.
        """
        state = self.prefill(request)
        check_finite(state.logits)
        self.prefilled(request, state.report)
        return state

    def prefetch(self, chunk_ids: Callable[[], Iterable[Sequence[int]]], config: ReuseConfig | None = None) -> Prefetch:
        """Begin to read a coming request's chunks into host memory.

        Args:
            chunk_ids: gives the chunks' token ids; called on the thread that reads.
            config: the coming request's settings: the rows that it needs are read first. None: not known yet.
        """

        def keys() -> list[ChunkKey]:
            namespace = (config and config.namespace) or self._lead_ins.recent_namespace
            return [make_key(namespace, ids) for ids in chunk_ids() if ids]

        rows = None if config is None else partial(self._assembler.rows_needed, config)
        return self._prefetcher.fetch(keys, rows)

    # -- the answer -----------------------------------------------------------------------------------------------

    def steps(self, state: PrefillState, new_tokens: int) -> Callable[[int], Tensor]:
        """A function that decodes: it appends a token to the cache and returns the logits [1, vocab] that follow it.

        It takes the model's lock for one token at a time. Behind full prefill the steps are transformers' own, so that the reference
        stays a reference.

        Args:
            state: the prompt as it was read.
            new_tokens: the most tokens of the answer.
        """
        model, adapter = self._model, self._model.adapter
        if state.report.full:
            forward = adapter.steps(state.cache)
        else:
            forward = adapter.quick_steps(state.cache, state.buffers, new_tokens - 1)
        check_weights = model.step_check()

        def step(token: int) -> Tensor:
            self._check_wanted()
            with model.lock:
                self._check_wanted()
                check_weights()
                return forward(token)

        return step

    def read_again(self, request: Request, said: Sequence[int]) -> tuple[PrefillState, Tensor]:
        """Read a prompt without reuse in the middle of its answer. The listeners are told by `was_read_again`.

        Args:
            request: what to read.
            said: the answer's tokens so far.

        Returns:
            The prompt as it was read, whose cache has these tokens as well, and the logits [1, vocab] that follow them: both are as if full prefill
            had been asked for, and had said the same.
        """
        model, adapter = self._model, self._model.adapter
        check_weights = model.step_check()
        self._check_wanted()
        with model.lock.reserved(), model.lock:
            self._check_wanted()
            state = self._assembler.full_prefill(request.prompt, request.started)
            if not said:
                return state, state.logits
            check_weights()
            return state, adapter.go_on(torch.tensor(said, dtype=torch.int64, device=adapter.device), state.cache)

    def _check_wanted(self) -> None:
        """End the request if the engine was closed or the task that waits was cancelled.

        Asked before the model's lock is waited for, because that may take long, and again once it is held.
        """
        self._lifetime.check()
        check_cancelled()

    # -- listeners ------------------------------------------------------------------------------------------------

    def prefilled(self, request: Request, report: Report) -> None:
        """Tell the listeners that the prompt was read, and the first token chosen if one is wanted."""
        for listener in self._listeners:
            listener.prefilled(request, report)

    def was_read_again(self, request: Request, again: ReadAgain) -> None:
        """Tell the listeners that a prompt was read again in the middle of its answer."""
        for listener in self._listeners:
            listener.read_again(request, again)

    def finish(self, end: Finished) -> Finished:
        """Tell the listeners that a request is over. Returns it with what they add to its report."""
        for listener in self._listeners:
            report = listener.finished(end)
            if report is not end.report:
                answer = None if end.answer is None else replace(end.answer, report=report)
                end = replace(end, report=report, answer=answer)
        return end

    def abandon(self, request: Request, state: PrefillState) -> None:
        """Tell the listeners that an answer was given up, perhaps by the garbage collector: no lock is waited for."""
        for listener in self._listeners:
            listener.abandoned(request, state)
