"""LlamaIndex end to end: real model, real documents, real embeddings, faiss."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import EngineMaker, check_reuse, chunk_tokens, is_stored
from llama_index.core import Document, PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index_faiss import FaissStore, LocalEmbedding

from cachetune_rag import CacheTune
from cachetune_rag.text.prompts.prompt import INSTRUCTIONS
from llama_index.llms.cachetune import CacheTuneLLM, CacheTuneSynthesizer, KVPrecompute

pytestmark = pytest.mark.real_model

QUESTION = "What does the nonlocal statement do?"
# The engine's own prompt in the framework's words, so that both are asked the same.
TEMPLATE = PromptTemplate(INSTRUCTIONS + "\n\n{context_str}\n\nQuestion: {query_str}")
TOKENS = 6


class Pipeline:
    """A stock pipeline: documents -> splitter -> KV -> embeddings -> faiss -> retriever."""

    def __init__(self, engine: CacheTune, documents: dict[str, str], embed: Callable[[list[str]], Any]):
        self.engine, self.kv, self.embedding = engine, KVPrecompute(engine), LocalEmbedding(embed)
        self.vectors = FaissStore()
        self.ingestion = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=70, chunk_overlap=0), self.kv, self.embedding],
            vector_store=self.vectors,
        )
        self.ingestion.run(documents=[Document(text=text, doc_id=name) for name, text in documents.items()])
        self.index = VectorStoreIndex.from_vector_store(self.vectors, embed_model=self.embedding)
        self.llm = CacheTuneLLM(engine, max_new_tokens=TOKENS)

    def nodes(self, count: int = 3) -> list[NodeWithScore]:
        return self.index.as_retriever(similarity_top_k=count).retrieve(QUESTION)

    def drop_in(self, **options: Any) -> RetrieverQueryEngine:
        return self.index.as_query_engine(llm=self.llm, similarity_top_k=3, text_qa_template=TEMPLATE, **options)

    def explicit(self, **options: Any) -> RetrieverQueryEngine:
        synthesizer = CacheTuneSynthesizer(self.llm, text_qa_template=TEMPLATE, **options)
        return RetrieverQueryEngine(self.index.as_retriever(similarity_top_k=3), response_synthesizer=synthesizer)


def texts(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]


_references: dict[tuple[str, ...], str] = {}


def reference(engine: CacheTune, chunks: list[str]) -> str:
    """What the engine says over the chunks, asked once for each order of them."""
    if tuple(chunks) not in _references:
        _references[tuple(chunks)] = engine.generate(QUESTION, chunks, max_new_tokens=TOKENS).text
    return _references[tuple(chunks)]


def check(pipeline: Pipeline, query_engine: RetrieverQueryEngine) -> str:
    """The query engine says what the engine says over the same chunks, and reuses their KV."""
    response = query_engine.query(QUESTION)
    report = pipeline.llm.last_report
    chunks = texts(response.source_nodes)
    assert len(chunks) >= 2
    check_reuse(report, chunk_tokens(pipeline.engine, chunks))
    assert str(response) == reference(pipeline.engine, chunks)
    return str(response)


@pytest.fixture(scope="module")
def some(documents: dict[str, str]) -> dict[str, str]:
    return {name: documents[name][:700] for name in ("nonlocal", "global", "del")}


@pytest.fixture(scope="module")
def filled(
    smollm2: tuple[Any, Any],
    some: dict[str, str],
    embed: Callable[[list[str]], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A store with the KV of the documents, to be copied rather than computed for every test."""
    folder = tmp_path_factory.mktemp("filled") / "kv"
    with CacheTune(*smollm2, folder) as engine:
        Pipeline(engine, some, embed)
    return folder


@pytest.fixture
def pipeline(engines: EngineMaker, filled: Path, some: dict[str, str], embed: Callable[[list[str]], Any]) -> Pipeline:
    return Pipeline(engines.on_copy(filled), some, embed)


def test_drop_in_and_explicit(pipeline: Pipeline) -> None:
    dropped = check(pipeline, pipeline.drop_in())
    assert pipeline.llm.last_report is not None
    assert pipeline.llm.last_report.recognised == 3
    assert check(pipeline, pipeline.explicit()) == dropped
    assert pipeline.llm.last_report.recognised == 0


def test_the_default_prompt_reuses_as_well(pipeline: Pipeline) -> None:
    """Nothing changed but the llm: the framework's own chat prompt, with a system message."""
    response = pipeline.index.as_query_engine(llm=pipeline.llm, similarity_top_k=3).query(QUESTION)
    check_reuse(pipeline.llm.last_report, chunk_tokens(pipeline.engine, texts(response.source_nodes)))
    first = pipeline.llm.last_report
    synthesizer = CacheTuneSynthesizer(pipeline.llm)
    assert str(synthesizer.synthesize(QUESTION, response.source_nodes)) == str(response)
    assert first is not None
    assert pipeline.llm.last_report is not None
    assert first.prompt_tokens == pipeline.llm.last_report.prompt_tokens


def test_streaming_and_async(pipeline: Pipeline) -> None:
    expected = check(pipeline, pipeline.explicit())
    for query_engine in (pipeline.drop_in(streaming=True), pipeline.explicit(streaming=True)):
        pieces = list(query_engine.query(QUESTION).response_gen)
        assert "".join(pieces) == expected
        assert len(pieces) > 3


