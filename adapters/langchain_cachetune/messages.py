"""LangChain's messages in the form that the engine takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from cachetune_rag import Chunk, Text
from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.prompt import Segment
from cachetune_store import changes_so_far
from cachetune_store.printing import shown

_ROLES = {"human": "user", "ai": "assistant", "function": "tool"}
_MARK, _DOCUMENT, _SINCE = "cachetune_chunk", "cachetune_document", "cachetune_since"
_CALLS = {"tool_use", "tool_call", "function_call", "input_json_delta"}
"""Types of blocks of other providers' models that only repeat `AIMessage.tool_calls`."""


def chunk_block(text: str, document: str | None = None) -> dict[str, Any]:
    """A text content block that is one retrieved chunk: its KV is reused, or computed alone and stored.

    Args:
        text: the chunk.
        document: id of the document that it belongs to. If the chunk is missed and then stored, it is removed with that document.
    """
    # A message may be shown again long after the document was deleted.
    extras: dict[str, Any] = {_MARK: True}
    if document is not None:
        extras |= {_DOCUMENT: document, _SINCE: changes_so_far()}
    return {"type": "text", "text": text, "extras": extras}


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as the engine takes them: {"role": str, "content": list of Text and Chunk}, and the fields of tool calls.

    Raises:
        PromptError: a message has a block that is not text.
    """
    converted: list[dict[str, Any]] = []
    called: dict[str, str] = {}  # call id -> the tool's name, which results often lack
    for message in messages:
        made: dict[str, Any] = {"role": _role(message), "content": _content(message.content)}
        if message.name:
            made["name"] = message.name
        if isinstance(message, AIMessage) and message.tool_calls:
            called |= {call["id"]: call["name"] for call in message.tool_calls if call["id"]}
            made["tool_calls"] = [_call(call) for call in message.tool_calls]
        if isinstance(message, ToolMessage):
            made["tool_call_id"] = message.tool_call_id
            if not message.name and message.tool_call_id in called:
                made["name"] = called[message.tool_call_id]
        converted.append(made)
    return converted


def tools_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a chat template without tools: calls and their results become text, as Hermes writes them."""
    converted: list[dict[str, Any]] = []
    for message in messages:
        content = list(message["content"])
        for call in message.get("tool_calls", ()):
            content.append(Text(f"\n<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"))
        role = message["role"]
        if role == "tool":
            role, content = "user", [Text("<tool_response>\n"), *content, Text("\n</tool_response>")]
        if converted and converted[-1]["role"] == role == "user" and message["role"] == "tool":
            converted[-1]["content"] += [
                Text("\n"),
                *content,
            ]  # results of one turn; many templates want turns to alternate
        else:
            converted.append({"role": role, "content": content})
    return converted


def instructed(messages: Sequence[Mapping[str, Any]], text: str, *, system: bool = False) -> list[dict[str, Any]]:
    """The messages with `text` added to the user's last message, or to the system message."""
    copied = [{**message, "content": list(message["content"])} for message in messages]
    if system:
        if not copied or copied[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": [Text(text)]}, *copied]
        copied[0]["content"].append(Text(f"\n\n{text}"))
        return copied
    for message in reversed(copied):
        if message["role"] == "user":
            message["content"].append(Text(f"\n\n{text}"))
            return copied
    return [*copied, {"role": "user", "content": [Text(text)]}]


def _role(message: BaseMessage) -> str:
    kind = str(getattr(message, "role", None) or message.type).removesuffix("MessageChunk").lower()
    return _ROLES.get(kind, kind)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}


def _content(content: str | list[str | dict[str, Any]]) -> list[Segment]:
    blocks = [content] if isinstance(content, str) else content
    segments: list[Segment] = []
    for block in blocks:
        if isinstance(block, str):
            segments.append(Text(block))
        elif block.get("type") == "text":
            extras = block.get("extras") or {}
            marked = extras.get(_MARK)
            since = extras.get(_SINCE)
            chunk = Chunk(
                block["text"], document=extras.get(_DOCUMENT), since=since if isinstance(since, int) else None
            )
            segments.append(chunk if marked else Text(block["text"]))
        elif block.get("type") not in _CALLS:
            raise PromptError(
                f"a message holds a block of type {shown(block.get('type'))}; ChatCacheTune reads text only: leave the block "
                "out or use a model that takes it."
            )
    return segments
