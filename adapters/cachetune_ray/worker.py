"""The actor: an engine that computes and stores rows of work. What it returns is small; KV goes to the store only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cachetune_rag.engine import CacheTune
from cachetune_rag.errors import ConfigError
from cachetune_rag.text.documents import Document
from cachetune_ray import failures, tries
from cachetune_ray.work import Cutter


@dataclass(frozen=True)
class EngineToMake:
    """What every actor makes its engine of.

    Attributes:
        model, store: where both are.
        loading: further arguments of `CacheTune.from_pretrained`.
        first: rows of the corpus's first documents, from which lead-ins are chosen. They are the same for all actors, so all choose the same.
        cutter: cuts them.
        tries: counts how often rows are begun (`tries.RemoteTries`).
        same_model_only: whether a store that has nothing but chunks of other models is refused.
    """

    model: str
    store: str
    loading: Mapping[str, Any]
    first: Sequence[Mapping[str, Any]]
    cutter: Cutter
    tries: Any
    same_model_only: bool = False


class Worker:
    """Computes rows of work. Made once in every actor, and again where the actor died.

    Where no engine can be made, the first row says why.

    Args:
        made: what the engine is made of.
    """

    def __init__(self, made: EngineToMake):
        self._failure: dict[str, str] | None = None
        self._tries = made.tries
        try:
            self._engine = CacheTune.from_pretrained(made.model, made.store, **made.loading)
            self._prepare(self._engine, made)
        except failures.OURS as error:
            self._failure = failures.told(error)

    def _prepare(self, engine: CacheTune, made: EngineToMake) -> None:
        limit = engine.adapter.max_positions
        if limit is not None and made.cutter.chunk_tokens + 1 > limit:
            raise ConfigError(
                f"chunk tokens is {made.cutter.chunk_tokens}, but the model reads at most {limit} tokens: use {limit - 1} or fewer."
            )
        engine.store.check_writable()
        if made.same_model_only:
            from cachetune_rag.cli.session import check_match

            check_match(engine, engine.store)
        engine.runtime.precomputer.choose_lead_ins(made.cutter.cut(made.first))

    def __call__(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """Compute and store a row's documents. A row that was begun by an actor that died goes on where that one was: what is stored is skipped.

        Returns:
            What was done; or what went wrong, as `failures.check` reads it.
        """
        error = work.get("error") or self._failure
        if error is None:
            try:
                return {**self._done(work), "error": None}
            except failures.OURS as raised:
                error = failures.told(raised)
        return {"error": error}

    def _done(self, work: Mapping[str, Any]) -> dict[str, Any]:
        documents = [Document(each["id"], each["chunks"]) for each in work["documents"]]
        names = [document.id for document in documents]
        tries.check(self._tries.begin(names), names)
        store = self._engine.store
        before = _evicted(store)
        summary = self._engine.precompute(documents)
        self._tries.done(names)
        if store.remote is not None and store.path is not None:
            store.sync()  # this machine may be gone when it would be told by itself
        return {
            "documents": summary.documents,
            "chunks": summary.chunks,
            "skipped": summary.skipped,
            "tokens": summary.tokens,
            "bytes": summary.bytes,
            "lead_ins": summary.lead_ins,
            "evicted": _evicted(store) - before,
            "size": work["size"],
            "empty": list(work["empty"]),
            "failed": [[each["id"], each["why"]] for each in work["failed"]],
            "ids": names,
            "worker": f"{ray.get_runtime_context().get_node_id()}/{os.getpid()}",
        }


def _evicted(store: Any) -> int:
    disk = store.stats().disk
    return 0 if disk is None else int(disk.evictions)
