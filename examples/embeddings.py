"""Local embeddings (wordllama ships its weights in its package) for LlamaIndex and LangChain."""

from __future__ import annotations

from typing import Any

from retrieval import Retriever


def for_llama_index() -> Any:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr

    class LocalEmbedding(BaseEmbedding):
        _embed: Any = PrivateAttr(default_factory=lambda: Retriever(["."]).embed)

        def _get_text_embedding(self, text: str) -> list[float]:
            return self._embed([text])[0].tolist()

        def _get_query_embedding(self, query: str) -> list[float]:
            return self._get_text_embedding(query)

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_text_embedding(query)

    return LocalEmbedding(model_name="wordllama")


def for_langchain() -> Any:
    from langchain_core.embeddings import Embeddings

    class LocalEmbeddings(Embeddings):
        def __init__(self) -> None:
            self._embed = Retriever(["."]).embed

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return self._embed(texts).tolist()

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    return LocalEmbeddings()
