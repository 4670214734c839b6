"""Makes the engine's prompt from LangChain's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage

from cachetune_rag import CacheTune, Chunk, Prompt
from langchain_cachetune import settings
from langchain_cachetune.messages import engine_messages, instructed, tools_as_text
from langchain_cachetune.runs import Retrieved, shown_documents
from langchain_cachetune.tools import ToolRequest


def build_prompt(
    engine: CacheTune,
    messages: Sequence[BaseMessage],
    tools: ToolRequest,
    layout: Mapping[str, Any],
    documents: Iterable[Retrieved],
    *,
    learn: bool,
) -> Prompt:
    """The prompt of a request.

    Args:
        engine: makes the prompt.
        messages: the conversation.
        tools: the tools that the prompt shows.
        layout: arguments of the chat template.
        documents: documents that were retrieved for this request, and perhaps for others.
        learn: whether the engine gets their ids, so that it stores documents that the prompt shows unchanged and the store lacks.
    """
    converted = engine_messages(messages)
    layout = dict(layout)
    if takes_tools(engine):
        if tools.tools:
            layout["tools"] = list(tools.tools)
    elif tools.tools or any("tool_calls" in message or message["role"] == "tool" for message in converted):
        converted = tools_as_text(converted)
        if tools.tools:
            converted = instructed(converted, tools.as_text(), system=True)
    if tools.instruction:
        converted = instructed(converted, tools.instruction)
    segments = [segment for message in converted for segment in message["content"]]
    given = [segment.text for segment in segments if isinstance(segment, Chunk)]
    texts = [segment.text for segment in segments if not isinstance(segment, Chunk)]
    shown = [(d, since) for d, since in shown_documents(documents, texts) if d.page_content not in given]
    retrieved = [
        *dict.fromkeys(given),
        *(Chunk(d.page_content, document=d.id, since=since) if learn else d.page_content for d, since in shown),
    ]
    if getattr(engine.tokenizer, "chat_template", None) or len(converted) != 1:
        return engine.prompt_from_messages(converted, retrieved=retrieved, **layout)
    # A base model has no chat template, but it can continue a single text.
    return engine.prompt_from_text(converted[0]["content"], retrieved=retrieved)


def takes_tools(engine: CacheTune) -> bool:
    """Whether the tokenizer's chat template lays out tools."""
    return bool(template_names(engine, ["tools"], reserved=()))


def template_names(
    engine: CacheTune, names: Iterable[str], *, reserved: Iterable[str] = (*settings.REUSE, *settings.TOOLS)
) -> set[str]:
    """The names that the tokenizer's chat template uses and that are no argument of the engine."""
    own = {*reserved, *settings.generation_names()}
    return {name for name in names if name in engine.prompts.argument_names and name not in own}
