"""How stored chunks are encoded. Asked where an engine is made ready, so that the first prompt of such chunks doesn't wait for a compiler."""

from __future__ import annotations

from cachetune_store import ChunkStore

SAMPLE = 32
"""Documents that are looked at, at most; they lie evenly among all. What is written in one way is usually written in one go."""


def stored_codecs(store: ChunkStore, tenant: str) -> set[str]:
    """The codecs of a tenant's stored chunks, by a sample of its documents: of each, the first chunk that is there."""
    found: set[str] = set()
    for chunks in store.sample_documents(SAMPLE, tenant=tenant):
        for key in chunks[:SAMPLE]:  # a document may have very many, and all may be gone
            reader = store.open(key)
            if reader is not None:
                with reader:
                    found.add(reader.layout.codec)
                break
    return found
