"""Conversations: checks of a caller's messages, and other layouts of them that a strict chat template may accept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.segments import Segment, Text, checked_segments
from cachetune_store.printing import shown

_ROLE = re.compile(r"[A-Za-z0-9_-]+")
_SYSTEM = ("system", "developer")
_BETWEEN = "\n\n"
"""What joins the texts of two messages that become one."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        content: what is said; None if a message has no content, such as an assistant's tool calls.
        fields: all its other fields, such as tool_calls, tool_call_id, name and reasoning_content.
    """

    role: str
    content: tuple[Segment, ...] | None
    fields: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(segment.text for segment in self.content or ())

    @classmethod
    def of(cls, message: object, name: str) -> Message:
        """A caller's message, checked.

        Raises:
            PromptError: it is not a valid message.
        """
        if not isinstance(message, Mapping) or not {"role"} <= set(message):
            raise PromptError(
                f"{name} is {shown(message)}: use a mapping with the keys role and content (and tool_calls, "
                "tool_call_id, name where the chat template knows them)."
            )
        fields = {key: value for key, value in message.items() if value is not None}
        role, content = fields.pop("role", None), fields.pop("content", None)
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise PromptError(f"{name} has the role {shown(role)}: use a word such as 'user', 'assistant' or 'system'.")
        if content is None and not fields.get("tool_calls"):
            raise PromptError(f"{name}.content is None: use a str, or a list of Text, Chunk and str.")
        if isinstance(content, str):
            content = [content]
        segments = None if content is None else tuple(checked_segments(content, f"{name}.content"))
        return cls(role, segments, fields)


def layouts(messages: Sequence[Message]) -> Iterator[tuple[str, list[Message]]]:
    """The conversation as it is, and then other layouts of it, which makers of strict templates advise. Each comes with a description.

    Some templates refuse two messages of one role in a row, so such messages become one. Some have no system role, so the system text is
    put before the next user message. Texts are joined by a blank line.
    """
    given = list(messages)
    yield "", given
    merged = _merged(given)
    if merged != given:
        yield "messages of one role in a row are joined to one", merged
    if any(message.role in _SYSTEM for message in given):
        folded = _folded(given)
        yield "the system text is put into the user's turn", folded
        both = _merged(folded)
        if both != folded:
            yield (
                "the system text is put into the user's turn, and messages of one role in a row are joined to one",
                both,
            )


def _merged(messages: Sequence[Message]) -> list[Message]:
    done: list[Message] = []
    for message in messages:
        if done and done[-1].role == message.role and _joinable(done[-1]) and _joinable(message):
            done[-1] = _joined(done[-1], message)
        else:
            done.append(message)
    return done


def _folded(messages: Sequence[Message]) -> list[Message]:
    """The messages with each system text before the user message that follows, or as a user message if none follows."""
    done: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message.role in _SYSTEM and _joinable(message):
            waiting.append(replace(message, role="user"))
        elif message.role == "user" and _joinable(message):
            whole = message
            for system in reversed(waiting):
                whole = _joined(system, whole)
            done.append(whole)
            waiting = []
        else:
            done += [*waiting, message]
            waiting = []
    return [*done, *waiting]


def _joinable(message: Message) -> bool:
    return message.content is not None and not message.fields


def _joined(first: Message, second: Message) -> Message:
    if not first.text or not second.text:  # a blank line is only needed between two texts
        return replace(second, content=(*(first.content or ()), *(second.content or ())))
    return replace(second, content=(*(first.content or ()), Text(_BETWEEN), *(second.content or ())))
