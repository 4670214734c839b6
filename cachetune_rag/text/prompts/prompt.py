"""Prompts: where prefix, chunks and query stand, as one list of token ids.

A chunk is tokenised alone, so its ids are the same wherever it stands and its stored KV fits. Everything else between
two chunks is tokenised together, as the model's own chat format requires. Reuse and full prefill work on the same list of ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cachetune_rag.errors import ConfigError, PromptError
from cachetune_rag.text.prompts.chat_messages import Message
from cachetune_rag.text.prompts.chat_template import ChatTemplate
from cachetune_rag.text.prompts.segments import (
    Chunk,
    Prompt,
    PromptPiece,
    Segment,
    Span,
    TemplateText,
    Text,
    checked_segments,
    given_chunks,
    numbered,
)
from cachetune_rag.text.tokenizer import INSIDE, ContentTokenizer, check_text
from cachetune_store import changes_so_far
from cachetune_store.printing import shown

__all__ = ["INSTRUCTIONS", "PLACEHOLDERS", "Chunk", "Prompt", "PromptBuilder", "Segment", "Span", "Text"]

INSTRUCTIONS = "Answer the question using only the passages below."
"""The prefix of requests that give none. Short on purpose: every added condition ("if they do
not contain the answer, say so") made a 135M model miss answers that stood in the passages."""

PLACEHOLDERS = ("{prefix}", "{chunks}", "{query}")

_ODD_CHUNK = "A \"chunk\" shows any change: of 'case', <quotes> & \\ markup, \u00e9,\n  inner white space."
_PLACEHOLDER = re.compile("|".join(re.escape(name) for name in PLACEHOLDERS))


class PromptBuilder:
    """Builds prompts for one tokenizer. Safe to use from many threads, of one process: in a process that was forked since it was
    made, its methods raise `ForkedError`.

    Args:
        tokenizer: the model's tokenizer; a copy is kept, so later changes to it have no effect.
        template: the whole prompt as text with {prefix}, {chunks} and {query}, each once and in this order; other
            braces are plain text. It may contain control tokens. Default: one user message in the tokenizer's chat
            template, or a plain layout where there is none.
        chunk_separator: text between chunks; always computed.
        instructions: the prefix of requests that give none; default: `INSTRUCTIONS`, "" for nothing.
        chat_template_kwargs: arguments of the chat template for every prompt that doesn't give its own, e.g.
            {"enable_thinking": False}.

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
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self._content = ContentTokenizer(tokenizer)
        self._chat = self._chat_template(chat_template_kwargs)
        self._template = None if template is None else _split_template(template)
        try:
            self._separator = check_text(chunk_separator, "chunk_separator")
            self._instructions = INSTRUCTIONS if instructions is None else check_text(instructions, "instructions")
        except PromptError as error:
            raise ConfigError(str(error)) from error
        if self._chat is not None and self._template is None:
            self.build(query="?", chunks=[_ODD_CHUNK])  # a chat template that can't be used is refused now
        first = self.build(query="?", chunks=[]).ids or self.encode("\n") or [0]
        self.first_token = first[0]
        self.separator_ids = tuple(self.encode(chunk_separator))

    def encode(self, text: str) -> list[int]:
        """Token ids of content (a chunk, say), exactly as `build` puts them into a prompt; never a control token.

        Raises:
            PromptError: `text` is no str, or has lone surrogates.
        """
        return list(self._content.encode(text))

    def encode_many(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """What `encode` gives for each text; faster for many, and other threads run meanwhile.

        Raises:
            PromptError: see `encode`.
        """
        return self._content.encode_many(texts)

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens, such as those around each turn of a conversation."""
        return self._content.control

    @property
    def argument_names(self) -> frozenset[str]:
        """The template arguments that `build` accepts: the variables that the chat template uses. Empty where `build` doesn't use one."""
        return self._chat.names if self._chat is not None and self._template is None else frozenset()

    def split_template(self, text: str) -> list[tuple[str, bool]]:
        """Cut a developer's text into `(piece, is a control token)`; the pieces joined are the text."""
        self._content.check_process()
        return self._content.split_template(check_text(text))

    def build(
        self, *, query: str, chunks: Iterable[str | Chunk], prefix: str | None = None, **template_arguments: Any
    ) -> Prompt:
        """The engine's standard prompt: prefix, chunks, query.

        Args:
            query: the user's question.
            chunks: the retrieved passages, texts or `Chunk`s, in prompt order. An empty one adds no tokens and no separator.
            prefix: text before the chunks; None for the default instructions, "" for none.
            template_arguments: variables of the chat template, e.g. enable_thinking=False; and tools, as for `build_messages`.

        Raises:
            PromptError: a text is no str, or has lone surrogates; or the chat template refuses or doesn't know an argument.
        """
        self._content.check_process()
        check_text(query, "query")
        prefix = self._instructions if prefix is None else check_text(prefix, "prefix")
        passages = given_chunks(chunks)
        body = list(self._separated(passages))
        chat = self._chat if self._template is None else None
        if chat is None and template_arguments:
            raise PromptError(
                f"{shown(next(iter(template_arguments)))} is an argument for a chat template, and this prompt is laid out by "
                f"{'prompt_template' if self._template is not None else 'no template'}: leave it out."
            )
        if self._template is not None:
            start, before_chunks, before_query, end = self._template
            pieces = [start, Text(prefix), before_chunks, *numbered(body), before_query, Text(query), end]
            return self._assemble(pieces, bos=True)
        lead = "\n\n" if any(passage.text for passage in passages) else ""
        content = [Text(f"{prefix}\n\n" if prefix else ""), *body, Text(f"{lead}Question: {query}")]
        if chat is not None:
            tools = template_arguments.pop("tools", None)
            return self._assemble(
                chat.pieces([Message("user", tuple(content), {})], tools, template_arguments), bos=False
            )
        return self._assemble([*numbered(content), Text("\n\nAnswer:")], bos=True)

    def build_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        **template_arguments: Any,
    ) -> Prompt:
        """A conversation, laid out by the tokenizer's chat template, up to where the assistant speaks.

        Args:
            messages: each {"role": ..., "content": ...}; content is a str or a list of `Text`, `Chunk`, str and parts
                {"type": "text", "text": ...}. Other fields that the template knows may be given too: tool_calls,
                tool_call_id, name, reasoning_content.
            tools: JSON schemas or functions that the model may call, as for transformers' `apply_chat_template`.
            template_arguments: further variables of the template, e.g. enable_thinking=False; or chat_template, the name of
                another template of the tokenizer's or its text; add_generation_prompt, continue_final_message.

        Raises:
            PromptError: no chat template, one that refuses these messages, drops one or alters a chunk, or doesn't know an
                argument; or an unusable message.
        """
        self._content.check_process()
        if self._chat is None:
            raise PromptError(
                "this tokenizer has no chat template, so messages have no layout: set tokenizer.chat_template, or use "
                "a plain prompt."
            )
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise PromptError(f"messages is {shown(messages)}: use a list of mappings with the keys role and content.")
        if not messages:
            raise PromptError("messages is empty: give at least one, such as {'role': 'user', 'content': '...'}.")
        checked = [Message.of(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return self._assemble(self._chat.pieces(checked, tools, template_arguments), bos=False)

    def build_text(self, segments: Sequence[Segment | str]) -> Prompt:
        """A plain prompt: BOS, if the tokenizer adds one, and the segments; control tokens in them stay text.

        Raises:
            PromptError: a segment is unusable.
        """
        self._content.check_process()
        return self._assemble(list(numbered(checked_segments(segments, "segments"))), bos=True)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _chat_template(self, defaults: Mapping[str, Any] | None) -> ChatTemplate | None:
        if defaults is not None and not isinstance(defaults, Mapping):
            raise ConfigError(
                f"chat_template_kwargs is {shown(defaults)}: use a dict, such as {{'enable_thinking': False}}."
            )
        if odd := [name for name in defaults or () if not isinstance(name, str)]:
            raise ConfigError(f"chat_template_kwargs has the key {shown(odd[0])}: use names of variables, strings.")
        if not getattr(self._content.tokenizer, "chat_template", None):
            if defaults:
                raise ConfigError(
                    f"chat_template_kwargs is {shown(dict(defaults))}, and this tokenizer has no chat template: leave it out."
                )
            return None
        try:
            return ChatTemplate(self._content, defaults or {})
        except PromptError as error:
            raise ConfigError(f"chat_template_kwargs: {error}") from error

    def _separated(self, passages: Sequence[Chunk]) -> Iterator[Segment]:
        started = False
        for passage in passages:
            if started and passage.text:
                yield Text(self._separator)
            started = started or bool(passage.text)
            yield passage

    def _assemble(self, pieces: Sequence[PromptPiece], *, bos: bool) -> Prompt:
        """Tokenise: each chunk alone, the template's control tokens as such, and each stretch of text between them as a whole."""
        ids: list[int] = []
        spans: list[Span] = []
        passages: dict[int, tuple[tuple[int, ...], Chunk]] = {}
        text, after = "", ""

        def flush() -> None:
            nonlocal text, after
            if text:
                ids.extend(self._content.encode(text, after))
                text, after = "", INSIDE

        for piece in pieces:
            if isinstance(piece, Text):
                text += piece.text
            elif isinstance(piece, TemplateText):
                for stretch, control in self._content.split_template(piece.text):
                    if control:
                        flush()
                        ids.extend(self._content.encode_control(stretch))
                        after = stretch
                    else:
                        text += stretch
            else:
                flush()
                chunk = self._content.encode(piece.chunk.text)
                spans.append(Span(len(ids), len(ids) + len(chunk), piece.number))
                passages[piece.number] = (chunk, piece.chunk)
                ids.extend(chunk)
                after = INSIDE if chunk else after
        flush()
        lead = self._content.bos
        if bos and tuple(ids[: len(lead)]) != lead:
            ids[:0] = lead
            spans = [Span(span.start + len(lead), span.end + len(lead), span.chunk) for span in spans]
        ordered = [passages[number] for number in sorted(passages)]
        now = changes_so_far()
        return Prompt(
            tuple(ids),
            tuple(spans),
            chunk_ids=tuple(chunk for chunk, _ in ordered),
            chunk_texts=tuple(passage.text for _, passage in ordered),
            chunk_documents=tuple(passage.document for _, passage in ordered),
            recognised=sum(passage.found for _, passage in ordered),
            chunk_found=tuple(passage.found for _, passage in ordered),
            chunk_since=tuple(now if passage.since is None else min(now, passage.since) for _, passage in ordered),
        )


def _split_template(template: object) -> tuple[TemplateText, TemplateText, TemplateText, TemplateText]:
    """The four texts around the placeholders."""
    hint = "use a str with {prefix}, {chunks} and {query}, each exactly once and in this order."
    if not isinstance(template, str):
        raise ConfigError(f"the prompt template is {shown(template)}, a {type(template).__name__}: {hint}")
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
        raise ConfigError(f"the prompt template {shown(template, 200)} {what}: {hint}")
    try:
        check_text(template, "the prompt template")
    except PromptError as error:
        raise ConfigError(str(error)) from error
    start, before_chunks, before_query, end = (TemplateText(text) for text in _PLACEHOLDER.split(template))
    return start, before_chunks, before_query, end
