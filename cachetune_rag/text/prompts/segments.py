"""The parts of a prompt, before and after it is tokenised."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.checking.arguments import is_iterable
from cachetune_rag.errors import CacheTuneError, PromptError
from cachetune_rag.text.tokenizer import check_text
from cachetune_store import changes_so_far
from cachetune_store.printing import shown


@dataclass(frozen=True)
class Text:
    """Text that is always computed."""

    text: str


@dataclass(frozen=True)
class Chunk:
    """A retrieved passage, whose KV can be reused.

    Attributes:
        text: the passage exactly as the prompt shows it.
        document: the id of the document that it belongs to. If a request computes it, it is stored under that document, and
            removed with it. None: it belongs to no document.
        found: whether it was recognised in plain text. If a chat template alters such a text, the altered text is computed.
            A chunk that was given as a chunk is refused then.
        since: a number from `cachetune_store.changes_so_far`, from when the text was known to be the document's (it was
            retrieved then). If the document is removed or replaced after that, nothing is stored under it. None: the time
            at which the prompt is made.
    """

    text: str
    document: str | None = None
    found: bool = field(default=False, compare=False, repr=False)
    since: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class TemplateText:
    """The developer's own text, always computed. Control tokens that it spells out are control tokens, so never use it for a user's text."""

    text: str


Segment = Text | Chunk | TemplateText


@dataclass(frozen=True)
class Passage:
    """A chunk with its number in the request."""

    number: int
    chunk: Chunk


PromptPiece = Text | Passage | TemplateText
"""The pieces from which prompts are tokenised."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of the prompt are chunk number `chunk` of the request; an empty chunk has start == end.

    Where a chunk was found in a prompt's token ids, the prompt may have its first and last tokens in another form (a blank before
    the text makes another token of its first word), or may leave them out. Then the span has only those in between. Tokens of the
    prompt outside of spans are always computed.

    Attributes:
        start, end: places in the prompt.
        chunk: number in the request.
        first: how many of the chunk's first tokens are not in the span.
    """

    start: int
    end: int
    chunk: int
    first: int = 0


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    Attributes:
        ids: token ids of the whole prompt.
        spans: where the chunks stand, by position; one for each chunk of the request.
        chunk_ids: token ids of each chunk, in the request's order.
        chunk_texts: text of each chunk, in the request's order.
        recognised: how many of the chunks were found in plain text, rather than given as chunks.
        retrieved: tokens of the texts that the caller's retriever returned, each tokenised alone; 0 where it didn't say.
        chunk_documents: the document that each chunk belongs to, in the request's order; None where none was named.
        chunk_found: which of the chunks were found among the stored ones, in the request's order.
        chunk_since: since when each chunk is known to be its document's; see `Chunk`.
        passed: where further chunks stand whose rows the reader of the prompt has already, as full prefill computes them.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    chunk_ids: tuple[tuple[int, ...], ...]
    chunk_texts: tuple[str, ...]
    recognised: int = 0
    retrieved: int = 0
    chunk_documents: tuple[str | None, ...] = ()
    chunk_found: tuple[bool, ...] = field(default=(), compare=False, repr=False)
    chunk_since: tuple[int, ...] = field(default=(), compare=False, repr=False)
    passed: tuple[Span, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.chunk_documents:
            object.__setattr__(self, "chunk_documents", (None,) * len(self.chunk_texts))
        if not self.chunk_found:
            object.__setattr__(self, "chunk_found", (False,) * len(self.chunk_texts))
        if not self.chunk_since:
            object.__setattr__(self, "chunk_since", (changes_so_far(),) * len(self.chunk_texts))

    @cached_property
    def ids_array(self) -> NDArray[np.int64]:
        """`ids` as an array that nobody may write to."""
        # Made once, since several parts ask for it, and through `array`: NumPy alone takes three times as long to read a long tuple.
        numbers = np.frombuffer(array("I", self.ids), np.uint32).astype(np.int64)
        numbers.flags.writeable = False
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ids_array"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        # Another process has its own count of changes. There, a text can't be known since before the prompt arrived.
        since = tuple(min(number, changes_so_far()) for number in self.chunk_since)
        object.__setattr__(self, "chunk_since", since)


def given_chunks(
    chunks: Iterable[str | Chunk], name: str = "chunks", refusal: type[CacheTuneError] = PromptError
) -> tuple[Chunk, ...]:
    """The chunks of a request, each checked; a bare string is a chunk of no document.

    Args:
        chunks: as they were given.
        name: what messages call them.
        refusal: what is raised for something that isn't a list (or other ordered collection) at all.

    Raises:
        PromptError: one of them is no str and no `Chunk`.
    """
    if isinstance(chunks, str | bytes | Mapping | Set) or not is_iterable(chunks):
        kind = "a string" if isinstance(chunks, str) else f"a {type(chunks).__name__}"
        raise refusal(
            f"{name} is {kind} ({shown(chunks, 60)}): use a list of strings (or Chunks), one a retrieved passage, in the prompt's order; "
            "[] for none."
        )
    return tuple(_chunk(chunk, f"{name}[{i}]") for i, chunk in enumerate(chunks))


def checked_segments(segments: object, name: str) -> Iterator[Segment]:
    """A caller's segments, checked. A part {"type": "text", "text": ...}, as in OpenAI's API, becomes a `Text`.

    Raises:
        PromptError: `segments` is not a list of `Text`, `Chunk` and str.
    """
    if isinstance(segments, str) or not isinstance(segments, Sequence):
        raise PromptError(f"{name} is {shown(segments)}: use a list of Text, Chunk and str.")
    for i, segment in enumerate(segments):
        if isinstance(segment, Chunk):
            yield _chunk(segment, f"{name}[{i}]")
        elif isinstance(segment, Text):
            yield Text(check_text(segment.text, f"{name}[{i}]"))
        elif isinstance(segment, TemplateText):
            yield TemplateText(check_text(segment.text, f"{name}[{i}]"))
        elif isinstance(segment, str):
            yield Text(check_text(segment, f"{name}[{i}]"))
        elif isinstance(segment, Mapping):
            yield Text(_text_part(segment, f"{name}[{i}]"))
        else:
            raise PromptError(f"{name}[{i}] is {shown(segment)}: use Text, Chunk or a str.")


def numbered(segments: Iterable[Segment]) -> Iterator[PromptPiece]:
    """The segments, with a number for each chunk."""
    number = count()
    for segment in segments:
        yield Passage(next(number), segment) if isinstance(segment, Chunk) else segment


def _text_part(part: Mapping[str, object], name: str) -> str:
    """The text of a content part of OpenAI's API."""
    kind = part.get("type")
    if kind != "text":
        raise PromptError(
            f"{name} is a part of type {kind!r:.60}, and the engine reads text alone: use {{'type': 'text', 'text': ...}}, Text, Chunk "
            "or a str."
        )
    return check_text(part.get("text"), f"{name}['text']")


def _chunk(chunk: object, name: str) -> Chunk:
    if not isinstance(chunk, Chunk):
        return Chunk(check_text(chunk, name))
    check_text(chunk.text, name)
    if chunk.document is not None and (not isinstance(chunk.document, str) or not chunk.document):
        raise PromptError(f"{name} has the document {shown(chunk.document)}: use a document's id, a str, or None.")
    return chunk
