"""Conversations: checking a caller's messages, and the layouts in which a strict chat template may take them."""

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
        content: what is said; None where a message has none (an assistant's tool calls, say).
        fields: all that it has besides: tool_calls, tool_call_id, name, reasoning_content.
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
        """A caller's message.

        Raises:
            PromptError: it is none; the message says why.
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
    """The conversation, and then what the makers of strict templates advise, with a description of each.

    Some templates refuse two messages of one role in a row: they become one. Some know no system role: its text goes in front
    of the next user message. Both are joined by a blank line.
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
    """System texts in front of the user message that follows, or as a user message where none does."""
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
    if not first.text or not second.text:  # a blank line belongs between two texts only
        return replace(second, content=(*(first.content or ()), *(second.content or ())))
    return replace(second, content=(*(first.content or ()), Text(_BETWEEN), *(second.content or ())))
