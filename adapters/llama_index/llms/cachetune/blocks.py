"""LlamaIndex's messages in the form that the engine takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.bridge.pydantic import PrivateAttr

from cachetune_rag import Chunk, PromptError, Text
from cachetune_rag.text.prompts.prompt import Segment
from cachetune_store import changes_so_far
from cachetune_store.printing import shown

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


class ChunkBlock(TextBlock):
    """A text block that is one retrieved chunk: its KV is reused, or computed alone and stored.

    In a message with such a block, nothing is put between the blocks. In other messages text blocks are joined by newlines, as in
    `ChatMessage.content`.

    Attributes:
        document: the id of the document that it belongs to. Its stored KV is removed with that document.
    """

    document: str | None = None
    # A message may be shown again long after the document was deleted.
    _since: int = PrivateAttr(default_factory=changes_so_far)

    def as_chunk(self) -> Chunk:
        """The chunk for the engine."""
        return Chunk(self.text, self.document, since=self._since)


def engine_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the engine takes them: role, content (a list of Text and Chunk), and the tool calls that they make or answer."""
    return [{"role": _role(message), "content": contents(message), **_tool_fields(message)} for message in messages]


def plain_segments(messages: Sequence[ChatMessage]) -> list[Segment]:
    """The messages for a model without a chat template: lines "role: content", up to where the assistant speaks."""
    segments: list[Segment] = []
    for message in messages:
        segments += [Text(f"{_role(message)}: "), *contents(message), Text("\n")]
    return [*segments, Text("assistant: ")]


def contents(message: ChatMessage) -> list[Segment]:
    """A message's text, with its chunks as separate segments.

    Raises:
        PromptError: it has a block that is not text.
    """
    texts: list[TextBlock] = []
    for block in message.blocks:
        if isinstance(block, ToolCallBlock):
            continue
        if not isinstance(block, TextBlock):
            raise PromptError(
                f"a message holds a {type(block).__name__}; CacheTuneLLM reads text only: leave the block out or use "
                "a model that takes it."
            )
        texts.append(block)
    if any(isinstance(block, ChunkBlock) for block in texts):
        return [block.as_chunk() if isinstance(block, ChunkBlock) else Text(block.text) for block in texts]
    return [Text("\n".join(block.text for block in texts))]


def _role(message: ChatMessage) -> str:
    return _ROLES.get(message.role, message.role.value)


def _tool_fields(message: ChatMessage) -> dict[str, Any]:
    """The further fields of a message that chat templates with tools read."""
    calls = [_call(block) for block in message.blocks if isinstance(block, ToolCallBlock)]
    if calls:
        return {"tool_calls": calls}
    if _role(message) != "tool":
        return {}
    names = ("tool_call_id", "name")
    return {name: value for name in names if isinstance(value := message.additional_kwargs.get(name), str)}


def _call(block: ToolCallBlock) -> dict[str, Any]:
    arguments = block.tool_kwargs
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise PromptError(
                f"a message calls the tool {shown(block.tool_name)} with arguments that are no JSON: {shown(arguments)}."
            ) from None
    call: dict[str, Any] = {"type": "function", "function": {"name": block.tool_name, "arguments": arguments}}
    return {"id": block.tool_call_id, **call} if block.tool_call_id else call
