"""LangChain's messages in the engine's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.prompts import BasePromptTemplate, format_document

from cachetune_rag import Chunk, Text
from cachetune_rag.prompt import Segment

_ROLES = {"human": "user", "ai": "assistant", "function": "tool"}
_MARK = "cachetune_chunk"


def chunk_block(text: str) -> dict[str, Any]:
    """A text content block that is one retrieved chunk: its KV is reused, or computed alone and stored."""
    return {"type": "text", "text": text, "extras": {_MARK: True}}


def chunk_text(document: Document, document_prompt: BasePromptTemplate[str] | None) -> str:
    """What a prompt shows of a document: its content, or what the document prompt makes of it."""
    return document.page_content if document_prompt is None else format_document(document, document_prompt)


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as the engine takes them: {"role": str, "content": list of Text and Chunk}.

    Raises:
        ValueError: a message holds what is no text, or tool calls.
    """
    return [{"role": _role(message), "content": _content(message)} for message in messages]


def _role(message: BaseMessage) -> str:
    kind = str(getattr(message, "role", None) or message.type).removesuffix("MessageChunk").lower()
    return _ROLES.get(kind, kind)


def _content(message: BaseMessage) -> list[Segment]:
    if getattr(message, "tool_calls", None):
        raise ValueError("a message holds tool calls; ChatCacheTune has no tools: leave such messages out.")
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    segments: list[Segment] = []
    for block in blocks:
        if isinstance(block, str):
            segments.append(Text(block))
        elif block.get("type") == "text":
            marked = (block.get("extras") or {}).get(_MARK)
            segments.append(Chunk(block["text"]) if marked else Text(block["text"]))
        else:
            raise ValueError(
                f"a message holds a block of type {block.get('type')!r}; ChatCacheTune reads text only: leave the block "
                "out or use a model that takes it."
            )
    return segments
