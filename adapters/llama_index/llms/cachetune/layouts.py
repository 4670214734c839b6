"""Prompts that are laid out by functions of the developer: `messages_to_prompt` and `completion_to_prompt`.

Such a function may write control tokens, but texts of users and documents must not become any. So the function gets marks instead of
the texts, and each text is put in the place of its mark in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage

from cachetune_rag import CacheTune, PromptError, Text
from cachetune_rag.text.prompts.prompt import Segment
from cachetune_rag.text.prompts.segments import TemplateText
from cachetune_store.printing import shown


def lay_out_messages(
    engine: CacheTune,
    layout: Callable[[Sequence[ChatMessage]], str],
    messages: Sequence[ChatMessage],
    contents: Sequence[Sequence[Segment]],
) -> list[Segment]:
    """The prompt that `messages_to_prompt` makes of messages.

    Args:
        engine: finds control tokens.
        layout: the function.
        messages: the messages.
        contents: the content of each message, with chunks as separate segments.
    """

    def render(texts: Sequence[str]) -> str:
        shown = [_with_content(message, text) for message, text in zip(messages, texts, strict=True)]
        return _checked(layout(shown), "messages_to_prompt")

    return _lay_out(engine, render, contents, "messages_to_prompt")


def lay_out_completion(engine: CacheTune, layout: Callable[[str], str], content: Sequence[Segment]) -> list[Segment]:
    """The prompt that `completion_to_prompt` makes of a text."""

    def render(texts: Sequence[str]) -> str:
        return _checked(layout(texts[0]), "completion_to_prompt")

    return _lay_out(engine, render, [content], "completion_to_prompt")


def _lay_out(
    engine: CacheTune, render: Callable[[Sequence[str]], str], contents: Sequence[Sequence[Segment]], name: str
) -> list[Segment]:
    texts = ["".join(segment.text for segment in content) for content in contents]
    marks = list(_marks(texts))
    marked = render(marks)
    if all(marked.count(mark) == 1 for mark in marks):
        return _filled(marked, marks, contents)
    # The function drops a content, repeats it, or depends on it. Then its result for the real texts is used, if all control tokens in
    # it come from the function.
    text = render(texts)
    pieces = engine.prompts.split_template(text)
    own = [piece for piece, control in engine.prompts.split_template(marked) if control]
    if [piece for piece, control in pieces if control] != own:
        raise PromptError(
            f"{name} changes or drops a message whose text is spelt like a control token of this tokenizer, so the two can't be "
            f"told apart: have {name} show every content once and unchanged."
        )
    return [TemplateText(piece) if control else Text(piece) for piece, control in pieces]


def _filled(marked: str, marks: Sequence[str], contents: Sequence[Sequence[Segment]]) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for i in sorted(range(len(marks)), key=lambda i: marked.index(marks[i])):
        start = marked.index(marks[i])
        segments += [TemplateText(marked[done:start]), *contents[i]]
        done = start + len(marks[i])
    return [segment for segment in (*segments, TemplateText(marked[done:])) if segment.text]


def _marks(texts: Sequence[str]) -> Iterator[str]:
    """A mark for each text, with a private-use character that is in none of the texts. Functions don't trim such characters."""
    used = {character for text in texts for character in set(text)}
    side = next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    for i in range(len(texts)):
        yield f"{side}{i}{side}"


def _with_content(message: ChatMessage, text: str) -> ChatMessage:
    return ChatMessage(role=message.role, content=text, additional_kwargs=dict(message.additional_kwargs))


def _checked(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise PromptError(
            f"{name} returned {shown(text)}, a {type(text).__name__}: it has to return the prompt, a str."
        )
    return text
