"""Choosing tokens after the prefill, by the rules of transformers' own generation settings.

`model.generate` prepares logits processors and stopping criteria and hands them to a callable instead of running its
loop; they are the very objects it would use. So penalties, minimum lengths, warpers and end tokens mean what they mean
there, while the loop itself is a plain generator over the engine's cache.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from cachetune_rag.errors import ConfigError, PromptError, UnsupportedModelError
from cachetune_rag.text_stream import TextStream

__all__ = ["DEFAULT_NEW_TOKENS", "DecodingPlan", "TextStream", "decode", "prepare"]

DEFAULT_NEW_TOKENS = 256
"""Most tokens of an answer where neither the request nor the configuration says."""

_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""Settings that do nothing in greedy decoding."""

_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "a number from 0 (greedy decoding) upwards", lambda value: 0 <= value < math.inf),
    ("top_p", "a number above 0, up to 1", lambda value: 0 < value <= 1),
    ("top_k", "an int of at least 0 (0: no limit)", lambda value: value >= 0 and value == int(value)),
)
"""Where transformers says little, or takes a value that can't be meant."""

_REFUSED = {
    "max_length": "use max_new_tokens, which does not count the prompt",
    "stop_strings": "use stop",
    "num_return_sequences": "a request has one answer; ask again, with another seed",
    "token_healing": "it would change the prompt's tokens",
    "guidance_scale": "it needs a second model run beside every reused one",
}


@dataclass
class DecodingPlan:
    """How one answer is decoded; made by `prepare`.

    Attributes:
        ids: the prompt, [1, tokens], on the model's device: penalties look at it.
        logits_processor: changes logits before a token is chosen.
        criteria: further reasons to stop, beside those below.
        do_sample: whether tokens are drawn (else the likeliest is taken).
        eos_ids: tokens that end the answer. They are yielded, as by `generate`.
        max_new_tokens: most tokens of the answer.
        stop: strings that end the answer.
        seed: makes drawing repeatable; None draws from torch's global generator.
        tokenizer: turns tokens into text, to find stop strings.
        finish_reason: set by `decode` before it yields the last token: "stop" (an end token, a stop string, a criterion
            of the caller's) or "length" (max_new_tokens or max_time); "" until then.
    """

    ids: Tensor
    logits_processor: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    eos_ids: frozenset[int]
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    tokenizer: Any
    finish_reason: str = field(default="", init=False)

    def text_stream(self) -> TextStream:
        """Turns the tokens of this answer into text: without stop strings, end tokens and special tokens."""
        return TextStream(self.tokenizer, self.stop, skip=self.eos_ids)


def prepare(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    generation_config: Any = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    **settings: Any,
) -> DecodingPlan:
    """Work out how an answer is decoded. The model isn't run.

    What counts, first to last: `settings`, `generation_config`, the model's own generation config, transformers'
    defaults. `temperature=0` means greedy decoding; a sampling setting without `do_sample` switches sampling on.

    Args:
        model: a transformers model that can generate.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        generation_config: a transformers `GenerationConfig`.
        max_new_tokens: most tokens of the answer; None for the configuration's number or `DEFAULT_NEW_TOKENS`.
        stop: strings that end the answer, in addition to the configuration's.
        seed: makes sampling repeatable: the same as `torch.manual_seed(seed)` before `generate`.
        logits_processor: further processors, run after those that the settings ask for.
        stopping_criteria: further criteria.
        settings: attributes of `GenerationConfig`, e.g. do_sample, temperature, top_p, repetition_penalty; None counts
            as not given.

    Raises:
        ConfigError: an unknown setting, a value out of range, or a mode that decodes more than one sequence or more than
            one token at a time (beam search, assisted decoding, ...).
        PromptError: the prompt has no tokens.
        UnsupportedModelError: the model can't generate.
    """
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: True)():
        raise UnsupportedModelError(f"{type(model).__name__} can't generate: load it with AutoModelForCausalLM.")
    if not len(ids):
        raise PromptError("the prompt has no tokens, so there is nothing to continue: give a query or a prefix.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed is {seed!r}: use an int, or None.")
    settings = {name: value for name, value in settings.items() if value is not None}
    _check_names(settings)
    base = _given(generation_config)
    stops = _stop_strings(
        stop, base.pop("stop_strings", None) or getattr(model.generation_config, "stop_strings", None)
    )
    chosen = _settle(settings, base)
    limit = max_new_tokens if max_new_tokens is not None else chosen.get("max_new_tokens")
    if limit is None:
        limit = getattr(model.generation_config, "max_new_tokens", None) or DEFAULT_NEW_TOKENS
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"max_new_tokens is {limit!r}: use an int of at least 1.")
    eos = chosen.get("eos_token_id", getattr(model.generation_config, "eos_token_id", None))
    if eos is None:  # files converted from other formats may know their end token only in the tokenizer
        eos = chosen["eos_token_id"] = tokenizer.eos_token_id
    if chosen.get("pad_token_id", getattr(model.generation_config, "pad_token_id", None)) is None and eos is not None:
        chosen["pad_token_id"] = eos if isinstance(eos, int) else eos[0]  # unused, but missing it is warned about
    prompt = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
    # max_length rather than max_new_tokens: many models ship a max_length, and having both is warned about.
    chosen |= {"max_length": len(ids) + limit, "max_new_tokens": None, "stop_strings": None}
    processors, criteria, config = _ask_generate(
        model,
        inputs=prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=LogitsProcessorList(logits_processor),
        stopping_criteria=StoppingCriteriaList(stopping_criteria),
        **chosen,
    )
    ends = {
        int(i) for c in criteria if isinstance(c, EosTokenCriteria) for i in torch.as_tensor(c.eos_token_id).flatten()
    }
    return DecodingPlan(
        ids=prompt,
        logits_processor=processors,
        criteria=StoppingCriteriaList(c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)),
        do_sample=bool(config.do_sample),
        eos_ids=frozenset(ends),
        max_new_tokens=limit,
        stop=stops,
        seed=seed,
        tokenizer=tokenizer,
    )


