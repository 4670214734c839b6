"""Checks of the arguments of `CacheTuneLLM` when it is made.

LlamaIndex's synthesizers treat a ValueError of a request as a failed parse, and answer "Empty Response". So whatever can be checked when
the model is made is checked then.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from cachetune_rag import CacheTune, ConfigError
from cachetune_rag.answering.decoding import prepare
from cachetune_rag.answering.generation_settings import setting_names
from cachetune_rag.checking.arguments import hint
from cachetune_rag.options import FROM_PRETRAINED_NAMES, RequestOptions, check_names, check_showable
from cachetune_rag.reuse.config import check_kept_reuse
from cachetune_store.printing import shown

OTHER_NAMES = {"max_tokens": "max_new_tokens", "additional_kwargs": "generate_kwargs"}
"""Names that most other LLMs of the framework have for arguments, and the names here."""

_REQUEST = frozenset(RequestOptions.__annotations__)
_SAMPLING = setting_names()
_DECODING = _SAMPLING | {"stop", "generation_config", "max_new_tokens", "max_tokens"}
REQUEST_NAMES = _REQUEST | _SAMPLING | {"max_tokens"}
"""Names of a request's arguments, except the variables of a chat template."""


def settle_names(given: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Constructor arguments under their names here. Sampling settings (temperature, stop, ...) are put into `generate_kwargs`.

    Raises:
        ValueError: a name is unknown, or an argument is given under two names.
    """
    known = set(fields) | {"class_name"}
    settled: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for name, value in given.items():
        target = OTHER_NAMES.get(name, name)
        if target not in known and name in _SAMPLING | {"stop", "generation_config"}:
            sampling[name] = value
        elif target not in known:
            everything = known | _SAMPLING | set(OTHER_NAMES) | {"engine", "stop"} - {"class_name"}
            raise ValueError(f"{shown(name)} is no argument of CacheTuneLLM: {_hint(name, everything)}")
        elif target in settled and target != "generate_kwargs":
            raise ValueError(f"{shown(name)} and {shown(target)} are the same argument: give one of them.")
        else:
            settled[target] = {**settled.get(target, {}), **value} if target in settled else value
    if sampling:
        settled["generate_kwargs"] = {**sampling, **(settled.get("generate_kwargs") or {})}
    return settled


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse a selector, ratio or bound that no request could use, among arguments as they were given.

    Raises:
        ValueError: says what is allowed.
    """
    try:
        check_kept_reuse(given, given.get("generate_kwargs"))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def check_sampling(engine: CacheTune, given: Mapping[str, Any]) -> None:
    """Work out how an answer would be decoded with the settings of every request, as a request does, and throw the result away.

    Raises:
        ValueError: a setting is out of range.
    """
    settings = {OTHER_NAMES.get(name, name): value for name, value in given.items() if name in _DECODING}
    try:
        prepare(engine.adapter.model, engine.tokenizer, [0], **settings)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def check_generate_kwargs(given: Mapping[str, Any], more: Iterable[str] | None) -> None:
    """Refuse names that are no arguments of a request.

    Args:
        given: settings of every request.
        more: arguments of the chat template; None if they aren't known yet. Then only names that are similar to a known one are
            refused now, as typing errors. Other unknown names are refused by the request.

    Raises:
        ValueError: says the most similar known name.
    """
    for name in given:
        if name in REQUEST_NAMES or name in (more or ()):
            continue
        if more is not None or difflib.get_close_matches(name, REQUEST_NAMES, n=1, cutoff=0.8):
            raise ValueError(
                f"{shown(name)} in generate_kwargs is no setting of a request: {_hint(name, REQUEST_NAMES)}"
            )


def check_engine_kwargs(given: Mapping[str, Any]) -> None:
    """Refuse names that are no arguments of `CacheTune.from_pretrained`.

    Raises:
        ValueError: says the most similar known name.
    """
    try:
        check_names(given, FROM_PRETRAINED_NAMES, "CacheTune.from_pretrained")
        check_showable(given)
    except ConfigError as error:
        raise ValueError(f"engine_kwargs: {error}") from error


def _hint(name: str, known: Iterable[str]) -> str:
    return hint(name, known, f"there are {', '.join(sorted(known))}.", cutoff=0.5)
