"""Chooses an answer's tokens after the prefill, with transformers' own generation settings.

`model.generate` prepares logits processors and stopping criteria, and passes them to a callable of ours instead of running its own
loop. So penalties, minimum lengths, warpers and end tokens work exactly as in transformers, while the loop is a plain generator over
the engine's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

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

from cachetune_rag.answering.generation_settings import (
    DEFAULT_NEW_TOKENS,
    LEAST_SEED,
    MOST_SEED,
    REFUSED,
    answer_length,
    callables,
    check_ids,
    check_names,
    given_settings,
    merged,
    stop_strings,
)
from cachetune_rag.checking.arguments import is_count
from cachetune_rag.checking.escaping import words_of
from cachetune_rag.errors import ConfigError, NonFiniteLogitsError, PromptError, UnsupportedModelError
from cachetune_rag.text.detokenizer import TextStream
from cachetune_store.printing import shown

__all__ = ["DEFAULT_NEW_TOKENS", "DecodingPlan", "TextStream", "check_finite", "decode", "decode_text", "prepare"]


@dataclass(frozen=True, eq=False)
class DecodingPlan:
    """How one answer is decoded; made by `prepare`.

    Attributes:
        ids: the prompt, [1, tokens], on the model's device; penalties need it.
        logits_processor: changes logits before a token is chosen.
        criteria: reasons to stop besides those below.
        do_sample: whether tokens are drawn (else the likeliest is taken).
        eos_ids: tokens that end the answer. They are part of the answer's tokens, as with `generate`.
        max_new_tokens: most tokens of the answer.
        stop: strings that end the answer.
        seed: makes drawing repeatable; None draws from torch's global generator.
        tokenizer: turns tokens into text, to find stop strings.
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

    def text_stream(self) -> TextStream:
        """Turns the tokens of this answer into text: without stop strings, end tokens and special tokens."""
        return TextStream(self.tokenizer, self.stop, skip=self.eos_ids)


class Decoded(NamedTuple):
    """One token of an answer.

    Attributes:
        token: its id.
        text: the text that became certain with it, possibly none.
        finish_reason: why the answer ends with it: "stop" (an end token, a stop string, or one of the caller's criteria) or "length"
            (max_new_tokens or max_time); "" before the last token.
    """

    token: int
    text: str
    finish_reason: str


def prepare(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    generation_config: Any = None,
    max_new_tokens: int | str | None = "auto",
    context_left: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    **settings: Any,
) -> DecodingPlan:
    """Work out how an answer is decoded. The model isn't run.

    In order of precedence: `settings`, `generation_config`, the model's own generation config, transformers'
    defaults. `temperature=0` means greedy decoding; a sampling setting without `do_sample` switches sampling on.

    Args:
        model: a transformers model that can generate.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        generation_config: a transformers `GenerationConfig`.
        max_new_tokens: most tokens of the answer, which never goes beyond `context_left`. "auto" and None: as `generation_config` says
            (max_new_tokens or max_length), or else the model's own; where neither does, "auto" means `DEFAULT_NEW_TOKENS` and
            None all that the context still holds.
        context_left: tokens that the model's context still holds; None: it has no end.
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
    _check_answerable(model, ids)
    if seed is not None and not is_count(seed, LEAST_SEED, MOST_SEED):
        raise ConfigError(f"seed is {shown(seed)}: use an int from -2**63 to 2**64 - 1, or None.")
    settings = {name: value for name, value in settings.items() if value is not None}
    check_names(settings)
    base = given_settings(generation_config)
    for given in (settings, base):
        check_ids(given, model.config.get_text_config().vocab_size)
    stops = stop_strings(stop, base.pop("stop_strings", None) or getattr(model.generation_config, "stop_strings", None))
    limit = answer_length(max_new_tokens, (base, vars(model.generation_config)), len(ids), context_left)
    chosen = merged(settings, base)
    _fill_in_end_tokens(chosen, model, tokenizer)
    prompt = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
    # max_length rather than max_new_tokens: many models ship a max_length, and having both is warned about.
    chosen |= {"max_length": len(ids) + limit, "max_new_tokens": None, "stop_strings": None}
    processors, criteria, config = _ask_generate(
        model,
        inputs=prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=LogitsProcessorList(callables(logits_processor, "logits_processor")),
        stopping_criteria=StoppingCriteriaList(callables(stopping_criteria, "stopping_criteria")),
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
        plan: from `prepare`.
        first_logits: logits [1, vocab] of the prompt's last token.

    Raises:
        NonFiniteLogitsError: the model gives logits that are no numbers.
        ConfigError: the generation settings leave no token to choose.
    """
    for decoded in _decode(forward, plan, first_logits, plan.text_stream() if plan.stop else None):
        yield decoded.token


def decode_text(forward: Callable[[int], Tensor], plan: DecodingPlan, first_logits: Tensor) -> Iterator[Decoded]:
    """As `decode`, with the text and the end of the answer."""
    yield from _decode(forward, plan, first_logits, plan.text_stream())


# -- inside -----------------------------------------------------------------------------------------------------------


def _check_answerable(model: Any, ids: Sequence[int]) -> None:
    """Refuse a model that can't generate, and a prompt without tokens."""
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: True)():
        raise UnsupportedModelError(f"{type(model).__name__} can't generate: load it with AutoModelForCausalLM.")
    if not len(ids):
        raise PromptError("the prompt has no tokens, so there is nothing to continue: give a query or a prefix.")
    if not isinstance(model.generation_config, GenerationConfig):
        raise ConfigError(
            f"the model's generation_config is {model.generation_config!r:.80}: set it to a transformers GenerationConfig."
        )


