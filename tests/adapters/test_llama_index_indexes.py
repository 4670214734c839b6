"""Existing and changing indexes: KV is stored for inserted nodes, freed for deleted ones, and kept for unchanged ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from engines import EngineMaker, is_stored
from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.bridge.pydantic import Field
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from cachetune_rag import CacheTune, ConfigError
from llama_index.llms.cachetune import KVPrecompute

EMBED = MockEmbedding(4)
PARTS = [f"Part {i} of the report says that {i} times {i} is {i * i}, and that this never changes." for i in range(6)]


class ByLine(TransformComponent):
    """A node a line."""

    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        splitter = SentenceSplitter(chunk_size=10_000)
        made: list[BaseNode] = []
        for node in nodes:
            for line in node.get_content().split("\n"):
                part = splitter.get_nodes_from_documents([node])[0]
                part.set_content(line)
                made.append(part)
        return made


def report(*parts: str) -> Document:
    return Document(text="\n".join(parts), doc_id="report")


def stored(engine: CacheTune) -> set[str]:
    return {text for _, text, _ in engine.store.texts(namespace=engine.namespace)}


@pytest.fixture
def kv(engine: CacheTune) -> KVPrecompute:
    return KVPrecompute(engine)


@pytest.mark.parametrize("follow", [False, True])
def test_an_upsert_computes_what_changed_and_frees_what_is_gone(
    engine: CacheTune, kv: KVPrecompute, follow: bool
) -> None:
    pipeline = IngestionPipeline(
        transformations=[ByLine(), kv, EMBED],
        docstore=SimpleDocumentStore(),
        vector_store=SimpleVectorStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    if follow:
        kv.follow(pipeline.docstore)
    pipeline.run(documents=[report(*PARTS[:4])])
    pipeline.run(documents=[report(*PARTS[:3], PARTS[5])])
    assert kv.last_summary is not None
    assert (kv.last_summary.chunks, kv.last_summary.skipped) == (1, 3)
    assert stored(engine) == {*PARTS[:3], PARTS[5]}
    # Back to the first version: the pipeline's cache has its nodes, and nothing passes through.
    pipeline.run(documents=[report(*PARTS[:4])])
    if follow:
        assert stored(engine) == set(PARTS[:4])
        pipeline.run(documents=[Document(text=PARTS[4], doc_id="other")])
        assert stored(engine) == {PARTS[4]}, "deleted, and it didn't come back"


def test_a_run_that_fails_frees_what_it_deleted(engine: CacheTune, kv: KVPrecompute) -> None:
    class Fails(TransformComponent):
        def __call__(self, nodes: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

    docstore = SimpleDocumentStore()
    kv.follow(docstore)
    options: dict[str, Any] = {
        "docstore": docstore,
        "vector_store": SimpleVectorStore(),
        "docstore_strategy": DocstoreStrategy.UPSERTS,
    }
    IngestionPipeline(transformations=[ByLine(), kv, EMBED], **options).run(documents=[report(*PARTS[:2])])
    with pytest.raises(RuntimeError):
        IngestionPipeline(transformations=[Fails(), kv], **options).run(documents=[report(PARTS[3])])
    assert stored(engine) == set()


def test_two_runs_over_one_document_add_up_and_a_new_version_replaces_it(engine: CacheTune, kv: KVPrecompute) -> None:
    first = ByLine()([report(*PARTS[:4])])
    kv(first[:2])
    KVPrecompute(engine)(first[2:])
    assert stored(engine) == set(PARTS[:4])
    assert [len(info.chunks) for info in engine.documents()] == [4]
    kv(ByLine()([report(*PARTS[2:5])]))
    assert stored(engine) == set(PARTS[2:5])


def test_a_loaded_index_that_is_followed(engine: CacheTune, kv: KVPrecompute, tmp_path: Path, monkeypatch: Any) -> None:
    """Its only transformations are those of the settings."""
    monkeypatch.setattr(Settings, "_embed_model", EMBED)
    monkeypatch.setattr(Settings, "_transformations", [ByLine()])
    made = VectorStoreIndex.from_documents([report(*PARTS[:2])])
    made.storage_context.persist(str(tmp_path))
    index: Any = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path)))
    assert kv.rebuild(index).chunks == 2
    kv.follow(index)
    index.insert(Document(text=PARTS[3], doc_id="other"))
    assert stored(engine) == {*PARTS[:2], PARTS[3]}
    assert index.refresh_ref_docs([report(PARTS[0], PARTS[4])]) == [True]
    assert kv.last_summary is not None
    assert (kv.last_summary.chunks, kv.last_summary.skipped) == (1, 1)
    assert stored(engine) == {PARTS[0], PARTS[4], PARTS[3]}
    index.delete_ref_doc("other", delete_from_docstore=True)
    assert stored(engine) == {PARTS[0], PARTS[4]}


async def test_asynchronous_changes(engine: CacheTune, kv: KVPrecompute) -> None:
    index = VectorStoreIndex.from_documents([report(*PARTS[:2])], transformations=[ByLine()], embed_model=EMBED)
    kv.follow(index)
    await index.ainsert(Document(text=PARTS[3], doc_id="other"))
    await index.aupdate_ref_doc(Document(text=PARTS[4], doc_id="other"))
    assert stored(engine) == {PARTS[4]}
    await index.adelete_ref_doc("other")
    assert stored(engine) == set()


class TextStore(SimpleVectorStore):
    """Like most external vector stores, it keeps the texts, so the docstore stays empty."""

    stores_text: bool = True
    kept: list[Any] = Field(default_factory=list)

    def add(self, nodes: Any, **kwargs: Any) -> list[str]:
        self.kept = [*self.kept, *nodes]
        return super().add(nodes, **kwargs)

    def get_nodes(self, node_ids: Any = None, filters: Any = None) -> list[BaseNode]:
        return list(self.kept)


def test_rebuilding_from_an_external_vector_store(engines: EngineMaker, caplog: pytest.LogCaptureFixture) -> None:
    storage = StorageContext.from_defaults(vector_store=TextStore())
    index = VectorStoreIndex.from_documents(
        [report(*PARTS[:3])], storage_context=storage, transformations=[ByLine()], embed_model=EMBED
    )
    for i, source in enumerate((index, index.vector_store, index.vector_store.get_nodes())):
        kv = KVPrecompute(engines(f"kv{i}"))
        assert kv.rebuild(source).chunks == 3
        assert kv.rebuild(source).chunks == 0
        assert [info.id for info in kv.engine.documents()] == ["report"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert kv.rebuild(index.docstore).documents == 0
    assert "vector store" in caplog.text


def test_rebuilding_from_a_retriever_takes_questions(engine: CacheTune, kv: KVPrecompute) -> None:
    index = VectorStoreIndex.from_documents([report(*PARTS[:3])], transformations=[ByLine()], embed_model=EMBED)
    retriever = index.as_retriever(similarity_top_k=2)
    with pytest.raises(ConfigError, match="queries="):
        kv.rebuild(retriever)
    assert kv.rebuild(retriever, queries=["Which?"]).chunks == 2


def test_sources_that_cant_say_what_they_hold(kv: KVPrecompute) -> None:
    store: BasePydanticVectorStore = SimpleVectorStore()
    with pytest.raises(ConfigError, match="queries="):
        kv.rebuild(store)
    with pytest.raises(ConfigError, match="give an index"):
        kv.rebuild("kv-store")  # type: ignore[arg-type]


def test_a_node_of_its_own_goes_with_it(engine: CacheTune, kv: KVPrecompute) -> None:
    index = VectorStoreIndex([], embed_model=EMBED)
    kv.follow(index)
    (node,) = SentenceSplitter().get_nodes_from_documents([Document(text=PARTS[0])])
    node.relationships = {}
    index.insert_nodes([node])
    assert is_stored(engine, PARTS[0])
    index.delete_ref_doc(node.node_id)
    assert not is_stored(engine, PARTS[0])
