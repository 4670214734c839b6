"""Prompts: where prefix, chunks and query stand, as one list of token ids.

A chunk is tokenised alone, so its ids are the same wherever it stands and its stored KV fits. Everything else between
two chunks is tokenised together, as the model's own chat format would have it. Reuse and full prefill take the same list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from jinja2 import TemplateError

from cachetune_rag.errors import ConfigError, PromptError
from cachetune_rag.segments import (
    Chunk,
    Part,
    Passage,
    Prompt,
    Segment,
    Span,
    TemplateText,
    Text,
    given_chunks,
    numbered_parts,
)
from cachetune_rag.tokens import INSIDE, ContentTokenizer, check_text

__all__ = ["INSTRUCTIONS", "PLACEHOLDERS", "Chunk", "Prompt", "PromptBuilder", "Segment", "Span", "Text"]

INSTRUCTIONS = "Answer the question using only the passages below."
"""What stands before the chunks where a request gives no prefix. Short on purpose: every added condition ("if they do
not contain the answer, say so") made a 135M model miss answers that stood in the passages."""

PLACEHOLDERS = ("{prefix}", "{chunks}", "{query}")

_PLACEHOLDER = re.compile("|".join(re.escape(name) for name in PLACEHOLDERS))
_ROLE = re.compile(r"[A-Za-z0-9_-]+")


class PromptBuilder:
    """Builds prompts for one tokenizer. Safe to use from many threads.

    Args:
        tokenizer: the model's tokenizer; a copy is kept, so later changes to it have no effect.
        template: the whole prompt as text with {prefix}, {chunks} and {query}, each once and in this order; other
            braces are plain text. It may contain control tokens. Default: one user message in the tokenizer's chat
            template, or a plain layout where there is none.
        chunk_separator: text between chunks; always computed.
        instructions: the prefix of requests that give none; default: `INSTRUCTIONS`, "" for nothing.

    Attributes:
        first_token: id that the default prompt begins with (BOS, or what stands there).
        separator_ids: token ids of the separator by itself.

    Raises:
        ConfigError: template or separator can't be used.
        PromptError: the chat template can't be used.
        UnsupportedModelError: the tokenizer can't keep content apart from control tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        chunk_separator: str = "\n\n",
        instructions: str | None = None,
    ):
        self._content = ContentTokenizer(tokenizer)
        self._chat = _ChatTemplate(self._content.tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self._template = None if template is None else _split_template(template)
        try:
            self._separator = check_text(chunk_separator, "chunk_separator")
            self._instructions = INSTRUCTIONS if instructions is None else check_text(instructions, "instructions")
        except PromptError as error:
            raise ConfigError(str(error)) from error
        first = self.build(query="?", chunks=[]).ids or self.encode("\n") or [0]
        self.first_token = first[0]
        self.separator_ids = tuple(self.encode(chunk_separator))

    def encode(self, text: str) -> list[int]:
        """Token ids of content (a chunk, say), exactly as `build` puts them into a prompt; never a control token.

        Raises:
            PromptError: `text` is no str, or has lone surrogates.
        """
        return list(self._content.encode(text))

    def split_template(self, text: str) -> list[tuple[str, bool]]:
        """Cut a developer's text into `(piece, is a control token)`; the pieces joined are the text."""
        return self._content.split_template(check_text(text))

    def build(self, *, query: str, chunks: Iterable[str | Chunk], prefix: str | None = None) -> Prompt:
        """The engine's standard prompt: prefix, chunks, query.

        Args:
            query: the user's question.
            chunks: the retrieved passages, texts or `Chunk`s, in prompt order. An empty one adds no tokens and no separator.
            prefix: text before the chunks; None for the default instructions, "" for none.

        Raises:
            PromptError: a text is no str, or has lone surrogates.
        """
        check_text(query, "query")
        prefix = self._instructions if prefix is None else check_text(prefix, "prefix")
        passages = [Passage(i, chunk.text, chunk.document) for i, chunk in enumerate(given_chunks(chunks))]
        body = list(self._separated(passages))
        if self._template is not None:
            start, before_chunks, before_query, end = self._template
            parts = [start, Text(prefix), before_chunks, *body, before_query, Text(query), end]
            return self._assemble(parts, bos=True)
        lead = "\n\n" if any(passage.text for passage in passages) else ""
        content = [Text(f"{prefix}\n\n" if prefix else ""), *body, Text(f"{lead}Question: {query}")]
        if self._chat is not None:
            return self._assemble(self._chat.render(["user"], [content]), bos=False)
        return self._assemble([*content, Text("\n\nAnswer:")], bos=True)

    def build_messages(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """A conversation, laid out by the tokenizer's chat template, up to where the assistant speaks.

        Args:
            messages: each {"role": ..., "content": ...}; content is a str or a list of `Text`, `Chunk` and str.

        Raises:
            PromptError: no chat template, one that refuses or alters these messages, or an unusable message.
        """
        if self._chat is None:
            raise PromptError(
                "this tokenizer has no chat template, so messages have no layout: set tokenizer.chat_template, or use "
                "a plain prompt."
            )
        if not messages:
            raise PromptError("messages is empty: give at least one, such as {'role': 'user', 'content': '...'}.")
        counter = count()
        roles, contents = [], []
        for i, message in enumerate(messages):
            role, content = _check_message(message, f"messages[{i}]")
            roles.append(role)
            contents.append(list(numbered_parts(content, f"messages[{i}].content", counter)))
        return self._assemble(self._chat.render(roles, contents), bos=False)

    def build_text(self, segments: Sequence[Segment | str]) -> Prompt:
        """A plain prompt: BOS, if the tokenizer adds one, and the segments; control tokens in them stay text.

        Raises:
            PromptError: a segment is unusable.
        """
        return self._assemble(list(numbered_parts(segments, "segments", count())), bos=True)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _separated(self, passages: Sequence[Passage]) -> Iterator[Part]:
        started = False
        for passage in passages:
            if started and passage.text:
                yield Text(self._separator)
            started = started or bool(passage.text)
            yield passage

    def _assemble(self, parts: Sequence[Part], *, bos: bool) -> Prompt:
        """Tokenise: chunks alone, control tokens of the template as such, and each stretch of text between as one."""
        ids: list[int] = []
        spans: list[Span] = []
        passages: dict[int, tuple[tuple[int, ...], Passage]] = {}
        text, after = "", ""

        def flush() -> None:
            nonlocal text, after
            if text:
                ids.extend(self._content.encode(text, after))
                text, after = "", INSIDE

        for part in parts:
            if isinstance(part, Text):
                text += part.text
            elif isinstance(part, TemplateText):
                for piece, control in self._content.split_template(part.text):
                    if control:
                        flush()
                        ids.extend(self._content.encode_control(piece))
                        after = piece
                    else:
                        text += piece
            else:
                flush()
                chunk = self._content.encode(part.text)
                spans.append(Span(len(ids), len(ids) + len(chunk), part.number))
                passages[part.number] = (chunk, part)
                ids.extend(chunk)
                after = INSIDE if chunk else after
        flush()
        lead = self._content.bos
        if bos and tuple(ids[: len(lead)]) != lead:
            ids[:0] = lead
            spans = [Span(span.start + len(lead), span.end + len(lead), span.chunk) for span in spans]
        ordered = [passages[number] for number in sorted(passages)]
        return Prompt(
            tuple(ids),
            tuple(spans),
            chunk_ids=tuple(chunk for chunk, _ in ordered),
            chunk_texts=tuple(passage.text for _, passage in ordered),
            chunk_documents=tuple(passage.document for _, passage in ordered),
        )


class _ChatTemplate:
    """A tokenizer's chat template, rendered around marks that stand for the contents."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def render(self, roles: Sequence[str], contents: Sequence[Sequence[Part]]) -> list[Part]:
        """Parts of the whole prompt: the template's text, and the contents in their places.

        The contents themselves never get into the template, so it can't be misled by them, nor trim them.
        """
        marks = [_mark(i) for i in range(len(roles))]
        try:
            text = self._marked(roles, marks, marks)
        except PromptError:
            # Templates of multimodal models may want a list of typed parts; if that isn't it, the first error stands.
            try:
                text = self._marked(roles, marks, [[{"type": "text", "text": mark}] for mark in marks])
            except PromptError:
                text = ""
            if not text:
                raise
        parts: list[Part] = []
        done = 0
        for start, i in sorted((text.index(mark), i) for i, mark in enumerate(marks)):
            parts += [TemplateText(text[done:start]), *contents[i]]
            done = start + len(marks[i])
        return [*parts, TemplateText(text[done:])]

    def _marked(self, roles: Sequence[str], marks: Sequence[str], contents: Sequence[Any]) -> str:
        """The rendered conversation, in which every mark occurs exactly once."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PromptError(
                f"the tokenizer's chat template refuses messages with the roles {', '.join(roles)}: {error}. Change "
                "their order or roles (many templates know no system role, or want user and assistant in turn), or "
                "pass a prompt template with {prefix}, {chunks} and {query}."
            ) from error
        for i, mark in enumerate(marks):
            found = text.count(mark)
            if found != 1:
                raise PromptError(
                    f"the tokenizer's chat template {'repeats' if found else 'drops or alters'} the content of message "
                    f"{i + 1} of {len(roles)} (role {roles[i]!r}), which must come out once and unchanged: leave this "
                    "message out, give it another role, set another tokenizer.chat_template, or pass a prompt template "
                    "with {prefix}, {chunks} and {query}."
                )
        return text


def _mark(i: int) -> str:
    """A content that shows any change: of case, quotes, markup, inner whitespace. Trimming leaves it alone."""
    return f"SlotQ7x{i} \"'<&>\\é\n{i}x7Qtols"


def _split_template(template: object) -> tuple[TemplateText, TemplateText, TemplateText, TemplateText]:
    """The four texts around the placeholders."""
    hint = "use a str with {prefix}, {chunks} and {query}, each exactly once and in this order."
    if not isinstance(template, str):
        raise ConfigError(f"the prompt template is {template!r:.80}, a {type(template).__name__}: {hint}")
    found = _PLACEHOLDER.findall(template)
    if tuple(found) != PLACEHOLDERS:
        missing = [name for name in PLACEHOLDERS if name not in found]
        repeated = [name for name in PLACEHOLDERS if found.count(name) > 1]
        if missing:
            what = f"lacks {' and '.join(missing)}"
        elif repeated:
            what = f"has {' and '.join(repeated)} more than once"
        else:
            what = f"has the order {', '.join(found)}"
        raise ConfigError(f"the prompt template {template!r:.200} {what}: {hint}")
    try:
        check_text(template, "the prompt template")
    except PromptError as error:
        raise ConfigError(str(error)) from error
    start, before_chunks, before_query, end = (TemplateText(text) for text in _PLACEHOLDER.split(template))
    return start, before_chunks, before_query, end


def _check_message(message: object, name: str) -> tuple[str, Any]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise PromptError(f"{name} is {message!r:.120}: use a mapping with the keys role and content, and no others.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise PromptError(f"{name} has the role {role!r:.80}: use a word such as 'user', 'assistant' or 'system'.")
    return role, [content] if isinstance(content, str) else content
