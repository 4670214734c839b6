"""Real embeddings and a faiss vector store for LlamaIndex, as small as they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQuery, VectorStoreQueryResult


class LocalEmbedding(BaseEmbedding):
    _embed: Callable[[list[str]], Any] = PrivateAttr()

    def __init__(self, embed: Callable[[list[str]], Any]):
        super().__init__(model_name="wordllama")
        self._embed = embed

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text])[0].tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class FaissStore(BasePydanticVectorStore):
    stores_text: bool = True
    _index: Any = PrivateAttr()
    _nodes: dict[int, BaseNode] = PrivateAttr(default_factory=dict)

    def __init__(self) -> None:
        super().__init__(stores_text=True)
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(256))

    @property
    def client(self) -> Any:
        return self._index

    def add(self, nodes: list[BaseNode], **kwargs: Any) -> list[str]:
        start = max(self._nodes, default=-1) + 1
        numbers = np.arange(start, start + len(nodes), dtype=np.int64)
        self._index.add_with_ids(np.array([n.get_embedding() for n in nodes], dtype=np.float32), numbers)
        self._nodes.update(zip(numbers.tolist(), nodes, strict=True))
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **kwargs: Any) -> None:
        gone = [number for number, node in self._nodes.items() if node.ref_doc_id == ref_doc_id]
        self._index.remove_ids(np.array(gone, dtype=np.int64))
        for number in gone:
            del self._nodes[number]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        vector = np.array([query.query_embedding], dtype=np.float32)
        scores, found = self._index.search(vector, query.similarity_top_k)
        pairs = [(n, float(s)) for n, s in zip(found[0].tolist(), scores[0], strict=True) if n >= 0]
        nodes = [self._nodes[number] for number, _ in pairs]
        return VectorStoreQueryResult(
            nodes=nodes, similarities=[score for _, score in pairs], ids=[n.node_id for n in nodes]
        )
