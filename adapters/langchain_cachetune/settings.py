"""Names and values of a chat model's settings. They are checked when they are given, not when they are first used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from cachetune_rag import CacheTune
from cachetune_rag.answering.decoding import prepare
from cachetune_rag.answering.generation_settings import setting_names
from cachetune_rag.checking.arguments import hint
from cachetune_rag.errors import ConfigError
from cachetune_rag.options import FROM_PRETRAINED_NAMES, REUSE_NAMES, check_names, check_showable
from cachetune_store.printing import shown

ALIASES = {
    "model_name": "model",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop_sequences": "stop",
}
"""Other usual names of arguments, and the name in this class."""

REUSE = (*REUSE_NAMES, "reuse")
TOOLS = ("tools", "tool_choice", "response_format")


@cache
def generation_names() -> frozenset[str]:
    """All generation settings, and the configuration that holds them."""
    return setting_names() | {"generation_config"}


def refuse_unknown(given: Iterable[str], known: Iterable[str], whose: str) -> None:
    """Refuse an unknown name.

    Raises:
        ConfigError: says the name, and the most similar known one.
    """
    names = set(known)
    for name in given:
        if name not in names:
            some = ", ".join(sorted(names - generation_names()))
            more = ", and generation settings of transformers" if names & generation_names() else ""
            raise ConfigError(
                f"{shown(name)} is no argument of {whose}: {hint(name, names, f'there are {some}{more}.')}"
            )


def renamed(options: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Options under the names of this class.

    Raises:
        ConfigError: an option was given under two names.
    """
    made: dict[str, Any] = {}
    for name, value in options.items():
        own = ALIASES.get(name, name)
        if own in made:
            raise ConfigError(f"{whose} got {shown(own)} twice, also as {shown(name)}: give it once.")
        made[own] = value
    return made


def take_length(given: dict[str, Any]) -> None:
    """Move an answer's length from `generate_kwargs` to `max_tokens`.

    Raises:
        ConfigError: it was given in both.
    """
    further = given.get("generate_kwargs")
    if not isinstance(further, Mapping):
        return
    names = [name for name in further if ALIASES.get(name, name) == "max_tokens"]
    if len(names) + ("max_tokens" in given) > 1:
        raise ConfigError(f"{names[0]} stands in generate_kwargs as well: give the answer's length once.")
    if names:
        given["generate_kwargs"] = {name: value for name, value in further.items() if name not in names}
        given["max_tokens"] = further[names[0]]


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Refuse an argument that `CacheTune.from_pretrained` doesn't have.

    Raises:
        ConfigError: says the name, and the most similar known one.
    """
    check_names(options, FROM_PRETRAINED_NAMES, "CacheTune.from_pretrained")
    check_showable(options)


def check_sampling(engine: CacheTune, settings: Mapping[str, Any]) -> None:
    """Work out how an answer would be decoded, as a request does, and throw the result away.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    prepare(engine.adapter.model, engine.tokenizer, [0], **settings)


def decoding_settings(
    *,
    max_tokens: int | str | None,
    temperature: float | None,
    stop: list[str] | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings as the engine takes them. At a temperature above 0 it samples; at 0 it takes the likeliest token."""
    settings = dict(others)
    settings["max_new_tokens"] = max_tokens
    if temperature is not None:
        settings["do_sample"] = temperature > 0
        settings["temperature"] = temperature if temperature > 0 else None
    settings["stop"] = stop
    return settings
