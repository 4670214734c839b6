"""Prompts from plain strings and chat messages: stored chunks are found in them, and retrieved tokens are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cachetune_rag.checking.arguments import check_flag
from cachetune_rag.chunks.found_watch import FoundWatch
from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.prompt import Chunk, Prompt, PromptBuilder, Segment
from cachetune_rag.text.prompts.segments import checked_segments
from cachetune_rag.text.recognising.retrieved import Content, Retrieved
from cachetune_store.printing import shown


class PlainPrompts:
    """Builds prompts from texts and messages whose retrieved passages are not marked. Safe to use from many threads.

    Args:
        prompts: lays prompts out.
        recognizer: finds the stored chunks in them.
        watch: warns where little was found.
    """

    def __init__(self, prompts: PromptBuilder, recognizer: StoreRecognizer, watch: FoundWatch):
        self._prompts, self._recognizer, self._watch = prompts, recognizer, watch

    def from_text(self, text: Content, *, recognise: bool, retrieved: Sequence[str | Chunk]) -> Prompt:
        """See `CacheTune.prompt_from_text`."""
        told = self._tokens(retrieved)
        check_flag(recognise, "recognise")
        text = text if isinstance(text, str) else list(checked_segments(text, "text"))
        if not recognise:
            return replace(self._prompts.build_text([text] if isinstance(text, str) else text), retrieved=told)
        segments = Retrieved(retrieved, self._recognizer.segments).segments(text)
        prompt = replace(self._prompts.build_text(segments), retrieved=told)
        return self._watched(prompt, segments, retrieved)

    def from_messages(
        self, messages: Sequence[Mapping[str, Any]], *, recognise: bool, retrieved: Sequence[str | Chunk], **layout: Any
    ) -> Prompt:
        """See `CacheTune.prompt_from_messages`; `layout` goes to `PromptBuilder.build_messages`."""
        told = self._tokens(retrieved)
        check_flag(recognise, "recognise")
        if not recognise:
            return replace(self._prompts.build_messages(messages, **layout), retrieved=told)
        chunks = Retrieved(retrieved, self._recognizer.segments)
        given: object = messages
        if not isinstance(given, Sequence) or not all(isinstance(message, Mapping) for message in given):
            return self._prompts.build_messages(messages, **layout)  # refuses them
        found = [_with_content(message, chunks, f"messages[{i}].content") for i, message in enumerate(messages)]
        prompt = replace(self._prompts.build_messages(found, **layout), retrieved=told)
        contents = [message.get("content") or () for message in found]
        segments = [part for each in contents for part in ([each] if isinstance(each, str) else each)]
        return self._watched(prompt, segments, retrieved)

    def _watched(self, prompt: Prompt, segments: Sequence[Segment | str], retrieved: Sequence[str | Chunk]) -> Prompt:
        self._watch.look(prompt, segments, [text.text if isinstance(text, Chunk) else text for text in retrieved])
        return prompt

    def _tokens(self, retrieved: Sequence[str | Chunk]) -> int:
        """How many tokens the retrieved texts have.

        Raises:
            PromptError: one of them is no text.
        """
        if isinstance(retrieved, str) or not isinstance(retrieved, Sequence):
            raise PromptError(f"retrieved is {shown(retrieved)}: use a list of strings, one a retrieved passage.")
        texts = (passage.text if isinstance(passage, Chunk) else passage for passage in retrieved)
        return sum(len(self._prompts.encode(text)) for text in texts)


def _with_content(message: Mapping[str, Any], chunks: Retrieved, name: str) -> Mapping[str, Any]:
    """A message with the chunks in its content found. An invalid message stays as it is: the prompt's builder refuses it."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Sequence):
        return message
    checked = content if isinstance(content, str) else list(checked_segments(content, name))
    return {**message, "content": chunks.segments(checked)}
