"""`CacheTuneIndex` as a vector store: LangChain's own suite, documents that were there before, and what prompts really show."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from engines import EngineMaker, is_stored
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.retrievers import BaseRetriever
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_faiss import FaissStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from cachetune_rag import CacheTune, ConfigError
from langchain_cachetune import CacheTuneIndex, collect_reports, create_cachetune_chain

DOCUMENTS = [
    Document(id=f"d{i}", page_content=f"Passage number {i} of the guide to the coast.", metadata={"source": f"{i % 2}"})
    for i in range(5)
]
EMBEDDING = DeterministicFakeEmbedding(size=8)


class TestSuite(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, engine: CacheTune) -> VectorStore:
        return CacheTuneIndex(engine=engine, vectorstore=InMemoryVectorStore(self.get_embeddings()))


def made(engine: CacheTune, vectorstore: VectorStore | None = None, **options: Any) -> CacheTuneIndex:
    return CacheTuneIndex(engine=engine, vectorstore=vectorstore or InMemoryVectorStore(EMBEDDING), **options)


def stored(engine: CacheTune) -> set[str]:
    return {text for _, text, _ in engine.store.texts(namespace=engine.namespace)}


TEXTS = {document.page_content for document in DOCUMENTS}


@pytest.mark.parametrize(
    "source",
    [
        lambda vs: None,
        lambda vs: vs,
        lambda vs: vs.as_retriever(),
        lambda vs: vs.get_by_ids(list(vs.store)),
        lambda vs: (document for document in vs.get_by_ids(list(vs.store))),
    ],
    ids=["its own", "a vector store", "a retriever", "documents", "a generator"],
)
def test_documents_that_were_there_before_are_taken_in(engine: CacheTune, source: Callable[[Any], Any]) -> None:
    vectorstore, records = InMemoryVectorStore(EMBEDDING), InMemoryRecordManager("tests")
    records.create_schema()
    options: Any = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
    assert index(DOCUMENTS, records, vectorstore, **options)["num_added"] == 5
    destination = made(engine, vectorstore)
    assert index(DOCUMENTS, records, destination, **options)["num_skipped"] == 5
    assert stored(engine) == set(), "the record manager knows them all"
    summary = destination.rebuild(source(vectorstore))
    assert summary.chunks == 5
    assert stored(engine) == TEXTS
    assert destination.rebuild().chunks == 0, "what is stored isn't computed again"
    assert len(vectorstore.store) == 5
    assert index(DOCUMENTS[1:], records, destination, **options)["num_deleted"] == 1
    assert DOCUMENTS[0].page_content not in stored(engine)


def test_a_vector_store_that_cannot_list_its_documents_needs_their_ids(
    engine: CacheTune, embed: Callable[..., Any]
) -> None:
    vectorstore = FaissStore(embed)
    vectorstore.add_documents(DOCUMENTS, ids=[document.id for document in DOCUMENTS])
    destination = made(engine, vectorstore)
    with pytest.raises(ConfigError, match="list_keys"):
        destination.rebuild()
    assert destination.rebuild(ids=[document.id for document in DOCUMENTS]).chunks == 5
    for wrong in ("text", 5, ["text"]):
        with pytest.raises(ConfigError, match="source"):
            destination.rebuild(wrong)


class Chroma(VectorStore):
    """Lists its documents as Chroma does."""

    def get(self, **kwargs: Any) -> dict[str, Any]:
        return {
            "ids": [document.id for document in DOCUMENTS],
            "documents": [document.page_content for document in DOCUMENTS],
            "metadatas": [None for _ in DOCUMENTS],
        }

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return DOCUMENTS[:k]

    @classmethod
    def from_texts(cls, *args: Any, **kwargs: Any) -> Chroma:
        raise NotImplementedError


class Parents(BaseRetriever):
    """The shape of `ParentDocumentRetriever`: it searches pieces and returns what they are pieces of."""

    vectorstore: VectorStore
    docstore: InMemoryStore

    def add(self, parents: list[Document]) -> None:
        for parent in parents:
            halves = parent.page_content[:20], parent.page_content[20:]
            self.vectorstore.add_documents(
                [Document(page_content=half, metadata={"doc_id": parent.metadata["key"]}) for half in halves]
            )
            self.docstore.mset([(parent.metadata["key"], parent)])

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        found = self.vectorstore.similarity_search(query, k=4)
        keys = dict.fromkeys(document.metadata["doc_id"] for document in found)
        return [document for document in self.docstore.mget(list(keys)) if document is not None]


def test_the_ways_in_which_others_list_their_documents(engine: CacheTune) -> None:
    class Faiss(FaissStore):
        @property
        def index_to_docstore_id(self) -> dict[int, str]:
            return dict(enumerate(document.id for document in DOCUMENTS))

    faiss = Faiss(lambda texts: __import__("numpy").ones((len(texts), 256), "float32"))
    faiss.add_documents(DOCUMENTS, ids=[document.id for document in DOCUMENTS])
    for vectorstore in (Chroma(), faiss, made(engine, InMemoryVectorStore.from_documents(DOCUMENTS, EMBEDDING))):
        for document in DOCUMENTS:
            engine.remove(document.id, missing_ok=True)
        assert made(engine).rebuild(vectorstore).chunks == 5


def test_parents_are_stored_and_their_pieces_are_not(engine: CacheTune) -> None:
    children = made(engine, shown=lambda piece: [])
    retriever = Parents(vectorstore=children, docstore=InMemoryStore())
    parents = [Document(page_content=d.page_content * 2, metadata={"key": f"p{i}"}) for i, d in enumerate(DOCUMENTS)]
    retriever.add(parents)
    assert stored(engine) == set()
    children.rebuild(retriever)
    assert stored(engine) == {parent.page_content for parent in parents}
    assert {info.id for info in engine.documents() if info.chunks} == {f"p{i}" for i in range(5)}
    chain = create_cachetune_chain(engine, max_tokens=2, document_separator="\n\n")
    with collect_reports() as reports:
        chain.invoke({"context": retriever.invoke("?"), "input": "?"})
    assert reports[0].missed == 0
    assert reports[0].reused + reports[0].recomputed == reports[0].retrieved > 0


def test_what_a_prompt_shows_of_a_document_is_said_by_shown(engine: CacheTune) -> None:
    windowed = made(engine, shown=lambda document: document.metadata["window"])
    windowed.add_documents([Document(id="a", page_content="One.", metadata={"window": "Zero. One. Two."})])
    assert stored(engine) == {"Zero. One. Two."}
    windowed.delete(["a"])
    assert stored(engine) == set()


async def test_changing_one_document_computes_one(engine: CacheTune) -> None:
    destination = made(engine)
    destination.upsert(DOCUMENTS)
    before = engine.stats().store.disk.chunks
    changed = [*DOCUMENTS[:4], Document(id="d4", page_content="Passage number 4, new.")]
    computed: list[Any] = []
    precompute = engine.precompute
    engine.precompute = lambda documents, **k: computed.append(precompute(documents, **k)) or computed[-1]
    await destination.aupsert(changed)
    assert [summary.chunks for summary in computed] == [1]
    assert engine.stats().store.disk.chunks == before
    assert not is_stored(engine, DOCUMENTS[4].page_content)


def test_it_stands_where_a_vector_store_or_a_retriever_can(engine: CacheTune) -> None:
    destination = CacheTuneIndex.from_texts(
        ["One passage.", "Another."], EMBEDDING, [{"n": 1}, {"n": 2}], engine=engine
    )
    assert stored(engine) == {"One passage.", "Another."}
    assert len(destination.as_retriever(search_kwargs={"k": 1}).invoke("passage")) == 1
    assert len(destination.as_retriever(search_type="mmr").invoke("passage")) == 2
    assert len(destination.invoke("passage")) == 2
    assert destination.embeddings is EMBEDDING
    with pytest.raises(ConfigError, match="engine="):
        CacheTuneIndex.from_texts(["One"], EMBEDDING)
    with pytest.raises(ConfigError, match="2 texts and 1 metadatas"):
        destination.add_texts(["a", "b"], [{}])


def test_an_index_over_documents_without_kv_says_so(engines: EngineMaker, caplog: pytest.LogCaptureFixture) -> None:
    engine = engines()
    vectorstore = InMemoryVectorStore.from_documents(DOCUMENTS, EMBEDDING)
    with caplog.at_level(logging.WARNING):
        destination = made(engine, vectorstore)
    assert "rebuild()" in caplog.text
    destination.rebuild()
    caplog.clear()
    made(engine, vectorstore)
    made(engine)
    assert caplog.text == ""
