"""A faiss vector store for LangChain, as small as one can be."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import faiss
import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore


class FaissStore(VectorStore):
    def __init__(self, embed: Callable[[list[str]], Any]):
        self._embed = embed
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(256))
        self._documents: dict[int, Document] = {}
        self._numbers: dict[str, int] = {}

    def add_texts(
        self, texts: Any, metadatas: list[dict[str, Any]] | None = None, *, ids: list[str] | None = None, **kwargs: Any
    ) -> list[str]:
        texts = list(texts)
        ids = ids or [str(uuid.uuid4()) for _ in texts]
        numbers = [uuid.uuid4().int >> 66 for _ in texts]
        self._index.add_with_ids(self._embed(texts), np.array(numbers, dtype=np.int64))
        for i, (text, id, number) in enumerate(zip(texts, ids, numbers, strict=True)):
            self._documents[number] = Document(id=id, page_content=text, metadata=(metadatas or [{}] * len(texts))[i])
            self._numbers[id] = number
        return ids

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        numbers = [self._numbers.pop(id) for id in ids or [] if id in self._numbers]
        self._index.remove_ids(np.array(numbers, dtype=np.int64))
        for number in numbers:
            del self._documents[number]
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return [self._documents[self._numbers[id]] for id in ids if id in self._numbers]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        _, found = self._index.search(self._embed([query]), k)
        return [self._documents[number] for number in found[0] if number >= 0]

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, **kwargs: Any) -> FaissStore:
        raise NotImplementedError
