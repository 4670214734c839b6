"""A response synthesizer that hands nodes to the engine one by one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import cached_property
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_REFINE_PROMPT_SEL, DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from cachetune_rag import Chunk, Prompt, PromptTooLongError, Text
from cachetune_rag.async_calls import call_in_thread
from cachetune_rag.prompt import Segment
from llama_index.llms.cachetune.blocks import ChunkBlock, engine_messages
from llama_index.llms.cachetune.llm import CacheTuneLLM

SEPARATOR = "\n\n"


class CacheTuneSynthesizer(BaseSynthesizer):
    """Answers over nodes as separate chunks, each with its text exactly as `MetadataMode.LLM` gives it.

    As many nodes as fit go into one prompt; an answer is refined with those that don't, as by the compact synthesizer.

    Args:
        llm: a `CacheTuneLLM`; default: `Settings.llm`.
        text_qa_template: the prompt, with {context_str} once and {query_str}.
        refine_template: the prompt for further nodes, with {context_msg} once, {existing_answer} and {query_str}.
        streaming: whether answers come piece by piece.
        callback_manager, empty_response: see `BaseSynthesizer`.
    """

    _llm: CacheTuneLLM

    def __init__(
        self,
        llm: CacheTuneLLM | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        refine_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
    ):
        chosen = llm or Settings.llm
        if not isinstance(chosen, CacheTuneLLM):
            raise TypeError(
                f"llm is a {type(chosen).__name__}: CacheTuneSynthesizer needs a CacheTuneLLM, here or as Settings.llm."
            )
        super().__init__(
            llm=chosen, callback_manager=callback_manager, streaming=streaming, empty_response=empty_response
        )
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        self._refine_template = refine_template or DEFAULT_REFINE_PROMPT_SEL

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template, "refine_template": self._refine_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)
        self._refine_template = prompts.get("refine_template", self._refine_template)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer over texts; a str, or a generator of pieces when streaming. `response_kwargs` go to the templates."""
        request, rest = self._first(query_str, text_chunks, response_kwargs)
        while rest:
            answer = request.parsed(request.run())
            request, rest = self._next(query_str, rest, answer, response_kwargs)
        return request.stream() if self._streaming else request.parsed(request.run()) or self._empty_response

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """As `get_response`, asynchronously."""
        request, rest = await call_in_thread(self._first, query_str, text_chunks, response_kwargs)
        while rest:
            answer = request.parsed(await request.arun())
            request, rest = await call_in_thread(self._next, query_str, rest, answer, response_kwargs)
        if self._streaming:
            return request.astream()
        return request.parsed(await request.arun()) or self._empty_response

    # -- inside ---------------------------------------------------------------------------------------------------

    def _first(self, query: str, chunks: Sequence[str], extra: dict[str, Any]) -> tuple[_Request, list[str]]:
        template = self._text_qa_template.partial_format(query_str=query)
        return self._pack(template, "context_str", chunks, extra)

    def _next(
        self, query: str, chunks: Sequence[str], answer: str, extra: dict[str, Any]
    ) -> tuple[_Request, list[str]]:
        template = self._refine_template.partial_format(query_str=query, existing_answer=answer)
        return self._pack(template, "context_msg", chunks, extra)

    def _pack(
        self, template: BasePromptTemplate, variable: str, chunks: Sequence[str], extra: dict[str, Any]
    ) -> tuple[_Request, list[str]]:
        """A request over the first chunks, as many as fit with room for the answer, and the chunks left."""
        shown = [chunk for chunk in chunks if chunk]
        count = len(shown)
        room = self._llm.metadata.context_window - self._llm.max_new_tokens
        while True:
            request = _Request(self._llm, template, variable, shown[:count], extra)
            length = len(request.prompt.ids)
            if length <= room or count <= 1:
                break
            # Usually right at the first try; never more tries than chunks.
            count = max(1, min(count - 1, count * room // length))
        if length > self._llm.metadata.context_window - 1:
            raise PromptTooLongError(
                f"the prompt with a single node has {length} tokens and the model's context is "
                f"{self._llm.metadata.context_window}: split documents into smaller nodes."
            )
        return request, shown[count:]


class _Request:
    """One prompt, with its chunks in their place."""

    def __init__(
        self,
        llm: CacheTuneLLM,
        template: BasePromptTemplate,
        variable: str,
        chunks: Sequence[str],
        extra: dict[str, Any],
    ):
        self._llm, self._template = llm, template
        mark = f"chunks-{uuid.uuid4().hex}"
        values = {**extra, variable: mark}
        self._messages: list[ChatMessage] | None = None
        self._segments: list[Segment] = []
        if llm.metadata.is_chat_model:
            messages = llm._get_messages(template, **values)
            found = sum((message.content or "").count(mark) for message in messages)
            self._messages = [_filled(message, mark, chunks) for message in messages]
        else:
            text = llm._get_prompt(template, **values)
            found = text.count(mark)
            before, _, after = text.partition(mark)
            self._segments = [Text(before), *_separated(chunks), Text(after)]
        if found != 1:
            raise ValueError(
                f"the prompt template shows {{{variable}}} {found} times: nodes need exactly one place. Use a template "
                f"with {{{variable}}} once."
            )

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt as the engine reads it; chunks in the texts around the nodes are found as well."""
        engine = self._llm.engine
        if self._messages is not None:
            return engine.prompt_from_messages(engine_messages(self._messages))
        return engine.prompt_from_text(self._segments)

    def run(self) -> str:
        if self._messages is not None:
            return self._llm.chat(self._messages, built=self.prompt).message.content or ""
        return str(self._llm.complete("", formatted=True, built=self.prompt).text)

    async def arun(self) -> str:
        if self._messages is not None:
            return (await self._llm.achat(self._messages, built=self.prompt)).message.content or ""
        return str((await self._llm.acomplete("", formatted=True, built=self.prompt)).text)

    def stream(self) -> Generator[str, None, None]:
        responses: Any
        if self._messages is not None:
            responses = self._llm.stream_chat(self._messages, built=self.prompt)
        else:
            responses = self._llm.stream_complete("", formatted=True, built=self.prompt)
        return (response.delta or "" for response in responses)

    async def astream(self) -> AsyncGenerator[str, None]:
        responses: Any
        if self._messages is not None:
            responses = await self._llm.astream_chat(self._messages, built=self.prompt)
        else:
            responses = await self._llm.astream_complete("", formatted=True, built=self.prompt)
        async for response in responses:
            yield response.delta or ""

    def parsed(self, text: str) -> str:
        """The answer through the template's output parser, if it has one."""
        parse: Callable[[str], str] = self._llm._parse_output
        return str(parse(text))


def _separated(chunks: Sequence[str]) -> list[Segment]:
    segments: list[Segment] = []
    for i, chunk in enumerate(chunks):
        segments += [Text(SEPARATOR), Chunk(chunk)] if i else [Chunk(chunk)]
    return segments


def _filled(message: ChatMessage, mark: str, chunks: Sequence[str]) -> ChatMessage:
    content = message.content or ""
    if mark not in content:
        return message
    before, _, after = content.partition(mark)
    blocks: list[TextBlock] = [TextBlock(text=before)]
    for segment in _separated(chunks):
        blocks.append((ChunkBlock if isinstance(segment, Chunk) else TextBlock)(text=segment.text))
    return ChatMessage(role=message.role, blocks=[*blocks, TextBlock(text=after)])
