"""LangChain end to end: real model, real documents, real embeddings, faiss."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import EngineMaker, check_reuse, chunk_tokens, is_stored
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_faiss import FaissStore

from cachetune_rag import CacheTune
from cachetune_rag.text.prompts.prompt import INSTRUCTIONS
from langchain_cachetune import CacheTuneIndex, ChatCacheTune, create_cachetune_chain

pytestmark = pytest.mark.real_model

QUESTION = "What does the nonlocal statement do?"
PROMPT = ChatPromptTemplate.from_messages([("human", INSTRUCTIONS + "\n\n{context}\n\nQuestion: {input}")])
TOKENS = 6


def passages(documents: dict[str, str], *names: str) -> list[Document]:
    """Documents cut at blank lines into passages of a few hundred characters."""
    made: list[Document] = []
    for name in names:
        text = ""
        for paragraph in documents[name][:900].split("\n\n"):
            text = f"{text}\n\n{paragraph}".strip()
            if len(text) > 180:
                made.append(Document(page_content=text, metadata={"source": name}))
                text = ""
    return made


class Pipeline:
    def __init__(self, engine: CacheTune, documents: list[Document], embed: Callable[[list[str]], Any]):
        self.engine = engine
        self.index = CacheTuneIndex(engine=engine, vectorstore=FaissStore(embed), k=3)
        self.records = InMemoryRecordManager("tests")
        self.records.create_schema()
        self.sync(documents)
        self.model = ChatCacheTune(engine=engine, max_tokens=TOKENS)

    def sync(self, documents: list[Document], cleanup: Any = "full") -> Any:
        return index(documents, self.records, self.index, cleanup=cleanup, source_id_key="source", key_encoder="sha256")

    def found(self, count: int = 3) -> list[Document]:
        return self.index.invoke(QUESTION, k=count)

    def explicit(self) -> Runnable[Any, Any]:
        retriever = RunnableLambda(lambda inputs: self.index.invoke(inputs["input"]))
        return RunnablePassthrough.assign(context=retriever).assign(answer=create_cachetune_chain(self.model, PROMPT))

    def drop_in(self) -> Runnable[Any, Any]:
        """LangChain's usual chain: documents are joined into the prompt's text for an LLM and a parser. Only the LLM is replaced."""
        joined = RunnablePassthrough.assign(
            context=lambda inputs: "\n\n".join(d.page_content for d in inputs["context"])
        )
        retriever = RunnableLambda(lambda inputs: self.index.invoke(inputs["input"]))
        answer = joined | PROMPT | self.model | StrOutputParser()
        return RunnablePassthrough.assign(context=retriever).assign(answer=answer)


def texts(documents: list[Document]) -> list[str]:
    return [document.page_content for document in documents]


_references: dict[tuple[str, ...], str] = {}


def reference(engine: CacheTune, chunks: list[str]) -> str:
    """The engine's answer from the chunks, computed once for each order of them."""
    if tuple(chunks) not in _references:
        _references[tuple(chunks)] = engine.generate(QUESTION, chunks, max_new_tokens=TOKENS).text
    return _references[tuple(chunks)]


def check(pipeline: Pipeline, chain: Runnable[Any, Any]) -> str:
    result = chain.invoke({"input": QUESTION})
    report = pipeline.model.last_report
    chunks = texts(result["context"])
    assert len(chunks) >= 2
    check_reuse(report, chunk_tokens(pipeline.engine, chunks))
    assert result["answer"] == reference(pipeline.engine, chunks)
    return str(result["answer"])


@pytest.fixture(scope="module")
def some(documents: dict[str, str]) -> list[Document]:
    return passages(documents, "nonlocal", "global", "del")


