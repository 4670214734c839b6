"""Fills the KV store while LlamaIndex ingests documents."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.ingestion.pipeline import run_transformations
from llama_index.core.schema import BaseNode, TransformComponent

from cachetune_rag import CacheTune, Document, PrecomputeSummary
from cachetune_rag.concurrency.async_calls import call_in_thread
from llama_index.llms.cachetune.following import deletions, follow
from llama_index.llms.cachetune.shown import body, document_of
from llama_index.llms.cachetune.sources import Source, nodes_of
from llama_index.llms.cachetune.traces import TRACES

Shown = Callable[[BaseNode], str | Iterable[str]]

_VERSIONS: weakref.WeakKeyDictionary[CacheTune, dict[str, str]] = weakref.WeakKeyDictionary()
"""For documents that were ingested in this process, the hash of their source."""
_versions_lock = threading.Lock()


def _after_fork() -> None:
    global _versions_lock
    _versions_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class KVPrecompute(TransformComponent):
    """Computes and stores the KV of the nodes that pass through, as prompts will show them. Put it after the splitter.

    The body of a node (its stripped text without its metadata) is one chunk, so it is found whatever header a prompt puts before it. The
    nodes of a source document are one document in the store, under its `ref_doc_id`; a node without a source has its own id. Nodes of
    another version of the source, which its hash shows, replace the document. Further nodes of the same version are added to it.

    An `IngestionPipeline` caches the results of its transformations, and skips these the next time. Model, tokenizer, dtype, tenant and
    store are part of the key in that cache, so another model or store computes anew. KV that was evicted meanwhile is computed by the
    first request that misses it, or for all nodes by `rebuild`.

    Args:
        engine: the engine.
        shown: returns the text or texts that prompts will show of a node, if this is not its body. For sentence windows, for
            example, it is `lambda node: node.metadata["window"]`. They are stripped, as in most prompts, and stored instead.
    """

    namespace: str = Field(description="What the KV was computed with: model, tokenizer, dtype, lead-ins, tenant.")
    store: str = Field(description="Where the KV is.")
    shows: str = Field(default="", description="Which function says what prompts show.")
    _engine: CacheTune | None = PrivateAttr(default=None)
    _shown: Shown | None = PrivateAttr(default=None)
    _summary: PrecomputeSummary | None = PrivateAttr(default=None)

    def __init__(self, engine: CacheTune, *, shown: Shown | None = None):
        path = engine.store.path
        values: dict[str, Any] = {
            "namespace": engine.namespace.digest,
            # A store in memory ends with its engine, so the pipeline's cache must not be valid for another one.
            "store": f"memory-{id(engine.store)}" if path is None else str(path.resolve()),
            # So it is for a function without a name that another process would know.
            "shows": "" if shown is None else _name(shown),
        }
        super().__init__(**values)
        self._engine = engine
        self._shown = shown
        TRACES.install()

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KVPrecompute"

    @property
    def engine(self) -> CacheTune:
        """The engine."""
        engine: CacheTune | None = getattr(self, "_engine", None)
        if engine is None:
            raise RuntimeError(
                "KVPrecompute has no engine in this process: a model can't follow into worker processes. Run the "
                "pipeline with num_workers=None."
            )
        return engine

    @property
    def last_summary(self) -> PrecomputeSummary | None:
        """What the last call computed."""
        return self._summary

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy that shares the engine."""
        memo = {} if memo is None else memo
        memo[id(self._engine)] = self._engine
        return super().__deepcopy__(memo)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Precompute the nodes' chunks. Returns the nodes unchanged."""
        known = self._versions()
        new: list[BaseNode] = []
        more: list[BaseNode] = []
        for node in nodes:
            again = known.get(document_of(node)) == _version(node) and not self._was_deleted(node)
            (more if again else new).append(node)
        self._summary = _sum(self._compute(new, replace=True), self._compute(more, replace=False))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same, on another thread."""
        return await call_in_thread(self, nodes)

    def insert(self, nodes: Sequence[BaseNode]) -> PrecomputeSummary:
        """Compute nodes, and add them to their documents. A document that was deleted in the running update then consists of them."""
        self(nodes)
        assert self._summary is not None
        return self._summary

    def replace(self, nodes: Iterable[BaseNode]) -> PrecomputeSummary:
        """Make documents consist of these nodes. Missing KV is computed, and KV of their other nodes is freed."""
        self._summary = self._compute(list(nodes), replace=True)
        return self._summary

    def rebuild(
        self, source: Source, transformations: Sequence[TransformComponent] = (), *, queries: Sequence[str] = ()
    ) -> PrecomputeSummary:
        """Compute all missing KV of an existing index, whatever is cached.

        Args:
            source: the index, its docstore, or its vector store (if it can list its nodes); a pipeline's docstore, which has whole
                documents and needs `transformations`; nodes; or a retriever.
            transformations: applied to the content of the source first, such as the pipeline's splitter.
            queries: questions for the retriever. The nodes that it returns are added to their documents.

        Raises:
            ConfigError: the source can't say what it holds.
        """
        held = nodes_of(source, queries)
        nodes = run_transformations(held, [t for t in transformations if t is not self])
        self._summary = self._compute(list(nodes), replace=not queries)
        return self._summary

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Free the KV of a document that was deleted. Returns the bytes that were freed, 0 for an unknown document."""
        self._versions().pop(ref_doc_id, None)
        return self.engine.remove(ref_doc_id, missing_ok=True)

    def follow(self, *targets: Any) -> None:
        """Update the store together with indexes or docstores: free what they delete, and compute what they insert.

        Args:
            targets: an index (`insert`, `refresh_ref_docs`, `update_ref_doc`, `delete_ref_doc`), also a loaded one without
                transformations; or the docstore of a pipeline. Nodes that an update deletes and inserts again are neither freed nor
                computed again.
        """
        for target in targets:
            follow(self, target)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _compute(self, nodes: Sequence[BaseNode], *, replace: bool) -> PrecomputeSummary:
        by_document: dict[str, dict[str, None]] = {}
        for node in nodes:
            shown = (self._shown or body)(node)
            texts = [shown] if isinstance(shown, str) else shown
            by_document.setdefault(document_of(node), {}).update((t, None) for text in texts if (t := text.strip()))
        documents = (Document(id, list(texts)) for id, texts in by_document.items())
        summary = self.engine.precompute(documents, replace=replace)
        self._versions().update((document_of(node), _version(node)) for node in nodes)
        if (waiting := deletions()) is not None and replace:
            for id in by_document:
                waiting.came_back(self, id)
        return summary

    def _was_deleted(self, node: BaseNode) -> bool:
        waiting = deletions()
        return waiting is not None and waiting.holds(self, document_of(node))

    def _versions(self) -> dict[str, str]:
        with _versions_lock:
            return _VERSIONS.setdefault(self.engine, {})


def _version(node: BaseNode) -> str:
    source = node.source_node
    return (source.hash if source is not None else None) or node.hash


def _name(shown: Shown) -> str:
    named = getattr(shown, "__qualname__", "<")
    return f"{id(shown)}" if "<" in named else f"{shown.__module__}.{named}"


def _sum(first: PrecomputeSummary, second: PrecomputeSummary) -> PrecomputeSummary:
    if not second.documents:
        return first
    names = [f.name for f in fields(first) if f.name != "lead_ins"]
    return replace(second, **{name: getattr(first, name) + getattr(second, name) for name in names})
