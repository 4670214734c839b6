"""Turns a caller's arguments into a checked request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cachetune_rag.answering.decoding import DecodingPlan, prepare
from cachetune_rag.answering.generation_settings import is_setting, nearest
from cachetune_rag.answering.request import Request
from cachetune_rag.checking.arguments import check_flag
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.errors import ConfigError, PromptError, PromptTooLongError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.libraries.neutral import neutrally
from cachetune_rag.options import REQUEST_NAMES
from cachetune_rag.reuse.config import ReuseConfig, check_bound, check_reuse, resolve
from cachetune_rag.selection.bound import Bound
from cachetune_rag.selection.predictor import FEWEST_PROMPTS, Predictor
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.prompts.segments import Chunk, Prompt, given_chunks
from cachetune_store import Namespace
from cachetune_store.printing import shown


class Admission:
    """Checks what a caller asks for, and makes a request of it. Nothing is computed here. Safe to use from many threads.

    `CacheTune` documents the arguments and the errors.

    Args:
        adapter: the model that requests are for.
        tokenizer: the engine's own tokenizer.
        prompts: lays prompts out.
        lead_ins: know under which namespace chunks are stored.
        calibrated: gives the ratio that was calibrated for a selector and a namespace, or None.
        predictor: gives what predicts requests of a selector and a namespace, or None if that was not calibrated.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: Any,
        prompts: PromptBuilder,
        lead_ins: LeadIns,
        calibrated: Callable[[str, Namespace | None], float | None],
        predictor: Callable[[str, Namespace | None], Predictor | None],
    ):
        self._adapter, self._tokenizer, self._prompts = adapter, tokenizer, prompts
        self._lead_ins, self._calibrated, self._predictor = lead_ins, calibrated, predictor

    def config(
        self, selector: str, ratio: float | str, max_kl: float | None = None, min_top1: float | None = None
    ) -> ReuseConfig:
        """The reuse settings of a request that comes now, with the namespace that holds until it is over.

        "auto" becomes the calibrated ratio if there is one. With a bound, the ratio is found when the request's tokens are scored.

        Raises:
            ConfigError: a value that can't be used, or a bound for which nothing was calibrated.
        """
        bounded = check_bound(selector, ratio, max_kl, min_top1)
        config = replace(resolve(selector, ratio), namespace=self._lead_ins.recent_namespace)
        if not config.tunable:
            return config
        calibrated = self._calibrated(config.selector, config.namespace)
        if calibrated is not None:
            config = replace(config, ratio=calibrated)
        if not bounded:
            return config
        predictor = self._predictor(config.selector, config.namespace)
        if predictor is None:
            asked = f"max_kl={shown(max_kl)}" if max_kl is not None else f"min_top1={shown(min_top1)}"
            raise ConfigError(
                f"{asked} needs a prediction, and none was calibrated for selector {shown(config.selector)} as it is now on this store with this model "
                "and codec: run `cachetune calibrate PROMPTS --model MODEL --store STORE` (or engine.calibrate) with "
                f"{FEWEST_PROMPTS} prompts of your own "
                "or more, or leave the bound out."
            )
        return replace(config, tunable=False, finder=Bound(max_kl, min_top1, predictor))

    def prompt(
        self,
        query: str | None,
        chunks: Iterable[str | Chunk],
        prefix: str | None,
        prompt: Prompt | None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The given prompt, or one built from the other arguments, if it fits the model's context.

        Raises:
            ConfigError, PromptError, PromptTooLongError: the request can't be served.
        """
        chunks = given_chunks(chunks, refusal=ConfigError)
        self._check_no_settings(template_arguments or {})
        if prompt is None:
            if query is None:
                raise ConfigError("a request needs query= (with chunks=), or prompt= built by engine.prompts.")
            prompt = self._prompts.build(query=query, chunks=chunks, prefix=prefix, **(template_arguments or {}))
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
        limit = self._adapter.max_positions
        if limit is not None and len(prompt.ids) >= limit:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.ids)} tokens and the model's context is {limit}, which must also hold the "
                "answer: retrieve fewer or shorter chunks."
            )
        return prompt

    def for_prefill(
        self,
        query: str | None,
        chunks: Iterable[str | Chunk],
        prefix: str | None,
        prompt: Prompt | None,
        template_arguments: Mapping[str, Any],
        *,
        config: ReuseConfig | None,
        started: float,
    ) -> Request:
        """A request for a prompt's logits; arguments as for `CacheTune.prefill`, with `config` from the method of that name."""
        return Request(self.prompt(query, chunks, prefix, prompt, template_arguments), config, started=started)

    def for_answer(
        self,
        query: str | None,
        chunks: Iterable[str | Chunk],
        prefix: str | None,
        prompt: Prompt | None,
        further: Mapping[str, Any],
        *,
        started: float,
        ratio: float | str,
        selector: str,
        max_kl: float | None,
        min_top1: float | None,
        min_sure: float | None,
        reuse: bool,
        max_new_tokens: int | str | None,
        stop: str | Sequence[str] | None,
        generation_config: Any,
    ) -> Request:
        """A request for an answer; arguments as for `CacheTune.stream`, whose `sampling` is `further`."""
        check_flag(reuse, "reuse")
        # Full prefill keeps every bound, whatever was calibrated.
        bound = (max_kl, min_top1) if reuse else (None, None)
        check_reuse(ratio=ratio, selector=selector, max_kl=max_kl, min_top1=min_top1, min_sure=min_sure)
        config = self.config(selector, ratio, *bound)
        template_arguments, settings = self._split(further)
        built = self.prompt(query, chunks, prefix, prompt, template_arguments)
        decoding = self._decoding(
            built, settings, max_new_tokens=max_new_tokens, stop=stop, generation_config=generation_config
        )
        return Request(
            built, config if reuse else None, decoding, started=started, min_sure=min_sure if reuse else None
        )

    def chunk_ids(self, chunks: Iterable[str | Chunk], prompt: Prompt | None) -> Callable[[], Iterable[Sequence[int]]]:
        """Check the arguments of `CacheTune.prefetch` now. The returned function tokenises the chunks, which takes longer.

        Raises:
            ConfigError: they aren't chunks, or both arguments were given.
        """
        texts = tuple(chunk.text for chunk in given_chunks(chunks, refusal=ConfigError))
        if texts and prompt is not None:
            raise ConfigError("prefetch takes either chunks=, a list of strings, or prompt=, not both.")
        return lambda: map(self._prompts.encode, texts) if prompt is None else prompt.chunk_ids

    def _check_no_settings(self, template_arguments: Mapping[str, Any]) -> None:
        """Refuse what only requests for an answer take: the chat template's error would say that it is no variable.

        Raises:
            ConfigError: names the argument, and who takes it.
        """
        names = self._prompts.argument_names
        for name in template_arguments:
            if name not in names and (name in REQUEST_NAMES or is_setting(name)):
                raise ConfigError(
                    f"{shown(name)} is an argument of generate, generate_many and stream, and this call doesn't take it: leave it out, or call one of those."
                )

    def _split(self, further: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Divide further arguments into variables of the chat template and generation settings.

        Raises:
            ConfigError: a name is neither; the message suggests the nearest name, a request's own arguments included.
        """
        names = self._prompts.argument_names
        for name in further:
            if name not in names and not is_setting(name):
                raise ConfigError(
                    f"{shown(name)} is no generation setting, no argument of a request and no variable of the chat template: "
                    f"{nearest(name, REQUEST_NAMES, names, otherwise=_variables(names))}"
                )
        variables = {name: value for name, value in further.items() if name in names}
        return variables, {name: value for name, value in further.items() if name not in names}

    @neutrally
    def _decoding(self, prompt: Prompt, settings: Mapping[str, Any], **options: Any) -> DecodingPlan:
        limit = self._adapter.max_positions
        return prepare(
            self._adapter.model,
            self._tokenizer,
            list(prompt.ids),
            context_left=None if limit is None else limit - len(prompt.ids),
            **options,
            **settings,
        )


def _variables(names: Collection[str]) -> str:
    """A hint: which variables of the chat template a request can be given."""
    if not names:
        return "these prompts are laid out without a chat template, so there are no variables; "
    return f"the chat template has no such variable, only {', '.join(sorted(names))}; "
