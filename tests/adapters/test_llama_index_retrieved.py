"""Retrieved nodes that LlamaIndex's usual pipelines show are found in the store, or stored, and each response reports it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from engines import is_stored
from llama_index.core import Document, PromptTemplate, VectorStoreIndex, get_response_synthesizer
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import ContextRelevancyEvaluator, FaithfulnessEvaluator, RelevancyEvaluator
from llama_index.core.indices.base import BaseIndex
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.query_engine import CitationQueryEngine, CustomQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import QueryEngineTool, ToolMetadata

from cachetune_rag import CacheTune, Report
from llama_index.llms.cachetune import CacheTuneLLM, CacheTuneSynthesizer, KVPrecompute

TEXTS = [
    "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler, and it has 214 steps of grey stone.",
    "The ferry to Varnholm leaves every morning at nine from the harbour of Tessin, on Sundays an hour later.",
    "The bakery on the quay bakes five kinds of bread, and the oldest of its ovens was lit in the year 1902.",
]
QUESTION = "How many steps?"


def index_of(*transformations: Any) -> BaseIndex[Any]:
    """An index whose nodes all have a header of metadata, as those of a directory reader have."""
    documents = [
        Document(text=text, doc_id=f"d{i}", metadata={"file_path": f"/d{i}.txt"}) for i, text in enumerate(TEXTS)
    ]
    return VectorStoreIndex.from_documents(
        documents, transformations=[*(transformations or [SentenceSplitter()])], embed_model=MockEmbedding(4)
    )


@pytest.fixture
def llm(engine: CacheTune) -> CacheTuneLLM:
    return CacheTuneLLM(engine, max_new_tokens=3)


def report_of(llm: CacheTuneLLM) -> Report:
    assert llm.last_report is not None
    return llm.last_report


def check_all_found(report: Report, texts: list[str] = TEXTS) -> None:
    tokens = sum(map(len, texts))  # a token a byte
    assert report.missed == 0
    assert report.reused + report.recomputed == tokens
    assert report.retrieved == tokens


def test_bodies_are_found_whatever_is_shown_around_them(engine: CacheTune, llm: CacheTuneLLM) -> None:
    index = index_of(SentenceSplitter(), KVPrecompute(engine))
    response = index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    check_all_found(report_of(llm))
    CitationQueryEngine.from_args(index, llm=llm, similarity_top_k=3).query(QUESTION)
    check_all_found(report_of(llm))
    RelevancyEvaluator(llm=llm).evaluate_response(query=QUESTION, response=response)
    check_all_found(report_of(llm))
    llm.complete("Use:\n" + "\n\n".join(n.node.get_content() for n in response.source_nodes))
    assert report_of(llm).recognised == 3
    assert {info.id for info in engine.documents()} == {"d0", "d1", "d2"}


@pytest.mark.parametrize("mode", [ResponseMode.COMPACT, ResponseMode.REFINE, ResponseMode.TREE_SUMMARIZE])
def test_an_index_made_without_the_store_heals_by_being_asked(
    engine: CacheTune, llm: CacheTuneLLM, mode: ResponseMode
) -> None:
    index = index_of()
    query_engine = index.as_query_engine(llm=llm, similarity_top_k=3, response_mode=mode)
    query_engine.query(QUESTION)
    engine.flush()
    response = query_engine.query(QUESTION)
    reports = response.metadata["cachetune_reports"]
    assert sum(r["retrieved"] for r in reports) == sum(map(len, TEXTS)), "each node counts where it is shown"
    assert all(r["missed"] == 0 and r["found_share"] == 1 for r in reports)
    # ... and it belongs to its documents.
    KVPrecompute(engine).follow(index)
    for i, text in enumerate(TEXTS):
        assert is_stored(engine, text)
        index.delete_ref_doc(f"d{i}")
        assert not is_stored(engine, text)
    assert list(engine.store.texts(namespace=engine.namespace)) == []


def test_learning_can_be_switched_off(engine: CacheTune) -> None:
    llm = CacheTuneLLM(engine, max_new_tokens=3, learn_retrieved=False)
    index_of().as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    engine.flush()
    assert engine.documents() == []
    assert (report_of(llm).retrieved, report_of(llm).found_share) == (sum(map(len, TEXTS)), 0)


@pytest.mark.parametrize("make", [get_response_synthesizer, CacheTuneSynthesizer])
def test_nodes_that_belong_to_no_document_are_not_learned(engine: CacheTune, llm: CacheTuneLLM, make: Any) -> None:
    """A sub-question engine makes nodes of answers: deleting a document would never reach them."""
    node = TextNode(text=TEXTS[0])
    make(llm=llm).synthesize(QUESTION, [NodeWithScore(node=node)])
    engine.flush()
    assert engine.documents() == []
    assert list(engine.store.texts(namespace=engine.namespace)) == []
    assert report_of(llm).retrieved == len(TEXTS[0])
    KVPrecompute(engine)([node])
    make(llm=llm).synthesize(QUESTION, [NodeWithScore(node=node)])
    check_all_found(report_of(llm), TEXTS[:1])


@pytest.mark.parametrize("evaluator", [FaithfulnessEvaluator, RelevancyEvaluator, ContextRelevancyEvaluator])
async def test_what_an_evaluator_judges_is_not_learned(engine: CacheTune, llm: CacheTuneLLM, evaluator: Any) -> None:
    """It puts the contexts into an index of its own, under document ids that nobody will delete."""
    await evaluator(llm=llm).aevaluate(query=QUESTION, response="214", contexts=TEXTS)
    assert report_of(llm).retrieved == sum(map(len, TEXTS))
    engine.flush()
    assert engine.documents() == []
    assert list(engine.store.texts(namespace=engine.namespace)) == []
    await index_of().as_query_engine(llm=llm, similarity_top_k=3).aquery(QUESTION)
    engine.flush()
    await evaluator(llm=llm).aevaluate(query=QUESTION, response="214", contexts=TEXTS)
    check_all_found(report_of(llm))
    assert {info.id for info in engine.documents()} == {"d0", "d1", "d2"}


class TwoQuestions(BaseQuestionGenerator):
    """Asks the same tool twice."""

    def generate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return [SubQuestion(sub_question=f"{query.query_str} ({i})", tool_name="lights") for i in range(2)]

    async def agenerate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return self.generate(tools, query)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("use_async", [False, True])
def test_answers_to_sub_questions_were_not_retrieved(engine: CacheTune, llm: CacheTuneLLM, use_async: bool) -> None:
    """The last prompt shows these answers as nodes; no store can have them."""
    tool = QueryEngineTool.from_defaults(index_of().as_query_engine(llm=llm, similarity_top_k=1), name="lights")
    query_engine = SubQuestionQueryEngine.from_defaults(
        [tool], llm=llm, question_gen=TwoQuestions(), use_async=use_async, verbose=False
    )
    reports = query_engine.query(QUESTION).metadata["cachetune_reports"]
    assert [report["retrieved"] > 0 for report in reports] == [True, True, False]


def test_a_retriever_of_ones_own_is_told(engine: CacheTune, llm: CacheTuneLLM) -> None:
    nodes = index_of().as_retriever(similarity_top_k=3).retrieve(QUESTION)
    llm.complete(f"{nodes[0].text}\n{QUESTION}")
    assert report_of(llm).retrieved == 0, "what was retrieved for nobody knows whom isn't this request's"
    llm.complete(f"{nodes[0].text}\n{QUESTION}", retrieved=nodes)
    assert report_of(llm).retrieved == len(nodes[0].text), "what the prompt doesn't show can't be found in it"
    engine.flush()
    llm.chat([ChatMessage(content=nodes[0].text)], retrieved=nodes)
    check_all_found(report_of(llm), [nodes[0].text])


async def test_side_by_side_each_response_has_its_own_reports(engine: CacheTune, llm: CacheTuneLLM) -> None:
    engines = [
        index_of().as_query_engine(llm=llm, similarity_top_k=k, response_synthesizer=synthesizer)
        for k in (1, 2)
        for synthesizer in (None, CacheTuneSynthesizer(llm))
    ]

    async def ask(query_engine: Any) -> tuple[Any, Report]:
        return await query_engine.aquery(QUESTION), report_of(llm)

    for response, last in await asyncio.gather(*map(ask, engines)):
        shown = sum(len(n.node.get_content()) for n in response.source_nodes)
        assert [r["retrieved"] for r in response.metadata["cachetune_reports"]] == [shown]
        assert response.metadata["cachetune_reports"] == [last.as_dict()]


async def test_a_streams_report_comes_with_its_end(engine: CacheTune, llm: CacheTuneLLM) -> None:
    query_engine = index_of().as_query_engine(llm=llm, similarity_top_k=2, streaming=True)
    response = query_engine.query(QUESTION)
    assert "".join(response.response_gen)
    assert response.metadata["cachetune_reports"] == [report_of(llm).as_dict()]
    aresponse: Any = await query_engine.aquery(QUESTION)
    assert "".join([piece async for piece in aresponse.async_response_gen()])
    assert len(aresponse.metadata["cachetune_reports"]) == 1


async def test_a_stream_closed_early_has_its_report(engine: CacheTune, llm: CacheTuneLLM) -> None:
    query_engine = index_of().as_query_engine(llm=llm, similarity_top_k=2, streaming=True)
    response: Any = query_engine.query(QUESTION)
    next(response.response_gen)
    response.response_gen.close()
    (report,) = response.metadata["cachetune_reports"]
    assert report["retrieved"] == sum(len(n.node.get_content()) for n in response.source_nodes)
    aresponse: Any = await query_engine.aquery(QUESTION)
    await anext(aresponse.async_response_gen())
    await aresponse.response_gen.aclose()
    assert len(aresponse.metadata["cachetune_reports"]) == 1


async def test_a_chat_engines_stream_has_its_reports(engine: CacheTune, llm: CacheTuneLLM) -> None:
    chat_engine = index_of().as_chat_engine(chat_mode="context", llm=llm, similarity_top_k=2)
    response: Any = chat_engine.stream_chat(QUESTION)
    assert "".join(response.response_gen)
    assert response.metadata["cachetune_reports"] == [report_of(llm).as_dict()]
    aresponse: Any = await chat_engine.astream_chat(QUESTION)
    assert "".join([piece async for piece in aresponse.async_response_gen()])
    assert len(aresponse.metadata["cachetune_reports"]) == 1


def test_sentence_windows(engine: CacheTune, llm: CacheTuneLLM) -> None:
    """The text that is shown is stored once."""
    kv = KVPrecompute(engine, shown=lambda node: node.metadata["window"])
    text = " ".join(f"Sentence number {i} says that {i} times {i} is {i * i}." for i in range(7))
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    index = VectorStoreIndex.from_documents(
        [Document(text=text, doc_id="d")], transformations=[parser, kv], embed_model=MockEmbedding(4)
    )
    assert kv.last_summary is not None
    assert kv.last_summary.chunks == 7
    response = index.as_query_engine(
        llm=llm,
        similarity_top_k=1,
        node_postprocessors=[MetadataReplacementPostProcessor(target_metadata_key="window")],
    ).query(QUESTION)
    check_all_found(report_of(llm), [n.node.get_content().strip() for n in response.source_nodes])


@pytest.mark.parametrize("window_size", [1, 3])
def test_windows_that_overlap_count_each(engine: CacheTune, llm: CacheTuneLLM, window_size: int) -> None:
    """All windows of a text are shown, so each sentence stands in several of them, and the first windows consist of the second."""
    text = " ".join(f"Sentence number {i} says that {i} times {i} is {i * i}." for i in range(7))
    parser = SentenceWindowNodeParser.from_defaults(window_size=window_size)
    index = VectorStoreIndex.from_documents(
        [Document(text=text, doc_id="d")], transformations=[parser], embed_model=MockEmbedding(4)
    )
    windows = [node.metadata["window"].strip() for node in index.docstore.docs.values()]
    engine.precompute([windows[3]])
    settings: dict[str, Any] = {
        "llm": CacheTuneLLM(engine, max_new_tokens=3, learn_retrieved=False),
        "similarity_top_k": 7,
        "node_postprocessors": [MetadataReplacementPostProcessor(target_metadata_key="window")],
    }
    for query_engine in (
        index.as_query_engine(**settings),
        CitationQueryEngine.from_args(index, **settings),  # puts "Source 1:" before each
    ):
        (report,) = query_engine.query(QUESTION).metadata["cachetune_reports"]
        assert report["retrieved"] == sum(map(len, windows))
        assert report["found_share"] == (report["reused"] + report["recomputed"]) / sum(map(len, windows)) < 1


def test_function_mappings_see_what_they_map(engine: CacheTune, llm: CacheTuneLLM) -> None:
    seen: list[str] = []

    def quoted(**values: Any) -> str:
        seen.append(values["context_str"])
        return "\n".join(f"> {line}" for line in values["context_str"].split("\n"))

    template = PromptTemplate("{context_str}\n{query_str}", function_mappings={"context_str": quoted})
    nodes = [NodeWithScore(node=node) for node in index_of().docstore.docs.values()]
    for item in nodes:
        item.node.metadata = {}
    CacheTuneSynthesizer(llm, text_qa_template=template).synthesize(QUESTION, nodes)
    assert seen == ["\n\n".join(TEXTS)]
    assert report_of(llm).missed == sum(map(len, TEXTS)), "the nodes' texts stand in what it made of them"
    engine.flush()
    get_response_synthesizer(llm=llm, text_qa_template=template).synthesize(QUESTION, nodes)
    check_all_found(report_of(llm))


def test_what_no_document_is_named_for_is_not_stored(engine: CacheTune, llm: CacheTuneLLM) -> None:
    CacheTuneSynthesizer(llm).get_response(QUESTION, TEXTS)
    engine.flush()
    assert list(engine.store.texts(namespace=engine.namespace)) == []


def test_what_is_deleted_while_its_question_is_open_is_not_learned_again(engine: CacheTune, llm: CacheTuneLLM) -> None:
    """An agent's run retrieves, somebody deletes, and a later step of the same run shows it."""
    index = index_of()
    memory = KVPrecompute(engine)
    memory.follow(index)

    class Deleting(CustomQueryEngine):
        """Retrieves, and shows what was found after its deletion."""

        def custom_query(self, query_str: str) -> str:
            nodes = index.as_retriever(similarity_top_k=3).retrieve(query_str)
            index.delete_ref_doc("d0")
            return llm.complete("Use:\n" + "\n\n".join(node.node.get_content() for node in nodes)).text

    Deleting().query(QUESTION)
    assert report_of(llm).retrieved == sum(map(len, TEXTS))
    assert engine.flush()
    assert {info.id for info in engine.documents()} == {"d1", "d2"}
    assert not is_stored(engine, TEXTS[0])
