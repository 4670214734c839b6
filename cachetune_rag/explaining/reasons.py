"""Why a chunk of a prompt was or was not found, as a sentence."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cachetune_rag.chunks.differences import what_differs
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.reuse.account import ChunkAccount, Outcome
from cachetune_store import ChunkKey, ChunkStore, StoreError, make_key

_WHY = {
    Outcome.STORED: "It is in the store.",
    Outcome.DAMAGED: "It was damaged, and is set aside: precompute its document again.",
    Outcome.UNREADABLE: "The system refused to read its file. The log says why.",
    Outcome.TIMED_OUT: "The store's disk did not answer in time.",
    Outcome.EMPTY: "It has no tokens.",
}
_OTHER = {
    "model": "The same text is stored for another model, or for other weights of this one.",
    "tokenizer": "The same text is stored for another tokenizer.",
    "dtype": "The same text is stored in another dtype. Use the dtype that it was precomputed with, or precompute again.",
    "lead-ins": "The same text is stored behind other lead-ins. Precompute its document again.",
}
_GONE = "Its text is known, and its rows are not stored any more: it had to make room, or was set aside. Precompute its document again."
_EARLIER = (
    "It was stored before this store's lead-ins were chosen. It is computed again when its document is precomputed."
)
NEVER = "It is not in the store."


def at_once(outcome: Outcome) -> str:
    """The sentence for an outcome, without a look at the store."""
    return _WHY.get(outcome, NEVER)


class Reasons:
    """Explains lookups in one engine's store. Only what is the engine's own tenant's is looked at.

    Args:
        store: where chunks are kept.
        lead_ins: know what keys are made with.
    """

    def __init__(self, store: ChunkStore, lead_ins: LeadIns):
        self._store, self._lead_ins = store, lead_ins
        self._elsewhere: dict[str, str] = {}

    def why(self, chunk: ChunkAccount, ids: tuple[int, ...], text: str) -> str:
        """Why the lookup of a chunk ended as it did."""
        if chunk.outcome is not Outcome.MISSED:
            return _WHY[chunk.outcome]
        try:
            return self._why_missed(chunk.key, ids, text)
        except StoreError as error:
            return f"{NEVER} The store can't be searched for more: {error}"

    def document_of(self, key: ChunkKey | None) -> str | None:
        """The first document of the tenant that holds a chunk."""
        if key is None:
            return None
        try:
            return next(iter(self._store.holders([key], tenant=self._lead_ins.namespace.tenant)), None)
        except StoreError:
            return None

    def _why_missed(self, key: ChunkKey | None, ids: tuple[int, ...], text: str) -> str:
        if key is None:
            return NEVER
        if any(True for _ in self._store.texts(keys=[key])):
            return _GONE
        earlier = [make_key(namespace, ids) for namespace in self._lead_ins.namespaces[1:]]
        if any(True for _ in self._store.texts(keys=earlier)):
            return _EARLIER
        return self._elsewhere.get(text, NEVER)

    def search(self, texts: Sequence[str], until: float) -> None:
        """Look for these texts, of missed chunks, among all that is stored, in one pass that ends at `until` (`time.monotonic`)."""
        self._elsewhere = {}
        wanted, missed = self._lead_ins.namespace, set(texts)
        try:
            for key, stored, _ in self._store.texts() if missed else ():
                if time.monotonic() > until:
                    break
                if stored in missed and stored not in self._elsewhere:
                    reader = self._store.open(key)
                    if reader is None:
                        continue
                    with reader:
                        namespace = reader.head.namespace
                    if namespace.tenant == wanted.tenant and namespace != wanted:
                        self._elsewhere[stored] = _OTHER[what_differs(namespace, wanted)]
        except StoreError:
            return
