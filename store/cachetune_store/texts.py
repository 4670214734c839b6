"""The texts of chunks in the index, by which stored chunks are recognised in a prompt.

When a chunk is evicted, its text stays as long as a document holds the chunk. So the chunk is still recognised, and is computed and
stored again. The record "texts" counts the changes, so that a reader knows when to look again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from .chunk import ChunkHead
from .index import Index
from .keys import ChunkKey
from .seals import Seal

__all__ = [
    "TextRecord",
    "drop_stray_texts",
    "drop_text",
    "evict_text",
    "note_text",
    "note_text_records",
    "texts_revision",
]


class TextRecord(TypedDict):
    """The text of a chunk (as `Seal.hide_text` gives it), how many tokens it has, and the digest of the namespace that they are in."""

    text: str
    tokens: int
    namespace: str


def note_text(index: Index, head: ChunkHead, seal: Seal) -> None:
    """Add the text of a chunk, if it has one. `seal` is the store's."""
    if head.text is not None:
        text = seal.hide_text(head.namespace.tenant, head.key, head.text)
        record = TextRecord(text=text, tokens=head.layout.tokens, namespace=head.namespace.digest)
        note_text_records(index, {head.key: record})


def note_text_records(index: Index, records: Mapping[ChunkKey, TextRecord]) -> None:
    """Add the texts of chunks."""
    with index.transaction():
        new = {key: record for key, record in records.items() if index.get(f"text/{key}") != record}
        for key, record in new.items():
            index.set(f"text/{key}", record)
        if new:
            _changed(index)


def drop_text(index: Index, key: ChunkKey) -> None:
    """Forget the text of a chunk that was deleted."""
    with index.transaction():
        if index.delete(f"text/{key}"):
            _changed(index)


def evict_text(index: Index, key: ChunkKey) -> None:
    """Forget the text of a chunk that had to make room, unless a document holds it or the remote tier has it."""
    if index.get(f"ref/{key}") is None and index.get(f"remote/{key}") is None:
        drop_text(index, key)


def drop_stray_texts(index: Index) -> None:
    """Forget texts of chunks that are stored nowhere and that no document holds: those of a removal that failed halfway."""
    with index.transaction():
        wanted = {name.removeprefix(prefix) for prefix in ("chunk/", "ref/", "remote/") for name in index.names(prefix)}
        strays = [name for name in index.names("text/") if name.removeprefix("text/") not in wanted]
        for name in strays:
            index.delete(name)
        if strays:
            _changed(index)


def texts_revision(index: Index) -> int:
    """A number that grows with every change of the texts."""
    return int(index.get("texts") or 0)


def _changed(index: Index) -> None:
    index.set("texts", texts_revision(index) + 1)
