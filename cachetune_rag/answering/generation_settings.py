"""Generation settings: which of them apply, and which can't be served.

A request's own settings override those of its `GenerationConfig`, which override the model's. Settings that transformers would refuse
only later, deep inside torch, or not at all, are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from cachetune_rag.checking.arguments import hint, is_count, is_iterable, is_number
from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown

DEFAULT_NEW_TOKENS = 256
"""The most tokens of an answer, where neither the request nor the configuration gives a number."""

LEAST_SEED, MOST_SEED = -(1 << 63), (1 << 64) - 1
"""Seeds that torch accepts."""

_FURTHER = ("seed", "logits_processor", "stopping_criteria")
"""Settings of an answer that are not in transformers' GenerationConfig."""

_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "force_words_ids", "decoder_start_token_id",
)  # fmt: skip
"""Settings that hold token ids. An unknown id would fail at the first token, deep inside torch, or not at all."""

_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""Settings without effect in greedy decoding."""

_FLAGS = (
    "do_sample", "renormalize_logits", "remove_invalid_values", "use_cache", "low_memory", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states", "return_dict_in_generate", "disable_compile", "is_assistant",
)  # fmt: skip
"""Settings that are on or off. Any text would count as on, even "no"."""

_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "a number from 0 (greedy decoding) upwards", lambda value: 0 <= value < math.inf),
    ("top_p", "a number above 0, up to 1", lambda value: 0 < value <= 1),
    ("top_k", "an int of at least 0 (0: no limit)", lambda value: 0 <= value < math.inf and value == int(value)),
    ("repetition_penalty", "a number above 0 (1: no penalty)", lambda value: 0 < value < math.inf),
    ("max_time", "seconds above 0", lambda value: 0 < value < math.inf),
    *(
        (name, "an int of at least 0", lambda value: isinstance(value, int) and 0 <= value < 1 << 63)
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_new_tokens", "min_length")
    ),
)
"""Ranges that are checked here, because transformers' own error says little or it accepts meaningless values."""

REFUSED = {
    "is_assistant": "an answer is decoded by one model",
    "max_length": "use max_new_tokens, which does not count the prompt",
    "stop_strings": "use stop",
    "num_return_sequences": "a request has one answer; ask again, with another seed",
    "token_healing": "it would change the prompt's tokens",
    "guidance_scale": "it needs a second model run beside every reused one",
}


def answer_length(
    asked: Any, configs: Sequence[Mapping[str, Any]], prompt_tokens: int, context_left: int | None
) -> int:
    """Most tokens of an answer: as asked, or as the first configuration says that does, within the context."""
    limit, whose = asked, "max_new_tokens"
    if asked is None or (isinstance(asked, str) and asked == "auto"):
        limit = DEFAULT_NEW_TOKENS if asked == "auto" or context_left is None else context_left
        for config in configs:
            if (limit_there := config.get("max_new_tokens")) is not None:
                limit, whose = limit_there, "max_new_tokens of the generation config"
                break
            if (whole := config.get("max_length")) is not None:
                if not is_count(whole, prompt_tokens + 1):
                    raise ConfigError(
                        f"max_length of the generation config is {shown(whole)}, which counts the prompt's {prompt_tokens} tokens: use a "
                        "larger one, or max_new_tokens, which doesn't count them."
                    )
                limit = whole - prompt_tokens
                break
    if not is_count(limit, 1):
        raise ConfigError(
            f"{whose} is {shown(limit)}: use an int of at least 1, 'auto' (as the generation config says, or {DEFAULT_NEW_TOKENS}) or "
            "None (as the generation config says, or to the context's end)."
        )
    return limit if context_left is None else min(limit, context_left)


