"""What a prompt shows of a document: the text that is stored, and the text around it."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, format_document

from cachetune_rag import Chunk, Text
from cachetune_rag.text.prompts.prompt import Segment

Shown = Callable[[Document], Iterable[str] | str]
"""Returns the texts that prompts will show of a document, such as a window in its metadata; none if it is never shown."""


def segments(document: Document, document_prompt: BasePromptTemplate[str] | None) -> list[Segment]:
    """A document as a prompt shows it: its content is the chunk, and what the document prompt adds is text.

    So a content is stored once, whatever header it is shown with, and is also found without a header. If the document prompt changes the
    content or leaves it out, all of its output is the chunk.
    """
    body = document.page_content
    if document_prompt is None:
        return [Chunk(body, document=document.id)] if body else []
    whole = format_document(document, document_prompt)
    mark = f"document-{uuid.uuid4().hex}"
    pieces = format_document(document.model_copy(update={"page_content": mark}), document_prompt).split(mark)
    if len(pieces) == 1 or not body or body.join(pieces) != whole:
        return [Chunk(whole, document=document.id)] if whole else []
    made: list[Segment] = [Text(pieces[0])]
    for piece in pieces[1:]:
        made += [Chunk(body, document=document.id), Text(piece)]
    return [segment for segment in made if segment.text]


def stored_texts(
    document: Document, document_prompt: BasePromptTemplate[str] | None, shown: Shown | None = None
) -> list[str]:
    """The texts of the chunks that are stored for a document."""
    if shown is None:
        texts = [segment.text for segment in segments(document, document_prompt) if isinstance(segment, Chunk)]
    else:
        said = shown(document)
        texts = [said] if isinstance(said, str) else list(said)
    return list(dict.fromkeys(text for text in texts if text))


def content_id(text: str) -> str:
    """The id in the KV store of a document that has none. Documents with the same content have the same id."""
    return f"content-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
