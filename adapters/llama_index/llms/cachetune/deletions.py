"""Deleted documents whose KV is kept until it is clear whether they are inserted again.

The framework updates a document by deleting it and inserting it again. If its KV were freed in between, unchanged parts would be computed
again. So documents that are deleted in an update, or in a run of an ingestion pipeline, are handled when that ends: the KV of those that
were not inserted again is freed.
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
    """An object that frees and computes the KV of documents: a `KVPrecompute`."""

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Free a document's KV."""

    def replace(self, nodes: Iterable[BaseNode]) -> object:
        """Make documents consist of these nodes."""


class Deletions:
    """Documents that were deleted in one update or ingestion run and were not inserted again so far."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Freeing, str]] = []

    def add(self, owner: Freeing, ref_doc_id: str) -> None:
        """Add a document that was deleted."""
        if not self.holds(owner, ref_doc_id):
            self._waiting.append((owner, ref_doc_id))

    def holds(self, owner: Freeing, ref_doc_id: str) -> bool:
        """Whether a document was deleted and not inserted again."""
        return any(who is owner and id == ref_doc_id for who, id in self._waiting)

    def came_back(self, owner: Freeing, ref_doc_id: str) -> None:
        """Drop a document that was inserted again."""
        self._waiting = [(who, id) for who, id in self._waiting if who is not owner or id != ref_doc_id]

    def apply(self, result: Iterable[object] = ()) -> None:
        """Free the KV of the documents that were not inserted again.

        Args:
            result: the nodes that an ingestion run returned. They include nodes from the pipeline's cache, for which no insertion
                was reported.
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
            except (
                CacheTuneError,
                StoreError,
            ):  # the framework's call has succeeded, and must not fail because of this
                _log.warning("the KV of document %r was not freed", ref_doc_id, exc_info=True)


_UPDATE: ContextVar[Deletions | None] = ContextVar("_UPDATE", default=None)


@contextmanager
def update() -> Iterator[None]:
    """Handle the deletions inside the context when it ends. An update inside another one is part of that."""
    if _UPDATE.get() is not None:
        yield
        return
    deletions = Deletions()
    token = _UPDATE.set(deletions)
    try:
        yield
    finally:
        _UPDATE.reset(token)
        deletions.apply()


def of_update() -> Deletions | None:
    """The deletions of the update that is running in this context; None if there is none."""
    return _UPDATE.get()
