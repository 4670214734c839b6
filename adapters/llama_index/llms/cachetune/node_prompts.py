"""A prompt that shows nodes in a template of the framework. The body of each node is a chunk."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.schema import BaseNode

from cachetune_rag import Chunk, Prompt, PromptError, Text
from cachetune_rag.text.prompts.prompt import Segment
from llama_index.llms.cachetune.blocks import ChunkBlock
from llama_index.llms.cachetune.llm import CacheTuneLLM

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class ShownNode:
    """A node, if it is known, and the segments that a prompt shows of it."""

    node: BaseNode | None
    segments: Sequence[Segment]


class NodePrompt:
    """One prompt, and the answer to it.

    Args:
        llm: the model that answers.
        template: the prompt's text.
        variable: the variable of the template that stands for the nodes.
        nodes: the nodes.
        extra: further values for the template.

    Raises:
        PromptError: the template doesn't contain the variable exactly once.
    """

    def __init__(
        self,
        llm: CacheTuneLLM,
        template: BasePromptTemplate,
        variable: str,
        nodes: Sequence[ShownNode],
        extra: dict[str, Any],
    ):
        self._llm, self._template = llm, template
        self._nodes = [shown.node for shown in nodes if shown.node is not None]
        self._context = _separated(nodes)
        place = _place(llm, template, variable, self._context)
        values = {**extra, variable: place.value}
        self._messages: list[ChatMessage] | None = None
        self._segments: list[Segment] = []
        # These methods of LlamaIndex's base class have no public counterpart that doesn't ask the model at once.
        if llm.metadata.is_chat_model:
            messages = llm._get_messages(template, **values)
            self._messages = [_filled(message, place) for message in messages]
        else:
            self._segments = place.cut(llm._get_prompt(template, **values))
        place.check(variable)

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt for the engine. Chunks in the text around the nodes are found as well."""
        maker = self._llm.prompt_maker
        if self._messages is not None:
            return maker.conversation(self._messages, self._nodes)
        return maker.text(self._segments, self._nodes)

    def run(self) -> str:
        """The answer."""
        if self._messages is not None:
            return self._parsed(self._llm.chat(self._messages, built=self.prompt).message.content or "")
        return self._parsed(self._llm.complete(self._text, formatted=True, built=self.prompt).text)

    async def arun(self) -> str:
        """The answer, asynchronously."""
        if self._messages is not None:
            return self._parsed((await self._llm.achat(self._messages, built=self.prompt)).message.content or "")
        return self._parsed((await self._llm.acomplete(self._text, formatted=True, built=self.prompt)).text)

    def stream(self) -> Generator[str, None, None]:
        """The answer in pieces."""
        responses: Any
        if self._messages is not None:
            responses = self._llm.stream_chat(self._messages, built=self.prompt)
        else:
            responses = self._llm.stream_complete(self._text, formatted=True, built=self.prompt)
        return (response.delta or "" for response in responses)

    async def astream(self) -> AsyncGenerator[str, None]:
        """The answer in pieces, asynchronously."""
        responses: Any
        if self._messages is not None:
            responses = await self._llm.astream_chat(self._messages, built=self.prompt)
        else:
            responses = await self._llm.astream_complete(self._text, formatted=True, built=self.prompt)
        async for response in responses:
            yield response.delta or ""

    @property
    def _text(self) -> str:
        """A completion's prompt, for callbacks."""
        return "".join(segment.text for segment in self._segments)

    def _parsed(self, text: str) -> str:
        """The answer through the template's output parser, if it has one."""
        parse: Callable[[str], str] = self._llm._parse_output
        return str(parse(text))


class _Marked:
    """A mark that stands for the nodes in a template."""

    def __init__(self, context: Sequence[Segment]):
        self.value = f"chunks-{uuid.uuid4().hex}"
        self._context, self._found = context, 0

    def cut(self, text: str) -> list[Segment]:
        """A rendered text, with the nodes in place of the mark."""
        self._found += text.count(self.value)
        before, mark, after = text.partition(self.value)
        return [Text(before), *self._context, Text(after)] if mark else [Text(text)]

    def check(self, variable: str) -> None:
        """Refuse a template that doesn't contain the mark exactly once."""
        if self._found != 1:
            raise PromptError(
                f"the prompt template shows {{{variable}}} {self._found} times: nodes need exactly one place. Use a template "
                f"with {{{variable}}} once."
            )


class _Sought:
    """The nodes' text, for templates with functions of the user. These get the text, and the chunks are searched for in their result."""

    def __init__(self, context: Sequence[Segment]):
        self.value = "".join(segment.text for segment in context)
        self._context = context

    def cut(self, text: str) -> list[Segment]:
        if self.value and text.count(self.value) == 1:
            before, _, after = text.partition(self.value)
            return [Text(before), *self._context, Text(after)]
        segments: list[Segment] = []
        done = 0
        for chunk in (segment for segment in self._context if isinstance(segment, Chunk)):
            start = text.find(chunk.text, done)
            if start >= 0:
                segments += [Text(text[done:start]), chunk]
                done = start + len(chunk.text)
        return [*segments, Text(text[done:])]

    def check(self, variable: str) -> None:
        """Accept any result of the user's functions."""


def _place(
    llm: CacheTuneLLM, template: BasePromptTemplate, variable: str, context: Sequence[Segment]
) -> _Marked | _Sought:
    chosen = template.select(llm=llm) if isinstance(template, SelectorPromptTemplate) else template
    return _Sought(context) if getattr(chosen, "function_mappings", None) else _Marked(context)


def _separated(nodes: Sequence[ShownNode]) -> list[Segment]:
    segments: list[Segment] = []
    for i, shown in enumerate(nodes):
        segments += [Text(SEPARATOR), *shown.segments] if i else shown.segments
    return segments


def _filled(message: ChatMessage, place: _Marked | _Sought) -> ChatMessage:
    blocks: list[TextBlock] = []
    content = message.content or ""
    segments = place.cut(content)
    if not any(isinstance(segment, Chunk) for segment in segments):
        text = "".join(segment.text for segment in segments)
        return message if text == content else ChatMessage(role=message.role, content=text)
    for segment in segments:
        if isinstance(segment, Chunk):
            blocks.append(ChunkBlock(text=segment.text, document=segment.document))
        else:
            blocks.append(TextBlock(text=segment.text))
    return ChatMessage(role=message.role, blocks=blocks)
