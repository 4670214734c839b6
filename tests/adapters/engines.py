"""Helpers for the tests of the adapters."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from retrieval import Retriever

from cachetune_rag import CacheTune, Report

__all__ = ["EngineMaker", "Retriever", "check_reuse", "chunk_tokens", "is_stored"]


class EngineMaker:
    """Makes engines of one model, by default all on one store."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path):
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self._made: list[CacheTune] = []

    def __call__(self, store: str | None = "kv", **options: Any) -> CacheTune:
        place = None if store is None else self.folder / store
        engine = CacheTune(self.model, options.pop("tokenizer", self.tokenizer), place, **options)
        self._made.append(engine)
        return engine

    def on_copy(self, folder: Path, **options: Any) -> CacheTune:
        """An engine on a copy of a store that was filled before."""
        shutil.copytree(folder, self.folder / "kv")
        return self(**options)

    def close(self) -> None:
        for engine in self._made:
            engine.close()


def chunk_tokens(engine: CacheTune, texts: Sequence[str]) -> int:
    return sum(len(engine.prompts.encode(text)) for text in texts)


def is_stored(engine: CacheTune, text: str) -> bool:
    from cachetune_store import make_key

    return engine.store.contains(make_key(engine.namespace, engine.prompts.encode(text)))


def check_reuse(report: Report | dict[str, Any] | None, tokens: int) -> None:
    """At least 95% of the chunk tokens, less those recomputed, came from the store."""
    assert report is not None
    values = report if isinstance(report, dict) else report.as_dict()
    assert tokens > 0
    assert values["missed"] == 0, values
    assert 0 < values["reused"] >= 0.95 * tokens - values["recomputed"], (values, tokens)
    assert values["recomputed"] <= 0.16 * tokens + 1, (values, tokens)
