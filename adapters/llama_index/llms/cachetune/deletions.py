"""Deleted documents whose KV waits until it is clear whether they come back.

A framework updates a document by deleting and inserting it again. Freed in between, the KV of everything that stayed the same
would be computed again. So deletions inside an update, or inside a run of an ingestion pipeline, are settled when that ends:
documents that came back were replaced by then, and the others are freed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from llama_index.core.schema import BaseNode

from cachetune_rag import CacheTuneError, StoreError
from llama_index.llms.cachetune.shown import document_of

_log = logging.getLogger(__name__)


class Freeing(Protocol):
    """What frees and computes documents: a `KVPrecompute`."""

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Free a document's KV."""

    def replace(self, nodes: Iterable[BaseNode]) -> object:
        """Make documents consist of these nodes."""


class Deletions:
    """What was deleted in one update or ingestion run, and hasn't come back so far."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Freeing, str]] = []

    def add(self, owner: Freeing, ref_doc_id: str) -> None:
        """A document was deleted."""
        if not self.holds(owner, ref_doc_id):
            self._waiting.append((owner, ref_doc_id))

    def holds(self, owner: Freeing, ref_doc_id: str) -> bool:
        """Whether a document was deleted and hasn't come back."""
        return any(who is owner and id == ref_doc_id for who, id in self._waiting)

    def came_back(self, owner: Freeing, ref_doc_id: str) -> None:
        """A document was deleted and has been replaced."""
        self._waiting = [(who, id) for who, id in self._waiting if who is not owner or id != ref_doc_id]

    def settle(self, result: Iterable[object] = ()) -> None:
        """Free what didn't come back.

        Args:
            result: the nodes that an ingestion run returned. Documents whose nodes came out of the pipeline's cache are among
                them, though nothing was told of them.
        """
        nodes = [node for node in result if isinstance(node, BaseNode)]
        waiting, self._waiting = self._waiting, []
        for owner, ref_doc_id in waiting:
            back = [node for node in nodes if document_of(node) == ref_doc_id]
            try:
                if back:
                    owner.replace(back)
                else:
                    owner.delete_ref_doc(ref_doc_id)
            except (CacheTuneError, StoreError):  # the framework's own call has succeeded, and is not to fail for this
                _log.warning("the KV of document %r was not freed", ref_doc_id, exc_info=True)


_UPDATE: ContextVar[Deletions | None] = ContextVar("_UPDATE", default=None)


@contextmanager
def update() -> Iterator[None]:
    """What is deleted within is settled at the end; an update within an update is part of it."""
    if _UPDATE.get() is not None:
        yield
        return
    deletions = Deletions()
    token = _UPDATE.set(deletions)
    try:
        yield
    finally:
        _UPDATE.reset(token)
        deletions.settle()


def of_update() -> Deletions | None:
    """What the update under way here has deleted; None where none is under way."""
    return _UPDATE.get()