async def test_async_queries(pipeline: Pipeline) -> None:
    expected = reference(pipeline.engine, texts(pipeline.nodes()))
    assert str(await pipeline.drop_in().aquery(QUESTION)) == expected
    response: Any = await pipeline.explicit(streaming=True).aquery(QUESTION)
    assert "".join([piece async for piece in response.async_response_gen()]) == expected


def test_shuffled_order(pipeline: Pipeline) -> None:
    synthesizer = CacheTuneSynthesizer(pipeline.llm, text_qa_template=TEMPLATE)
    for seed in range(2):
        nodes = pipeline.nodes()
        random.Random(seed).shuffle(nodes)
        text = str(synthesizer.synthesize(QUESTION, nodes))
        check_reuse(pipeline.llm.last_report, chunk_tokens(pipeline.engine, texts(nodes)))
        assert text == reference(pipeline.engine, texts(nodes))


def test_after_deleting_a_document(pipeline: Pipeline) -> None:
    gone = list(texts(pipeline.nodes(12)))
    pipeline.kv.follow(pipeline.index)
    pipeline.index.delete_ref_doc("nonlocal")
    left = texts(pipeline.nodes(12))
    assert 0 < len(left) < len(gone)
    assert not any(is_stored(pipeline.engine, text) for text in set(gone) - set(left))
    assert all(is_stored(pipeline.engine, text) for text in left)
    check(pipeline, pipeline.drop_in())
    check(pipeline, pipeline.explicit())


@pytest.mark.parametrize("way", ["drop_in", "explicit"])
def test_after_eviction(
    engines: EngineMaker, filled: Path, some: dict[str, str], embed: Callable[[list[str]], Any], way: str
) -> None:
    engine = engines.on_copy(filled, host_budget=0, disk_budget="2560KiB")
    pipeline = Pipeline(engine, some, embed)
    query_engine = getattr(pipeline, way)()
    expected = check(pipeline, query_engine)
    engine.precompute("An unrelated document. " * 80)  # so long that everything else must go
    chunks = texts(pipeline.nodes())
    assert not any(is_stored(engine, text) for text in chunks)
    missing = query_engine.query(QUESTION)
    report = pipeline.llm.last_report
    assert report is not None
    assert report.missed == chunk_tokens(engine, chunks), "computed in the same request"
    assert str(missing) == engine.generate(QUESTION, chunks, max_new_tokens=TOKENS, reuse=False).text
    assert engine.flush()
    assert all(is_stored(engine, text) for text in chunks), "and stored again"
    assert check(pipeline, query_engine) == expected


def test_two_engines_on_one_store(
    engines: EngineMaker, documents: dict[str, str], embed: Callable[[list[str]], Any]
) -> None:
    writer, reader = engines(), engines()
    assert str(CacheTuneLLM(reader, max_new_tokens=4).complete("Hello")), "has read the store while it was empty"
    pipeline = Pipeline(writer, {"nonlocal": documents["nonlocal"][:700]}, embed)
    expected = check(pipeline, pipeline.drop_in())
    pipeline.engine, pipeline.llm = reader, CacheTuneLLM(reader, max_new_tokens=TOKENS)
    assert check(pipeline, pipeline.drop_in()) == expected
    assert check(pipeline, pipeline.explicit()) == expected


def test_ten_threads(pipeline: Pipeline) -> None:
    nodes = pipeline.nodes(3)
    orders = [nodes, nodes[::-1]]
    expected = [reference(pipeline.engine, texts(order)) for order in orders]
    synthesizer = CacheTuneSynthesizer(pipeline.llm, text_qa_template=TEMPLATE)
    prompts = [TEMPLATE.format(context_str="\n\n".join(texts(order)), query_str=QUESTION) for order in orders]
    wrong: list[Any] = []

    def ask(i: int) -> None:
        try:
            if i % 4 < 2:
                answer = str(synthesizer.synthesize(QUESTION, orders[i % 2]))
            else:
                response = pipeline.llm.complete(prompts[i % 2])
                check_reuse(response.raw["report"], chunk_tokens(pipeline.engine, texts(nodes)))
                answer = response.text
            if answer != expected[i % 2]:
                wrong.append((i, answer))
        except Exception as error:
            wrong.append((i, error))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_chat_engine(pipeline: Pipeline) -> None:
    chat = pipeline.index.as_chat_engine(chat_mode="context", llm=pipeline.llm, similarity_top_k=3)
    assert str(chat.chat(QUESTION))
    report = pipeline.llm.last_report
    assert report is not None
    assert report.recognised == 3
    assert report.reused > 100
    assert "".join(chat.stream_chat("And what does del do?").response_gen)
    assert pipeline.llm.last_report is not None
    assert pipeline.llm.last_report.recognised == 3


def test_a_storage_context_keeps_the_documents_for_a_rebuild(pipeline: Pipeline, engines: EngineMaker) -> None:
    nodes = [n.node for n in pipeline.nodes(12)]
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    other = KVPrecompute(engines("other"))
    summary = other.rebuild(storage.docstore)
    assert summary.chunks == len(nodes)
    assert all(is_stored(other.engine, n.get_content(metadata_mode=MetadataMode.LLM)) for n in nodes)
    assert other.rebuild(storage.docstore).chunks == 0
