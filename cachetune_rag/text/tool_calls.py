"""Tool calls in an answer's text.

A model that was shown tools writes its calls as text, in the form that its chat template taught it. Three forms are read here:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS]` and a list of such objects, or a name
and its arguments (Mistral), and bare JSON (Llama 3, which says "parameters"). The text comes without special
tokens, so Mistral's list is also read without its mark, and Llama's JSON with or without `<|python_tag|>`.

Text that is not a valid call stays in the content. Nothing that the model wrote is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

_HERMES = "<tool_call>"
_HERMES_END = "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"
_MARKS = (_HERMES, _MISTRAL, _PYTHON_TAG)
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MISTRAL_NAMED = re.compile(
    r"\s*(?:\[TOOL_CALLS\]\s*)?([A-Za-z0-9_.-]{1,128})(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?\s*(?=\{)"
)
_BETWEEN = re.compile(r"[\s;,]*")
_EMPTY = re.compile(r"\s*")
_KEYS = {"name", "arguments", "parameters", "type", "id", "function"}


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def parse(text: str, names: Collection[str] | None = None) -> tuple[str, list[ToolCall]]:
    """Split an answer into its content and its tool calls.

    Args:
        text: the answer's text.
        names: the tools that the model was shown. If they are given, an answer that is JSON with a "name" is only a call if that
            is the name of a tool. Otherwise it is a call if it looks like one. Calls inside marks count whatever their name, so
            that the caller can tell the model about its mistake.

    Returns:
        The text without its calls and without the whitespace around them (unchanged if there are none), and the calls in order.
    """
    thought, rest = _after_thought(text)
    pieces, calls = _marked(rest)
    if not calls and (bare := _bare(rest, names)):
        pieces, calls = ["", ""], bare
    if not calls:
        return text, []
    content = (thought + pieces[0]).rstrip()
    for piece in pieces[1:]:
        if stripped := piece.strip():
            content += f"\n{stripped}" if content else stripped
    return content, calls


class ToolCallStream:
    """The content of an answer that comes in pieces. Text that may belong to a tool call is held back until the end.

    Args:
        names: as for `parse`.
    """

    def __init__(self, names: Collection[str] | None = None):
        self._names = names
        self._text = ""
        self._out = 0

    def push(self, piece: str) -> str:
        """Take the next piece. Returns the content that is certain now, which may be empty."""
        self._text += piece
        certain = self._certain()
        shown = self._text[self._out : certain]
        self._out = max(self._out, certain)
        return shown

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The content that was held back, and the calls. Call it once, after the last piece."""
        content, calls = parse(self._text, self._names)
        return content[self._out :], calls

    def _certain(self) -> int:
        """How much of the text is content, whatever follows. What was returned so far is the beginning of the content of `parse`."""
        thought, rest = _after_thought(self._text)
        start = len(thought)
        body = rest.lstrip()
        if not body or _may_be_bare(body, self._names):
            return len(thought.rstrip())
        places = [place for mark in _MARKS if (place := rest.find(mark)) >= 0]
        end = min(places) if places else len(rest) - _begun(rest)
        return start + len(rest[:end].rstrip()) if rest[:end].strip() else len(thought.rstrip())


def _after_thought(text: str) -> tuple[str, str]:
    """A reasoning model's thought, with its tags, and the answer behind it. Calls inside the thought don't count."""
    if _THOUGHT_END in text:
        end = text.rindex(_THOUGHT_END) + len(_THOUGHT_END)
        return text[:end], text[end:]
    return (text, "") if text.lstrip().startswith(_THOUGHT) else ("", text)


def _marked(text: str) -> tuple[list[str], list[ToolCall]]:
    """The pieces of text around marked calls, and these calls."""
    pieces, calls = [""], []
    place = 0
    while place < len(text):
        starts = [(start, mark) for mark in _MARKS if (start := text.find(mark, place)) >= 0]
        if not starts:
            break
        start, mark = min(starts)
        found, end = _hermes(text, start) if mark == _HERMES else _listed(text, start + len(mark))
        if not found and mark == _MISTRAL:
            found, end = _named(text, start)
        pieces[-1] += text[place : start if found else start + len(mark)]
        place = end if found else start + len(mark)
        if found:
            calls += found
            pieces.append("")
    pieces[-1] += text[place:]
    return pieces, calls


def _hermes(text: str, start: int) -> tuple[list[ToolCall], int]:
    """The call between two tags, and where it ends. The closing tag may be missing at the end of the answer."""
    calls, end = _listed(text, start + len(_HERMES))
    behind = _EMPTY.match(text, end)
    after = behind.end() if behind else end
    if text.startswith(_HERMES_END, after):
        return calls, after + len(_HERMES_END)
    return (calls, end) if after == len(text) or text.startswith(_HERMES, after) else ([], start)


def _listed(text: str, start: int) -> tuple[list[ToolCall], int]:
    """Calls that are written as JSON from `start` on, as objects in a row or a list of objects, and where they end."""
    calls: list[ToolCall] = []
    place = end = start
    while True:
        between = _BETWEEN.match(text, place)
        value, after = _json(text, between.end() if between else place)
        made = [_call(item) for item in (value if isinstance(value, list) else [value])]
        if value is None or not made or any(call is None for call in made):
            return calls, end
        calls += [call for call in made if call is not None]
        place = end = after


def _named(text: str, start: int) -> tuple[list[ToolCall], int]:
    """Calls in Mistral's later form from `start` on, each a name and its arguments, and where they end."""
    calls: list[ToolCall] = []
    place = start
    while match := _MISTRAL_NAMED.match(text, place):
        arguments, after = _json(text, match.end())
        if not isinstance(arguments, dict):
            break
        calls.append(ToolCall(match[1], arguments))
        place = after
    return calls, place


def _bare(text: str, names: Collection[str] | None) -> list[ToolCall]:
    """Calls without marks. They count only if the whole answer consists of them."""
    body = text.strip()
    if fenced := _FENCE.fullmatch(body):
        body = fenced[1].strip()
    calls, end = _listed(body, 0)
    if not calls and names is not None:
        calls, end = _named(body, 0)
    if body[end:].strip(" \n\r\t;") or (names is not None and any(call.name not in names for call in calls)):
        return []
    return calls


def _may_be_bare(body: str, names: Collection[str] | None) -> bool:
    """Whether an answer that begins like this may turn out to be calls without marks."""
    if body[0] in "{[" and not body.startswith(_MISTRAL):
        return True
    if "```".startswith(body[:3]):
        return True
    return any(name.startswith(body[: len(name)]) for name in names or ())


def _begun(text: str) -> int:
    """Length of the longest end of the text with which a mark begins."""
    longest = max(map(len, _MARKS))
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(mark.startswith(text[-n:]) for mark in _MARKS)), 0
    )


def _json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends; None if there is no JSON."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _call(value: Any) -> ToolCall | None:
    """The call that a JSON value describes; None if it describes none."""
    if not isinstance(value, dict) or not _KEYS.issuperset(value):
        return None
    if isinstance(value.get("function"), dict):  # as OpenAI's API writes it
        return _call(value["function"])
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # JSON inside JSON, as in OpenAI's API
        arguments, _ = _json(arguments or "{}", 0)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)
"""It accepts line breaks inside strings, because models write them, and refuses NaN, which no tool can read."""
