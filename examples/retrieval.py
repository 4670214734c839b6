"""A small real retriever: static word embeddings that ship in a package (wordllama), searched with faiss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import wordllama


class Retriever:
    """Finds the passages nearest to a question by cosine similarity."""

    def __init__(self, passages: Sequence[str]):
        # The package contains its weights and tokenizer, but its default loader looks for the tokenizer elsewhere.
        self._embedder = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
        self._passages = list(passages)
        vectors = self.embed(self._passages)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [texts, 256]."""
        return np.ascontiguousarray(self._embedder.embed(list(texts), norm=True), dtype=np.float32)

    def __call__(self, question: str, count: int) -> list[str]:
        """The `count` nearest passages, best first."""
        _, found = self._index.search(self.embed([question]), count)
        return [self._passages[i] for i in found[0]]
