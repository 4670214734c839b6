"""Makes a request's prompt from LlamaIndex's arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate

from cachetune_rag import CacheTune, Chunk, Prompt, Text
from cachetune_rag.text.prompts.prompt import Segment
from llama_index.llms.cachetune.blocks import contents, engine_messages, plain_segments
from llama_index.llms.cachetune.layouts import lay_out_completion, lay_out_messages
from llama_index.llms.cachetune.shown import chunks_of, standing_in

_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts for one engine.

    Attributes:
        engine: the engine.
        learn: whether retrieved nodes that aren't stored become chunks, and are stored.
        system_prompt, query_wrapper: put around completions that aren't formatted yet.
        messages_layout, completion_layout: functions of the user that lay out prompts instead of the chat template.
    """

    engine: CacheTune
    learn: bool = True
    system_prompt: str | None = None
    query_wrapper: BasePromptTemplate | None = None
    messages_layout: Callable[[Sequence[ChatMessage]], str] | None = None
    completion_layout: Callable[[str], str] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether there is a layout for conversations."""
        return self.messages_layout is not None or self._has_template

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        return self.messages_layout is None and bool(_TOOLS.search(self._template))

    @property
    def argument_names(self) -> frozenset[str]:
        """Names of the chat template's arguments, such as enable_thinking."""
        return self.engine.prompts.argument_names if self._has_template else frozenset()

    def completion(self, prompt: str, formatted: bool, nodes: Iterable[object], **layout: Any) -> Prompt:
        """A completion's prompt.

        Args:
            prompt: its text.
            formatted: whether it is complete as it is.
            nodes: the nodes that were retrieved for it.
            layout: arguments of the chat template.
        """
        told = self._told([prompt], nodes)
        if formatted:
            return self.engine.prompt_from_text([Text(prompt)], retrieved=told)
        wrapped = prompt if self.query_wrapper is None else self.query_wrapper.format(query_str=prompt)
        if self.completion_layout is not None:
            segments = lay_out_completion(self.engine, self.completion_layout, [Text(wrapped)])
            return self.engine.prompt_from_text(segments, retrieved=told)
        if self._has_template:
            messages = [{"role": "user", "content": [Text(wrapped)]}]
            if self.system_prompt:
                messages.insert(0, {"role": "system", "content": [Text(self.system_prompt)]})
            return self.engine.prompt_from_messages(messages, retrieved=told, **layout)
        whole = f"{self.system_prompt}\n\n{wrapped}" if self.system_prompt else wrapped
        return self.engine.prompt_from_text([Text(whole)], retrieved=told)

    def conversation(
        self,
        messages: Sequence[ChatMessage],
        nodes: Iterable[object],
        tools: Sequence[Any] | None = None,
        **layout: Any,
    ) -> Prompt:
        """A conversation's prompt. Arguments are those of `completion`, and the tools that the model is shown."""
        parts = [contents(message) for message in messages]
        told = self._told(["".join(segment.text for segment in part) for part in parts], nodes)
        if self.messages_layout is not None:
            segments = lay_out_messages(self.engine, self.messages_layout, messages, parts)
            return self.engine.prompt_from_text(segments, retrieved=told)
        if not self._has_template:
            return self.engine.prompt_from_text(plain_segments(messages), retrieved=told)
        return self.engine.prompt_from_messages(
            engine_messages(messages), retrieved=told, tools=tools or None, **layout
        )

    def text(self, segments: Sequence[Segment], nodes: Iterable[object]) -> Prompt:
        """A formatted prompt in which chunks are separate segments."""
        told = self._told(["".join(segment.text for segment in segments)], nodes)
        return self.engine.prompt_from_text(segments, retrieved=told)

    def _told(self, texts: Sequence[str], nodes: Iterable[object]) -> list[str | Chunk]:
        """The retrieved nodes that this prompt shows, for the engine."""
        chunks = standing_in(texts, chunks_of(nodes))
        return [*chunks] if self.learn else [chunk.text for chunk in chunks]

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.engine.tokenizer, "chat_template", None))

    @property
    def _template(self) -> str:
        """The chat template that conversations with tools get."""
        if not self._has_template:
            return ""
        try:
            return str(self.engine.tokenizer.get_chat_template(None, tools=[{}]))
        except ValueError:  # there are several templates and no default, which the engine refuses when it is used
            return ""