def _fill_in_end_tokens(chosen: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Add the ids of end tokens and padding to an answer's settings, where neither these nor the model's configuration have them."""
    eos = chosen.get("eos_token_id", getattr(model.generation_config, "eos_token_id", None))
    if eos is None:  # files converted from other formats may know their end token only in the tokenizer
        eos = chosen["eos_token_id"] = tokenizer.eos_token_id
    if chosen.get("pad_token_id", getattr(model.generation_config, "pad_token_id", None)) is None and eos is not None:
        # It is never used, but missing it is warned about. Without end tokens (an empty list) any will do.
        chosen["pad_token_id"] = int(next(iter(torch.as_tensor(eos).flatten()), 0))


def _decode(
    forward: Callable[[int], Tensor], plan: DecodingPlan, first_logits: Tensor, text: TextStream | None
) -> Iterator[Decoded]:
    generator = None
    if plan.do_sample and plan.seed is not None:
        generator = torch.Generator(device=plan.ids.device).manual_seed(plan.seed)
    ids, logits = plan.ids, first_logits
    while True:
        token, ids, scores = _choose(plan, ids, logits, generator)
        piece = "" if text is None else text.push(token)
        reason = _finish(plan, ids, token, scores, text is not None and text.stopped)
        if reason and text is not None:
            piece += text.finish()
        yield Decoded(token, piece, reason)
        if reason:
            return
        logits = forward(token)


@torch.no_grad()
def _choose(
    plan: DecodingPlan, ids: Tensor, logits: Tensor, generator: torch.Generator | None
) -> tuple[int, Tensor, Tensor]:
    """The next token, all ids up to it, and the scores [1, vocab] that it was chosen by."""
    # Processors may write into the logits, and expect float32.
    scores = plan.logits_processor(ids, logits.to(device=ids.device, dtype=torch.float32, copy=True))
    if plan.do_sample:
        odds = torch.softmax(scores, dim=-1)
        # Drawing from NaN breaks CUDA for the whole process, so harmless odds replace them; that token is never used.
        sound = odds.sum(dim=-1, keepdim=True)
        token = torch.multinomial(odds.where(sound.isfinite(), 1.0), 1, generator=generator)
    else:
        sound, token = scores.max(dim=-1, keepdim=True)  # a number only if all are
    # One read for both, since each read waits for the GPU. Doubles represent every token id exactly.
    chosen, known = torch.cat([token.double(), sound.double()], dim=-1).flatten().tolist()
    if not math.isfinite(known):
        _refuse(logits)
    return int(chosen), torch.cat([ids, token], dim=-1), scores


def check_finite(logits: Tensor) -> None:
    """Refuse logits from which no token can be chosen.

    Raises:
        NonFiniteLogitsError: the largest is no number.
    """
    if not bool(logits.max().isfinite()):
        raise NonFiniteLogitsError(
            f"the model's logits are no numbers ({int(logits.isnan().sum())} of {logits.numel()} are NaN), so there is no next "
            "token: check its weights for NaN, and where it runs in float16, whose range many models exceed, load it in bfloat16 "
            "or float32."
        )


def _refuse(logits: Tensor) -> NoReturn:
    """Raise: no token can be chosen, because of the model or because of what processors did to its logits."""
    check_finite(logits)
    raise ConfigError(
        "the generation settings (or a logits_processor) leave no token to choose, all scores being -inf or no numbers: leave out "
        "some of those that rule tokens out, such as suppress_tokens and bad_words_ids."
    )


def _finish(plan: DecodingPlan, ids: Tensor, token: int, scores: Tensor, stopped: bool) -> str:
    if token in plan.eos_ids or stopped:
        return "stop"
    for criterion in plan.criteria:
        if bool(torch.as_tensor(criterion(ids, scores)).all()):
            return "length" if isinstance(criterion, MaxTimeCriteria) else "stop"
    return "length" if ids.shape[1] - plan.ids.shape[1] >= plan.max_new_tokens else ""


def _ask_generate(model: Any, **arguments: Any) -> tuple[LogitsProcessorList, StoppingCriteriaList, Any]:
    """The processors, criteria and configuration that `model.generate` would decode with."""
    recorded: list[Any] = []

    def record(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        recorded.extend((logits_processor, stopping_criteria, generation_config))
        return input_ids

    try:
        model.generate(**arguments, custom_generate=record)
    except Exception as error:  # the model isn't run, so the settings must be the reason
        raise ConfigError(f"transformers refuses these generation settings: {words_of(error)}") from error
    processors, criteria, config = recorded
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise ConfigError(
            f"the generation settings ask for {mode.replace('_', ' ')}, which can't run on a reused cache: use greedy "
            "decoding or sampling (num_beams=1, and no assistant, lookup or contrastive settings)."
        )
    for name in ("num_return_sequences", "guidance_scale", "token_healing", "is_assistant"):
        value = getattr(config, name, None)
        if value is not None and value not in (1, False):
            raise ConfigError(f"{name} is {shown(value)} in the generation settings: leave it out ({REFUSED[name]}).")
    return processors, criteria, config
