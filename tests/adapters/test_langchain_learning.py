"""Documents that LangChain retrieves are counted, stored if they are missing, and removed with their document."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from engines import EngineMaker, is_stored
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from cachetune_rag import CacheTune, Report
from langchain_cachetune import CacheTuneIndex, ChatCacheTune, chunk_block, collect_reports, create_cachetune_chain

STEPS = Document(id="steps", page_content="The lighthouse of Varnholm has 214 steps.", metadata={"source": "a.txt"})
BAKER = Document(id="baker", page_content="The baker opens at five in the morning.", metadata={"source": "b.txt"})
VAULT = Document(
    id="vault", page_content="The code of the vault is 7741, says the porter.", metadata={"source": "c.txt"}
)
HEADED = PromptTemplate.from_template("[{source}]\n{page_content}\n--")


class Fixed(BaseRetriever):
    """Returns its documents, whatever is asked."""

    found: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return list(self.found)


def joined(documents: Sequence[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def drop_in(model: ChatCacheTune, found: Sequence[Document]) -> Runnable[Any, str]:
    """A stock chain: only its model is ours."""
    prompt = ChatPromptTemplate.from_template("Answer from this:\n{context}\n\nQuestion: {question}")
    asked: Any = {"context": Fixed(found=list(found)) | joined, "question": RunnablePassthrough()}
    return asked | prompt | model | StrOutputParser()


def ask(chain: Runnable[Any, Any], inputs: Any = "how many?") -> Report:
    with collect_reports() as reports:
        chain.invoke(inputs)
    (report,) = reports
    return report


def texts(engine: CacheTune) -> set[str]:
    return {text for _, text, _ in engine.store.texts(namespace=engine.namespace)}


def test_what_a_stock_chain_retrieves_is_counted_learnt_and_found_next_time(engine: CacheTune) -> None:
    chain = drop_in(ChatCacheTune(engine=engine, max_tokens=2), [STEPS, BAKER])
    size = len(STEPS.page_content) + len(BAKER.page_content)
    first = ask(chain)
    assert (first.retrieved, first.missed) == (size, size)
    assert engine.flush()
    second = ask(chain)
    assert (second.retrieved, second.missed, second.recognised) == (size, 0, 2)
    assert second.reused + second.recomputed == size
    assert {info.id for info in engine.documents()} == {"steps", "baker"}


async def test_the_same_under_asyncio(engine: CacheTune) -> None:
    chain = drop_in(ChatCacheTune(engine=engine, max_tokens=2), [STEPS])
    with collect_reports() as reports:
        await chain.ainvoke("how many?")
        assert engine.flush()
        async for _ in chain.astream("how many?"):
            pass
    assert [report.missed for report in reports] == [len(STEPS.page_content), 0]
    assert [report.retrieved for report in reports] == [len(STEPS.page_content)] * 2


async def test_a_retriever_called_by_hand_counts_for_what_follows(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=2, learn=False)
    found = Fixed(found=[STEPS]).invoke("?")
    model.invoke(f"Use: {joined(found)}")
    assert model.last_report.retrieved == len(STEPS.page_content)
    found = await Fixed(found=[BAKER]).ainvoke("?")
    await model.ainvoke(f"Use: {joined(found)}")
    assert model.last_report.retrieved == len(BAKER.page_content)


async def test_requests_side_by_side_count_only_their_own(engine: CacheTune) -> None:
    documents = [
        Document(id=f"d{i}", page_content=f"Station {i} of the {'long ' * i}coastal railway is at mile {i * 17}.")
        for i in range(6)
    ]
    model = ChatCacheTune(engine=engine, max_tokens=1, learn=False)

    async def one(i: int) -> int:
        with collect_reports() as reports:
            await drop_in(model, [documents[i]]).ainvoke("where?")
        return reports[0].retrieved

    assert await asyncio.gather(*(one(i) for i in range(6))) == [len(document.page_content) for document in documents]


def test_a_request_that_shows_nothing_of_what_was_retrieved_counts_none_of_it(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=2)
    Fixed(found=[STEPS]).invoke("?")
    model.invoke("Make this question better: how many?")
    assert model.last_report.retrieved == 0
    model.invoke(f"> {STEPS.page_content.upper()}")
    assert model.last_report.retrieved == len(STEPS.page_content), "shown, though not as it is stored"
    assert model.last_report.missed == 0, "so there is nothing to learn"


def test_learning_can_be_switched_off_and_needs_an_id(engine: CacheTune) -> None:
    ask(drop_in(ChatCacheTune(engine=engine, max_tokens=2, learn=False), [STEPS]))
    nameless = Document(page_content=BAKER.page_content)
    report = ask(drop_in(ChatCacheTune(engine=engine, max_tokens=2), [nameless]))
    assert report.retrieved == len(BAKER.page_content)
    assert engine.flush()
    assert texts(engine) == set()


def test_an_answer_that_learns_is_what_full_prefill_says(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=8, ratio=1.0)
    chain = drop_in(model, [STEPS, BAKER])
    assert (
        chain.invoke("?")
        == chain.invoke("?")
        == drop_in(ChatCacheTune(engine=engine, max_tokens=8, generate_kwargs={"reuse": False}), [STEPS, BAKER]).invoke(
            "?"
        )
    )


@pytest.mark.parametrize("way", ["chain", "drop-in"])
@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["added past the index", "added before the index"])
async def test_deleting_a_document_deletes_what_requests_stored_of_it(
    engines: EngineMaker, way: str, waiting: bool, before: bool
) -> None:
    engine = engines(None)
    vectorstore = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    if before:
        vectorstore.add_documents([VAULT, STEPS])
    index = CacheTuneIndex(engine=engine, vectorstore=vectorstore)
    if not before:
        vectorstore.add_documents([VAULT, STEPS])
    found = vectorstore.similarity_search("code", k=2)
    if way == "chain":
        create_cachetune_chain(engine, max_tokens=2).invoke({"context": found, "input": "code?"})
    else:
        drop_in(ChatCacheTune(engine=engine, max_tokens=2), found).invoke("code?")
    if not waiting:
        assert engine.flush()
        assert texts(engine) == {VAULT.page_content, STEPS.page_content}
    if waiting:
        await index.adelete(["vault"])
    else:
        index.delete(["vault"])
    assert engine.flush()
    assert texts(engine) == {STEPS.page_content}
    assert [info.id for info in engine.documents()] == ["steps"]


def test_deleting_finds_what_was_stored_without_a_document(engine: CacheTune) -> None:
    """Some vector stores return documents without their ids."""
    index = CacheTuneIndex(engine=engine, vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)))
    index.vectorstore.add_documents([VAULT])
    nameless = Document(page_content=VAULT.page_content)
    create_cachetune_chain(engine, max_tokens=2).invoke({"context": [nameless], "input": "?"})
    index.delete(["vault"])
    assert engine.flush()
    assert texts(engine) == set()


def test_a_header_is_text_before_the_chunk(engine: CacheTune) -> None:
    index = CacheTuneIndex(
        engine=engine, vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), document_prompt=HEADED
    )
    index.upsert([STEPS, BAKER])
    assert texts(engine) == {STEPS.page_content, BAKER.page_content}
    size = len(STEPS.page_content) + len(BAKER.page_content)
    inputs = {"context": [STEPS, BAKER], "input": "?"}
    for document_prompt in (HEADED, None, PromptTemplate.from_template("<doc>{page_content}</doc>")):
        report = ask(create_cachetune_chain(engine, document_prompt=document_prompt, max_tokens=2), inputs)
        assert (report.missed, report.reused + report.recomputed) == (0, size)
    report = ask(drop_in(ChatCacheTune(engine=engine, max_tokens=2), [STEPS, BAKER]))
    assert (report.missed, report.recognised) == (0, 2)
    assert engine.flush()
    assert len(texts(engine)) == 2, "each is stored once"


def test_a_header_shows_the_prompt_that_a_stock_chain_makes(engine: CacheTune) -> None:
    shown = "[a.txt]\nThe lighthouse of Varnholm has 214 steps.\n--"
    chain = create_cachetune_chain(
        engine, ChatPromptTemplate.from_template("{context}\n?"), document_prompt=HEADED, max_tokens=8, ratio=1.0
    )
    assert (
        chain.invoke({"context": [STEPS]})
        == ChatCacheTune(engine=engine, max_tokens=8, ratio=1.0).invoke(f"{shown}\n?").content
    )


def test_a_document_prompt_that_changes_the_content_is_the_chunk(engine: CacheTune) -> None:
    loud = PromptTemplate.from_template("{{ page_content | upper }}", template_format="jinja2")
    index = CacheTuneIndex(
        engine=engine, vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), document_prompt=loud
    )
    index.upsert([STEPS])
    assert is_stored(engine, STEPS.page_content.upper())
    report = ask(create_cachetune_chain(engine, document_prompt=loud, max_tokens=2), {"context": [STEPS], "input": "?"})
    assert report.missed == 0


def test_what_was_deleted_since_it_was_retrieved_is_not_learned_again(engine: CacheTune) -> None:
    index = CacheTuneIndex(engine=engine, vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)))
    index.add_documents([STEPS])
    model = ChatCacheTune(engine=engine, max_tokens=2)
    found = Fixed(found=[STEPS]).invoke("?")
    chain = create_cachetune_chain(model, ChatPromptTemplate.from_template("{context}\n{question}"))
    message = chunk_block(STEPS.page_content, "steps")
    index.delete(["steps"])
    model.invoke(f"Use: {joined(found)}")
    assert model.last_report.retrieved == len(STEPS.page_content)
    model.invoke([HumanMessage([message])])
    assert engine.flush()
    assert (texts(engine), engine.documents()) == (set(), [])
    chain.invoke({"context": [STEPS], "question": "how many?"})  # somebody says anew that it is there
    assert engine.flush()
    assert texts(engine) == {STEPS.page_content}
