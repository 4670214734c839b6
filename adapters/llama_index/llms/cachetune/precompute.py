"""Filling the KV store while LlamaIndex ingests documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.ingestion.pipeline import run_transformations
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.storage.docstore import BaseDocumentStore

from cachetune_rag import CacheTune, Document, PrecomputeSummary
from cachetune_rag.async_calls import call_in_thread

_DELETERS = ("delete_ref_doc", "delete_document")


class KVPrecompute(TransformComponent):
    """Computes and stores the KV of the nodes that pass through, as retrieval will show them. Put it after the splitter.

    The nodes of one source document are one document in the store, under its `ref_doc_id`: ingesting it again replaces
    them. A node of no document goes by its own id.

    An `IngestionPipeline` caches what its transformations return and skips them the next time. Model, tokenizer, dtype,
    tenant and store are part of this one's key there, so another model or store computes anew; KV that was evicted
    meanwhile is computed again by the first request that misses it, or for all by `rebuild`.
    """

    namespace: str = Field(description="What the KV was computed with: model, tokenizer, dtype, lead-ins, tenant.")
    store: str = Field(description="Where the KV is.")
    _engine: CacheTune | None = PrivateAttr(default=None)
    _summary: PrecomputeSummary | None = PrivateAttr(default=None)

    def __init__(self, engine: CacheTune):
        path = engine.store.path
        fields: dict[str, Any] = {
            "namespace": engine.namespace.digest,
            # KV in memory is gone with its engine, and so must be what says it was computed.
            "store": f"memory-{id(engine.store)}" if path is None else str(path.resolve()),
        }
        super().__init__(**fields)
        self._engine = engine

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

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Precompute the nodes' chunks; returns the nodes as they came."""
        by_document: dict[str, list[str]] = {}
        for node in nodes:
            by_document.setdefault(node.ref_doc_id or node.node_id, []).extend(_shown(node))
        self._summary = self.engine.precompute(Document(id, chunks) for id, chunks in by_document.items())
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same in another thread."""
        return await call_in_thread(self, nodes, **kwargs)

    def rebuild(
        self, docstore: BaseDocumentStore, transformations: Sequence[TransformComponent] = ()
    ) -> PrecomputeSummary:
        """Compute what is missing for everything in a docstore, whatever caches say.

        Args:
            docstore: an index's (it holds nodes), or a pipeline's (it holds whole documents: give the transformations
                that split them, such as the pipeline's other ones).
            transformations: run on the docstore's content first.
        """
        nodes = run_transformations(list(docstore.docs.values()), [t for t in transformations if t is not self])
        self(nodes)
        assert self._summary is not None
        return self._summary

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Free the KV of a document that was deleted; bytes freed. Unknown documents are none."""
        return self.engine.remove(ref_doc_id, missing_ok=True)

    def follow(self, *targets: Any) -> None:
        """Free KV whenever one of these indexes or docstores deletes a document.

        Args:
            targets: an index (`index.delete_ref_doc` then frees KV too), or the docstore of a pipeline.
        """
        for target in targets:
            names = [f"{a}{name}" for name in _DELETERS for a in ("", "a") if hasattr(target, f"{a}{name}")]
            if not names:
                raise TypeError(f"{type(target).__name__} deletes no documents: give an index or a docstore.")
            for name in names:
                setattr(target, name, self._following(getattr(target, name), name.startswith("a")))

    def _following(self, delete: Callable[..., Any], is_async: bool) -> Callable[..., Any]:
        @functools.wraps(delete)
        def deleting(doc_id: str, *args: Any, **kwargs: Any) -> Any:
            result = delete(doc_id, *args, **kwargs)
            self.delete_ref_doc(doc_id)
            return result

        @functools.wraps(delete)
        async def adeleting(doc_id: str, *args: Any, **kwargs: Any) -> Any:
            result = await delete(doc_id, *args, **kwargs)
            await call_in_thread(self.delete_ref_doc, doc_id)
            return result

        return adeleting if is_async else deleting


def _shown(node: BaseNode) -> Iterable[str]:
    """The texts by which prompts may show a node: as it is, and stripped, as the compact synthesizer has it."""
    text = node.get_content(metadata_mode=MetadataMode.LLM)
    return dict.fromkeys(t for t in (text, text.strip()) if t)