def decode(forward: Callable[[int], Tensor], plan: DecodingPlan, first_logits: Tensor) -> Iterator[int]:
    """Yield the answer's token ids, one at a time; nothing runs between two.

    Args:
        forward: gives the logits [1, vocab] that follow a token, which it appends to the cache.
        plan: from `prepare`. Its `finish_reason` is set before the last token is yielded.
        first_logits: logits [1, vocab] of the prompt's last token.
    """
    plan.finish_reason = ""
    generator = None
    if plan.do_sample and plan.seed is not None:
        generator = torch.Generator(device=plan.ids.device).manual_seed(plan.seed)
    text = plan.text_stream() if plan.stop else None
    ids, logits = plan.ids, first_logits
    while True:
        token, ids, scores = _choose(plan, ids, logits, generator)
        if text is not None:
            text.push(token)
        plan.finish_reason = _finish(plan, ids, token, scores, text is not None and text.stopped)
        yield token
        if plan.finish_reason:
            return
        logits = forward(token)


# -- inside -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _choose(
    plan: DecodingPlan, ids: Tensor, logits: Tensor, generator: torch.Generator | None
) -> tuple[int, Tensor, Tensor]:
    """The next token, the ids with it, and the scores [1, vocab] that it was chosen by."""
    # Processors may write into what they get, and expect float32.
    scores = plan.logits_processor(ids, logits.to(device=ids.device, dtype=torch.float32, copy=True))
    if plan.do_sample:
        token = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator)
    else:
        token = scores.argmax(dim=-1, keepdim=True)
    return int(token), torch.cat([ids, token], dim=-1), scores


def _finish(plan: DecodingPlan, ids: Tensor, token: int, scores: Tensor, stopped: bool) -> str:
    if token in plan.eos_ids or stopped:
        return "stop"
    for criterion in plan.criteria:
        if bool(torch.as_tensor(criterion(ids, scores)).all()):
            return "length" if isinstance(criterion, MaxTimeCriteria) else "stop"
    return "length" if ids.shape[1] - plan.ids.shape[1] >= plan.max_new_tokens else ""


def _ask_generate(model: Any, **arguments: Any) -> tuple[LogitsProcessorList, StoppingCriteriaList, Any]:
    """What `model.generate` would decode with."""
    recorded: list[Any] = []

    def record(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        recorded.extend((logits_processor, stopping_criteria, generation_config))
        return input_ids

    try:
        model.generate(**arguments, custom_generate=record)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"transformers refuses these generation settings: {error}") from error
    processors, criteria, config = recorded
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise ConfigError(
            f"the generation settings ask for {mode.replace('_', ' ')}, which can't run on a reused cache: use greedy "
            "decoding or sampling (num_beams=1, and no assistant, lookup or contrastive settings)."
        )
    for name in ("num_return_sequences", "guidance_scale", "token_healing"):
        value = getattr(config, name, None)
        if value is not None and value not in (1, False):
            raise ConfigError(f"{name} is {value!r} in the generation settings: leave it out ({_REFUSED[name]}).")
    return processors, criteria, config


def _known() -> set[str]:
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}


def _check_names(settings: dict[str, Any]) -> None:
    known = _known() - set(_REFUSED)
    for name in settings:
        if name in _REFUSED:
            raise ConfigError(f"{name}={settings[name]!r} is no setting of an answer: {_REFUSED[name]}.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see transformers' GenerationConfig for those there are."
            raise ConfigError(f"{name!r} is no generation setting: {hint}")


def _given(config: Any) -> dict[str, Any]:
    """What a `GenerationConfig` sets, as keyword arguments: so it can be mixed with others without a warning."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ConfigError(f"generation_config is {config!r:.80}: use a transformers GenerationConfig, or None.")
    return {name: vars(config)[name] for name in _known() if vars(config).get(name) is not None}


def _settle(settings: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Lay a request's settings over a configuration's, and decide between greedy decoding and sampling."""
    for name, allowed, fits in _RANGES:
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not fits(value)):
            raise ConfigError(f"{name} is {value!r}: use {allowed}.")
    settings = dict(settings)
    if settings.get("temperature") == 0:
        if settings.get("do_sample"):
            raise ConfigError("temperature is 0 with do_sample=True: use a temperature above 0, or do_sample=False.")
        settings["do_sample"] = False
    elif not _SAMPLING.isdisjoint(settings):
        settings.setdefault("do_sample", True)
    chosen = base | settings
    if settings.get("do_sample") is False:
        return {name: value for name, value in chosen.items() if name not in _SAMPLING}
    return chosen


def _stop_strings(*sources: str | Sequence[str] | None) -> tuple[str, ...]:
    found: list[str] = []
    for source in sources:
        if source is not None and (isinstance(source, Mapping) or not isinstance(source, Iterable)):
            raise ConfigError(f"stop is {source!r}: use a string, or a list of strings.")
        for text in [source] if isinstance(source, str) else source or ():
            if not isinstance(text, str) or not text:
                raise ConfigError(f"stop contains {text!r}: use strings of at least one character.")
            found.append(text)
    return tuple(dict.fromkeys(found))
