"""The texts of chunks in the index, by which stored chunks are recognised in a prompt.

When a chunk is evicted, its text stays as long as a document holds the chunk. So the chunk is still recognised, and is computed and
stored again. The record "texts" counts the changes, so that a reader knows when to look again.
"""

from __future__ import annotations

from .chunk import ChunkHead
from .index import Index
from .keys import ChunkKey

__all__ = ["drop_stray_texts", "drop_text", "evict_text", "note_text", "texts_revision"]


def note_text(index: Index, head: ChunkHead) -> None:
    """Add the text of a chunk, if it has one."""
    if head.text is None:
        return
    record = {"text": head.text, "tokens": head.layout.tokens, "namespace": head.namespace.digest}
    with index.transaction():
        if index.get(f"text/{head.key}") != record:
            index.set(f"text/{head.key}", record)
            _changed(index)


def drop_text(index: Index, key: ChunkKey) -> None:
    """Forget the text of a chunk that was deleted."""
    with index.transaction():
        if index.delete(f"text/{key}"):
            _changed(index)


def evict_text(index: Index, key: ChunkKey) -> None:
    """Forget the text of a chunk that had to make room, unless a document holds it."""
    if index.get(f"ref/{key}") is None:
        drop_text(index, key)


def drop_stray_texts(index: Index) -> None:
    """Forget texts of chunks that are not stored and that no document holds: those of a removal that failed halfway."""
    with index.transaction():
        wanted = {name.removeprefix(prefix) for prefix in ("chunk/", "ref/") for name in index.names(prefix)}
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