@pytest.fixture(scope="module")
def filled(
    smollm2: tuple[Any, Any],
    some: list[Document],
    embed: Callable[[list[str]], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A store with the KV of the documents, to be copied rather than computed for every test."""
    folder = tmp_path_factory.mktemp("filled") / "kv"
    with CacheTune(*smollm2, folder) as engine:
        Pipeline(engine, some, embed)
    return folder


@pytest.fixture
def pipeline(engines: EngineMaker, filled: Path, some: list[Document], embed: Callable[[list[str]], Any]) -> Pipeline:
    return Pipeline(engines.on_copy(filled), some, embed)


def test_drop_in_and_explicit(pipeline: Pipeline) -> None:
    dropped = check(pipeline, pipeline.drop_in())
    assert pipeline.model.last_report is not None
    assert pipeline.model.last_report.recognised == 3
    assert check(pipeline, pipeline.explicit()) == dropped
    assert pipeline.model.last_report.recognised == 0


def test_stream_batch_and_metadata(pipeline: Pipeline) -> None:
    found = pipeline.found()
    expected = reference(pipeline.engine, texts(found))
    chain = create_cachetune_chain(pipeline.engine, PROMPT, max_tokens=TOKENS)
    inputs = {"context": found, "input": QUESTION}
    pieces = list(chain.stream(inputs))
    assert "".join(pieces) == expected
    assert len(pieces) > 3
    assert chain.batch([inputs, inputs]) == [expected] * 2
    message = pipeline.model.invoke(PROMPT.invoke({**inputs, "context": "\n\n".join(texts(found))}))
    check_reuse(message.response_metadata["report"], chunk_tokens(pipeline.engine, texts(found)))
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_token_details"]["cache_read"] > 100


async def test_async(pipeline: Pipeline) -> None:
    found = pipeline.found()
    expected = reference(pipeline.engine, texts(found))
    chain = create_cachetune_chain(pipeline.engine, PROMPT, max_tokens=TOKENS)
    inputs = {"context": found, "input": QUESTION}
    assert await chain.ainvoke(inputs) == expected
    assert "".join([piece async for piece in chain.astream(inputs)]) == expected


def test_shuffled_order(pipeline: Pipeline) -> None:
    chain = create_cachetune_chain(pipeline.model, PROMPT)
    for seed in range(2):
        found = pipeline.found()
        random.Random(seed).shuffle(found)
        answer = chain.invoke({"context": found, "input": QUESTION})
        check_reuse(pipeline.model.last_report, chunk_tokens(pipeline.engine, texts(found)))
        assert answer == reference(pipeline.engine, texts(found))


@pytest.mark.parametrize("cleanup", ["full", "incremental"])
def test_after_deleting_a_document(pipeline: Pipeline, documents: dict[str, str], cleanup: str) -> None:
    before = texts(pipeline.found(20))
    kept = passages(documents, "nonlocal", "global", "del")
    gone = kept.pop(0)
    if cleanup == "incremental":  # only the sources at hand are looked at
        kept = [document for document in kept if document.metadata["source"] == "nonlocal"]
    result = pipeline.sync(kept, cleanup)
    assert result["num_deleted"] == 1
    assert not is_stored(pipeline.engine, gone.page_content)
    assert all(is_stored(pipeline.engine, text) for text in before if text != gone.page_content)
    check(pipeline, pipeline.drop_in())
    check(pipeline, pipeline.explicit())


@pytest.mark.parametrize("way", ["drop_in", "explicit"])
def test_after_eviction(
    engines: EngineMaker, filled: Path, some: list[Document], embed: Callable[[list[str]], Any], way: str
) -> None:
    engine = engines.on_copy(filled, host_budget=0, disk_budget="2560KiB")
    pipeline = Pipeline(engine, some, embed)
    chain = getattr(pipeline, way)()
    expected = check(pipeline, chain)
    engine.precompute("An unrelated document. " * 80)  # so long that everything else must go
    chunks = texts(pipeline.found())
    assert not any(is_stored(engine, text) for text in chunks)
    missing = chain.invoke({"input": QUESTION})["answer"]
    report = pipeline.model.last_report
    assert report is not None
    assert report.missed == chunk_tokens(engine, chunks), "computed in the same request"
    assert missing == engine.generate(QUESTION, chunks, max_new_tokens=TOKENS, reuse=False).text
    assert engine.flush()
    assert all(is_stored(engine, text) for text in chunks), "and stored again"
    assert check(pipeline, chain) == expected


def test_two_engines_on_one_store(
    engines: EngineMaker, documents: dict[str, str], embed: Callable[[list[str]], Any]
) -> None:
    writer, reader = engines(), engines()
    assert ChatCacheTune(engine=reader, max_tokens=4).invoke("Hello"), "has read the store while it was empty"
    pipeline = Pipeline(writer, passages(documents, "nonlocal"), embed)
    expected = check(pipeline, pipeline.drop_in())
    pipeline.engine, pipeline.model = reader, ChatCacheTune(engine=reader, max_tokens=TOKENS)
    assert check(pipeline, pipeline.drop_in()) == expected
    assert check(pipeline, pipeline.explicit()) == expected


def test_ten_threads(pipeline: Pipeline) -> None:
    found = pipeline.found(3)
    orders = [found, found[::-1]]
    expected = [reference(pipeline.engine, texts(order)) for order in orders]
    chain = create_cachetune_chain(pipeline.model, PROMPT)
    wrong: list[Any] = []

    def ask(i: int) -> None:
        try:
            order = orders[i % 2]
            if i % 4 < 2:
                answer = chain.invoke({"context": order, "input": QUESTION})
            else:
                prompt = PROMPT.invoke({"context": "\n\n".join(texts(order)), "input": QUESTION})
                message = pipeline.model.invoke(prompt)
                check_reuse(message.response_metadata["report"], chunk_tokens(pipeline.engine, texts(order)))
                answer = message.content
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
