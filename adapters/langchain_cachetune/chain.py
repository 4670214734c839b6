"""The documents chain: retrieved documents become separate chunks in the user's prompt."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from cachetune_rag import CacheTune, Chunk
from cachetune_rag.errors import ConfigError, PromptError
from cachetune_rag.text.prompts.prompt import INSTRUCTIONS, Segment
from cachetune_store.printing import shown
from langchain_cachetune import settings
from langchain_cachetune.chat_model import ChatCacheTune
from langchain_cachetune.messages import chunk_block
from langchain_cachetune.shown import segments

DEFAULT_PROMPT = ChatPromptTemplate.from_messages([("human", INSTRUCTIONS + "\n\n{context}\n\nQuestion: {input}")])
"""The prompt that is used if none is given."""

_OWN = ("prompt", "output_parser", "document_prompt", "document_separator", "document_variable_name")


def create_cachetune_chain(
    engine: CacheTune | ChatCacheTune,
    prompt: BasePromptTemplate[Any] | None = None,
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_separator: str = "\n\n",
    document_variable_name: str = "context",
    **model_kwargs: Any,
) -> Runnable[dict[str, Any], Any]:
    """A chain over documents, used like `create_stuff_documents_chain`, that reuses their KV.

    Args:
        engine: the engine, or a `ChatCacheTune` with its own settings.
        prompt: a string prompt or chat prompt that contains {context} once. Default: a short one with {input}.
        output_parser: parses the answer. Default: the answer as a str.
        document_prompt: how a document is shown. Default: its content. The content is the chunk, and the text around it is plain
            text, so that a document is stored once, however it is shown.
        document_separator: text between documents.
        document_variable_name: the prompt's variable for the documents, and the chain's input key for them.
        model_kwargs: settings of the `ChatCacheTune` that is made for an engine.

    Returns:
        A Runnable from {"context": list of documents, and the prompt's other variables} to the parser's output. For its
        reports, see `collect_reports`.

    Raises:
        ConfigError: the prompt doesn't have that variable, settings were given together with a `ChatCacheTune`, or a setting
            doesn't exist.
    """
    if isinstance(engine, ChatCacheTune):
        if model_kwargs:
            raise ConfigError(f"{', '.join(model_kwargs)} belong to the ChatCacheTune: set them there.")
        model = engine
    else:
        known = {*ChatCacheTune.model_fields, *settings.ALIASES, *settings.generation_names(), *_OWN} - {"engine"}
        settings.refuse_unknown(model_kwargs, known, "create_cachetune_chain")
        model = ChatCacheTune(engine=engine, **model_kwargs)
    template = DEFAULT_PROMPT if prompt is None else prompt
    variable = document_variable_name
    if variable not in template.input_variables:
        raise ConfigError(
            f"the prompt has the variables {template.input_variables}, not {shown(variable)}: show the documents as "
            f"{{{variable}}} or set document_variable_name."
        )

    def laid_out(inputs: Mapping[str, Any]) -> list[list[Segment]]:
        documents: Sequence[Document] = inputs[variable]
        return [made for document in documents if (made := segments(document, document_prompt))]

    def fill(inputs: Mapping[str, Any], config: RunnableConfig) -> list[BaseMessage]:
        mark = f"documents-{uuid.uuid4().hex}"
        messages = template.invoke({**inputs, variable: mark}, config).to_messages()
        return _filled(messages, mark, laid_out(inputs), document_separator, variable)

    async def afill(inputs: Mapping[str, Any], config: RunnableConfig) -> list[BaseMessage]:
        mark = f"documents-{uuid.uuid4().hex}"
        messages = (await template.ainvoke({**inputs, variable: mark}, config)).to_messages()
        return _filled(messages, mark, laid_out(inputs), document_separator, variable)

    prompting: Runnable[dict[str, Any], list[BaseMessage]] = RunnableLambda(fill, afill, name="format_documents")
    chain: Runnable[dict[str, Any], Any] = prompting | model | (output_parser or StrOutputParser())
    return chain.with_config(run_name="cachetune_documents_chain")


def _filled(
    messages: list[BaseMessage], mark: str, documents: Sequence[Sequence[Segment]], separator: str, variable: str
) -> list[BaseMessage]:
    """The messages with the documents in place of the mark."""
    blocks: list[str | dict[str, Any]] = []
    for i, document in enumerate(documents):
        blocks += [_text(separator)] if i else []
        blocks += [_block(segment) for segment in document]
    filled: list[BaseMessage] = []
    places = 0
    for message in messages:
        content: list[str | dict[str, Any]] = []
        parts = [_text(message.content)] if isinstance(message.content, str) else message.content
        for part in parts:
            text = part if isinstance(part, str) else part.get("text", "")
            places += text.count(mark)
            if mark in text:
                before, _, after = text.partition(mark)
                content += [_text(before), *blocks, _text(after)]
            else:
                content.append(part)
        filled.append(
            message if not any(mark in str(part) for part in parts) else message.model_copy(update={"content": content})
        )
    if places != 1:
        raise PromptError(
            f"the prompt shows {{{variable}}} {places} times: documents need exactly one place. Use {{{variable}}} once."
        )
    return filled


def _block(segment: Segment) -> dict[str, Any]:
    return chunk_block(segment.text, segment.document) if isinstance(segment, Chunk) else _text(segment.text)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