def check_ids(settings: Mapping[str, Any], vocabulary: int) -> None:
    """Refuse token ids outside the model's vocabulary."""
    for name in _IDS:
        value = settings.get(name)
        if isinstance(value, set | frozenset) or (isinstance(value, Mapping) and name != "sequence_bias"):
            raise ConfigError(f"{name} is {shown(value)}: use token ids of this model, an int or a list of them.")
        for found in () if value is None else _leaves(value):
            if isinstance(found, float) and name == "sequence_bias":
                continue
            if not is_count(found, 0, vocabulary - 1):
                raise ConfigError(
                    f"{name} holds {shown(found)}: use token ids of this model, from 0 to {vocabulary - 1}."
                )


def _leaves(value: Any, depth: int = 5) -> Iterator[Any]:
    """The values inside nested lists, tensors and dicts of ids. No setting is nested deeper than `depth`."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if depth and isinstance(value, list | tuple | set | frozenset | Mapping):
        for inner in value:
            yield from _leaves(inner, depth - 1)
    else:
        yield value


def callables(given: Any, name: str) -> list[Any]:
    """A caller's own processors or criteria.

    Raises:
        ConfigError: they can't be called.
    """
    if given is None:
        return []
    if not isinstance(given, list | tuple) or not all(map(callable, given)):
        raise ConfigError(f"{name} is {shown(given)}: use a list of objects that can be called, as transformers' own.")
    return list(given)


def _known() -> set[str]:
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}


def setting_names() -> frozenset[str]:
    """Names of all generation settings: those of transformers' GenerationConfig, and those that an answer has besides."""
    return frozenset(_known().union(_FURTHER))


def is_setting(name: str) -> bool:
    """Whether `prepare` takes an argument of this name, or refuses it with a reason of its own."""
    return name in setting_names()


def nearest(name: str, *further: Iterable[str], otherwise: str = "") -> str:
    """A hint for a misspelt `name`: the nearest generation setting or one of the `further` names. Where none is near, the hint begins
    with `otherwise`."""
    names = (_known() - set(REFUSED)).union(_FURTHER, *further)
    return hint(name, names, f"{otherwise}see transformers' GenerationConfig for the settings that there are.")


def check_names(settings: dict[str, Any]) -> None:
    """Refuse settings that don't exist, or that an answer can't have.

    Raises:
        ConfigError: names one of them, and the nearest existing name.
    """
    known = _known() - set(REFUSED)
    for name in settings:
        if name in REFUSED:
            raise ConfigError(f"{name}={shown(settings[name])} is no setting of an answer: {REFUSED[name]}.")
        if name not in known:
            raise ConfigError(f"{shown(name)} is no generation setting: {nearest(name)}")


def given_settings(config: Any) -> dict[str, Any]:
    """The settings of a `GenerationConfig` as keyword arguments, which can be merged with others without a warning."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ConfigError(f"generation_config is {shown(config)}: use a transformers GenerationConfig, or None.")
    return {name: vars(config)[name] for name in _known() if vars(config).get(name) is not None}


def merged(settings: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Merge a request's settings into a configuration's, and decide between greedy decoding and sampling."""
    for name, allowed, fits in _RANGES:
        value = settings.get(name)
        if value is not None and not (is_number(value) and fits(value)):
            raise ConfigError(f"{name} is {shown(value)}: use {allowed}.")
    for name in _FLAGS:
        if not isinstance(settings.get(name), bool | None):
            raise ConfigError(f"{name} is {shown(settings[name])}: use True or False.")
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


def stop_strings(*sources: str | Sequence[str] | None) -> tuple[str, ...]:
    """All stop strings, each once.

    Raises:
        ConfigError: one is empty or no string.
    """
    found: list[str] = []
    for source in sources:
        if source is not None and (isinstance(source, Mapping) or not is_iterable(source)):
            raise ConfigError(f"stop is {shown(source)}: use a string, or a list of strings.")
        for text in [source] if isinstance(source, str) else source or ():
            if not isinstance(text, str) or not text:
                raise ConfigError(f"stop contains {shown(text)}: use strings of at least one character.")
            found.append(text)
    return tuple(dict.fromkeys(found))
