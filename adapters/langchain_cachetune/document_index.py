"""A document index that keeps the KV store in step with a vector store."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.indexing import UpsertResponse
from langchain_core.indexing.base import DeleteResponse, DocumentIndex
from langchain_core.prompts import BasePromptTemplate
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field

from cachetune_rag import CacheTune
from cachetune_rag import Document as EngineDocument
from langchain_cachetune.messages import chunk_text


class CacheTuneIndex(DocumentIndex):
    """A vector store whose documents have their KV precomputed: `index(docs, records, CacheTuneIndex(...))`.

    Documents live in the vector store; this adds their KV when they come and frees it when they go. It is a retriever as
    well, by similarity.

    Args:
        engine: the engine.
        vectorstore: any vector store that can give documents back by id (`get_by_ids`).
        document_prompt: how the chain shows a document; give both the same one.
        k: documents that a search returns.
        search_kwargs: further arguments of `similarity_search`.
    """

    engine: CacheTune = Field(exclude=True, repr=False)
    vectorstore: VectorStore
    document_prompt: BasePromptTemplate[str] | None = None
    k: int = Field(default=4, gt=0)
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Add or replace documents and precompute their KV. Documents without an id are given one.

        The KV comes first: a failure there leaves nothing that could be retrieved.
        """
        documents = [item if item.id is not None else _with_id(item) for item in items]
        latest = {str(document.id): document for document in documents}
        self.engine.precompute(
            EngineDocument(id, [text] if (text := chunk_text(document, self.document_prompt)) else [])
            for id, document in latest.items()
        )
        known = self._known(list(latest))
        if known:
            self.vectorstore.delete(known)  # not every store replaces on its own
        self.vectorstore.add_documents(list(latest.values()), ids=list(latest), **kwargs)
        return UpsertResponse(succeeded=list(latest), failed=[])

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:
        """Delete documents and free KV that no other document holds. Unknown ids are no failure."""
        if ids is None:
            raise ValueError("delete() needs ids: a list of document ids.")
        known = self._known(ids)
        if known:
            self.vectorstore.delete(known, **kwargs)
        for id in dict.fromkeys(ids):
            self.engine.remove(id, missing_ok=True)
        return DeleteResponse(succeeded=known, num_deleted=len(known), failed=[], num_failed=0)

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """Documents by id; those not found are left out."""
        return self.vectorstore.get_by_ids(list(ids))

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return self.vectorstore.similarity_search(query, **{"k": self.k, **self.search_kwargs, **kwargs})

    def _known(self, ids: Sequence[str]) -> list[str]:
        return [str(document.id) for document in self.vectorstore.get_by_ids(list(dict.fromkeys(ids)))]


def _with_id(document: Document) -> Document:
    return document.model_copy(update={"id": str(uuid.uuid4())})
