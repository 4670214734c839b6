"""Requests, from what a caller asked for to what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cachetune_rag.answering.answer import Answer, AnswerStream
from cachetune_rag.answering.decoding import check_finite, prepare
from cachetune_rag.answering.generation_settings import is_setting, nearest
from cachetune_rag.answering.request import new_request_id
from cachetune_rag.errors import ConfigError, PromptError, PromptTooLongError
from cachetune_rag.model.libraries.neutral import neutrally
from cachetune_rag.readahead.prefetcher import Prefetch
from cachetune_rag.report import Report
from cachetune_rag.reuse.config import ReuseConfig, resolve
from cachetune_rag.reuse.prefill import PrefillState
from cachetune_rag.text.prompts.segments import Chunk, Prompt, given_chunks
from cachetune_store import ChunkKey, make_key
from cachetune_store.printing import shown

if TYPE_CHECKING:
    from cachetune_rag.runtime import EngineParts


_ARGUMENTS = (
    "query", "chunks", "prefix", "prompt", "ratio", "selector", "reuse", "max_new_tokens", "stop", "generation_config",
)  # fmt: skip
"""What a request takes by name besides generation settings and variables of the chat template."""


def _variables(names: Collection[str]) -> str:
    """Which variables of the chat template a request can be given."""
    if not names:
        return "these prompts are laid out without a chat template, so there are no variables; "
    return f"the chat template has no such variable, only {', '.join(sorted(names))}; "


class RequestRunner:
    """Serves one engine's requests: checks them, runs them under the model's lock, and keeps the records.

    What it raises and what the arguments mean is said by `CacheTune`.
    """

    def __init__(self, engine: EngineParts):
        self._engine = engine

    # -- what is asked for ----------------------------------------------------------------------------------------

    def split(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What of a request's further arguments the chat template uses, and the rest, which are generation settings.

        Raises:
            ConfigError: a name is neither; the message names the nearest that there is, of the request's own arguments too.
        """
        names = self._engine.prompts.argument_names
        for name in arguments:
            if name not in names and not is_setting(name):
                raise ConfigError(
                    f"{shown(name)} is no generation setting, no argument of a request and no variable of the chat template: "
                    f"{nearest(name, _ARGUMENTS, names, otherwise=_variables(names))}"
                )
        mine = {name: value for name, value in arguments.items() if name in names}
        return mine, {name: value for name, value in arguments.items() if name not in names}

    def prompt(
        self,
        query: str | None,
        chunks: Iterable[str | Chunk],
        prefix: str | None,
        prompt: Prompt | None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt that was given or is to be built, if it fits the model's context.

        Raises:
            ConfigError, PromptError, PromptTooLongError: the request can't be served.
        """
        chunks = given_chunks(chunks, refusal=ConfigError)
        if prompt is None:
            if query is None:
                raise ConfigError("a request needs query= (with chunks=), or prompt= built by engine.prompts.")
            prompt = self._engine.prompts.build(query=query, chunks=chunks, prefix=prefix, **(template_arguments or {}))
        elif not isinstance(prompt, Prompt):
            raise PromptError(
                f"prompt is {shown(prompt)}, a {type(prompt).__name__}: build one with engine.prompts.build(...), "
                "engine.prompt_from_messages(...) or engine.prompt_from_text(...), or pass query= and chunks=."
            )
        elif query is not None or chunks or prefix is not None:
            raise ConfigError("a request takes either prompt= or query=, chunks= and prefix=, not both.")
        elif template_arguments:
            raise ConfigError(
                f"{shown(next(iter(template_arguments)))} is an argument for a chat template, and prompt= is laid out already: give it "
                "to engine.prompt_from_messages(...) or engine.prompts.build(...)."
            )
        if not prompt.ids:
            raise ConfigError("the prompt has no tokens: give a query or a prefix.")
        limit = self._engine.adapter.max_positions
        if limit is not None and len(prompt.ids) >= limit:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.ids)} tokens and the model's context is {limit}, which must also hold the "
                "answer: retrieve fewer or shorter chunks."
            )
        return prompt

    def config(self, selector: str, ratio: float | str) -> ReuseConfig:
        """The settings of a request that comes now, with the namespace that holds for all of it; "auto" is the calibrated ratio,
        if there is one."""
        config = replace(resolve(selector, ratio), namespace=self._engine.lead_ins.lately)
        if not config.tunable:
            return config
        calibrated = self._engine.runtime.calibrations.ratio(config.selector, config.namespace)
        return config if calibrated is None else replace(config, ratio=calibrated)

    # -- reading the prompt ---------------------------------------------------------------------------------------

    def prefetch(
        self, chunks: Iterable[str | Chunk], prompt: Prompt | None, config: ReuseConfig | None = None
    ) -> Prefetch:
        """Begin to read a coming request's chunks into host memory; what a request with `config` needs of them first."""
        engine = self._engine
        engine.runtime.lifetime.check()
        texts = tuple(chunk.text for chunk in given_chunks(chunks, refusal=ConfigError))
        if texts and prompt is not None:
            raise ConfigError("prefetch takes either chunks=, a list of strings, or prompt=, not both.")

        def keys() -> list[ChunkKey]:
            every = map(engine.prompts.encode, texts) if prompt is None else prompt.chunk_ids
            namespace = (config and config.namespace) or engine.lead_ins.lately
            return [make_key(namespace, ids) for ids in every if ids]

        rows = None if config is None else partial(engine.runtime.assembler.rows_needed, config)
        return engine.runtime.prefetcher.fetch(keys, rows)

    def prefill(
        self,
        prompt: Prompt,
        config: ReuseConfig | None,
        started: float,
        looked_up: Callable[[], None] = lambda: None,
        new_tokens: int = 1,
    ) -> PrefillState:
        """Read a prompt. Whoever asked for it has it counted once it is served (`served`): a request that fails is none.

        Args:
            prompt: from `prompt`.
            config: from `config`; None computes everything.
            started: when the request came (`time.perf_counter`).
            looked_up: called once its chunks are open.
            new_tokens: most tokens of the answer.
        """
        engine = self._engine
        engine.runtime.lifetime.check()
        with engine.runtime.model.lock.reserved(), engine.runtime.model.lock:
            engine.runtime.lifetime.check()
            if config is None:
                looked_up()
                state = engine.runtime.assembler.full_prefill(prompt, started)
            else:
                state = engine.runtime.assembler.prefill(prompt, config, started, looked_up, new_tokens - 1)
        return replace(state, report=replace(state.report, request_id=new_request_id()))

    def served(self, report: Report) -> None:
        """Count a request, and tell the observers of it: its prompt is read, and its first token chosen if it wants one."""
        self._engine.runtime.counter.add(report)
        self._engine.observers.prefilled(report)

    def read(self, prompt: Prompt, config: ReuseConfig | None, started: float) -> PrefillState:
        """A request for a prompt's logits alone; arguments as for `prefill`.

        Raises:
            NonFiniteLogitsError: they are no numbers.
        """
        state = self.prefill(prompt, config, started)
        check_finite(state.logits)
        self.served(state.report)
        return state

    def store_missed(self, state: PrefillState) -> PrefillState:
        """Keep what a request had to compute, for the next one. The logits don't depend on it, so no error of the store ends it."""
        unstored = self._engine.runtime.backfill.store(state.prompt, state.missed)
        return replace(state, report=replace(state.report, unstored=unstored))

    def store_later(self, state: PrefillState, report: Report) -> Report:
        """Keep what a request had to compute when the model has time for it; the report with how much that is."""
        storing = self._engine.runtime.backfill.offer(state.prompt, state.missed)
        return replace(report, storing=storing, unstored=len(state.missed) - storing)

    def store_whenever(self, state: PrefillState) -> None:
        """As `store_later`, for a caller that may already hold any lock (garbage collection): it waits for none."""
        self._engine.runtime.backfill.offer_from_anywhere(state.prompt, state.missed)

    # -- answering ------------------------------------------------------------------------------------------------

    @neutrally
    def stream(
        self,
        prompt: Prompt,
        config: ReuseConfig | None,
        started: float,
        *,
        max_new_tokens: int | str | None,
        stop: str | Sequence[str] | None,
        generation_config: Any,
        sampling: Mapping[str, Any],
    ) -> AnswerStream:
        """An answer to come; the first arguments as for `prefill`, the others as for `CacheTune.stream`."""
        engine = self._engine
        limit = engine.adapter.max_positions
        plan = prepare(
            engine.adapter.model,
            engine.tokenizer,
            list(prompt.ids),
            generation_config=generation_config,
            max_new_tokens=max_new_tokens,
            room=None if limit is None else limit - len(prompt.ids),
            stop=stop,
            **sampling,
        )
        return AnswerStream(self, prompt, config, plan, started)

    def check_open(self) -> None:
        """Refuse what comes when the engine is closed, or another process's.

        Raises:
            EngineClosedError, ForkedError: it is.
        """
        self._engine.runtime.lifetime.check()

    def reserved(self) -> AbstractContextManager[None]:
        """While the context is open, background work stays away from the model."""
        return self._engine.runtime.model.lock.reserved()

    def steps(self, state: PrefillState, new_tokens: int) -> Callable[[int], torch.Tensor]:
        """Decoding steps behind a prompt, for `forward`: those of full prefill are transformers' own throughout."""
        engine, adapter = self._engine, self._engine.adapter
        if state.report.full:
            steps = adapter.steps(state.cache)
        else:
            steps = adapter.quick_steps(state.cache, state.buffers, new_tokens - 1)
        check = engine.runtime.model.step_check()

        def step(token: int) -> torch.Tensor:
            check()  # an answer isn't finished with other weights than it was begun with
            return steps(token)

        return step

    def forward(self, token: int, steps: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """One decoding step: logits [1, vocab] after `token`."""
        self._engine.runtime.lifetime.check()
        with self._engine.runtime.model.lock:
            self._engine.runtime.lifetime.check()
            return steps(token)

    def answered(self, state: PrefillState, answer: Answer, started: float) -> None:
        """Tell the observers of a finished answer, and perhaps compare it with full prefill later on."""
        self._engine.observers.answered(answer.report, answer, time.perf_counter() - started)
        self._engine.runtime.fidelity.offer(state, answer.token_ids)
