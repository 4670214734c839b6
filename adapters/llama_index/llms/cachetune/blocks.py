"""LlamaIndex's messages in the engine's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from cachetune_rag import Chunk, Text
from cachetune_rag.prompt import Segment

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


class ChunkBlock(TextBlock):
    """A text block that is one retrieved chunk: its KV is reused, or computed alone and stored.

    In a message that has one, the blocks follow each other as they are; otherwise a newline stands between text blocks,
    as in `ChatMessage.content`.
    """


def engine_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the engine takes them: {"role": str, "content": list of Text and Chunk}."""
    return [{"role": _role(message), "content": _content(message)} for message in messages]


def plain_segments(messages: Sequence[ChatMessage]) -> list[Segment]:
    """The same for a model without a chat template: "role: content" lines, up to where the assistant speaks."""
    segments: list[Segment] = []
    for message in messages:
        segments += [Text(f"{_role(message)}: "), *_content(message), Text("\n")]
    return [*segments, Text("assistant: ")]


def _role(message: ChatMessage) -> str:
    return _ROLES.get(message.role, message.role.value)


def _content(message: ChatMessage) -> list[Segment]:
    texts: list[TextBlock] = []
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise ValueError(
                f"a message holds a {type(block).__name__}; CacheTuneLLM reads text only: leave the block out or use "
                "a model that takes it."
            )
        texts.append(block)
    if any(isinstance(block, ChunkBlock) for block in texts):
        return [Chunk(block.text) if isinstance(block, ChunkBlock) else Text(block.text) for block in texts]
    return [Text("\n".join(block.text for block in texts))]
