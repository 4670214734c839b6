"""LlamaIndex adapter, on a tiny model: what every LLM, synthesizer and transformation of the framework must do."""

from __future__ import annotations

import asyncio
import pickle
import threading
from typing import Any

import pytest
import tiny
from engines import EngineMaker, is_stored
from llama_index.core import Document, PromptTemplate, Settings, get_response_synthesizer
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode, TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore

from cachetune_rag import CacheTune, Chunk, ConfigError, PromptError, PromptTooLongError, Text
from llama_index.llms.cachetune import CacheTuneLLM, CacheTuneSynthesizer, ChunkBlock, KVPrecompute

FIRST = "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler."
SECOND = "The ferry to Varnholm leaves every morning at nine from the harbour of Tessin."


@pytest.fixture
def llm(engine: CacheTune) -> CacheTuneLLM:
    return CacheTuneLLM(engine, max_new_tokens=6)


def node(text: str, **options: Any) -> NodeWithScore:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc")}
    return NodeWithScore(node=TextNode(text=text, relationships=source, **options), score=1.0)


def test_is_what_the_framework_asks_for() -> None:
    assert issubclass(CacheTuneLLM, CustomLLM)
    assert issubclass(CacheTuneLLM, LLM)
    assert issubclass(CacheTuneSynthesizer, BaseSynthesizer)
    assert issubclass(KVPrecompute, TransformComponent)
    assert CacheTuneLLM.class_name() == "CacheTuneLLM"


def test_metadata_comes_from_the_model(engines: EngineMaker) -> None:
    metadata = CacheTuneLLM(engines(), model="tiny", max_new_tokens=7).metadata
    assert (metadata.context_window, metadata.num_output) == (8192, 7)
    assert metadata.is_chat_model
    assert metadata.model_name == "tiny"
    plain = engines("plain", tokenizer=tiny.tokenizer(chat=False))
    assert not CacheTuneLLM(plain).metadata.is_chat_model


def test_all_eight_forms_say_the_same(llm: CacheTuneLLM) -> None:
    messages = [ChatMessage(content="Say something.")]
    expected = llm.complete("Say something.").text
    assert expected

    async def several() -> list[str]:
        stream = [r async for r in await llm.astream_complete("Say something.")]
        chat = [r async for r in await llm.astream_chat(messages)]
        return [
            (await llm.acomplete("Say something.")).text,
            (await llm.achat(messages)).message.content or "",
            stream[-1].text,
            "".join(r.delta or "" for r in stream),
            chat[-1].message.content or "",
            "".join(r.delta or "" for r in chat),
        ]

    stream = list(llm.stream_complete("Say something."))
    chat = list(llm.stream_chat(messages))
    said = [
        llm.chat(messages).message.content,
        stream[-1].text,
        "".join(r.delta or "" for r in stream),
        chat[-1].message.content,
        "".join(r.delta or "" for r in chat),
        *asyncio.run(several()),
    ]
    assert said == [expected] * len(said)


def test_report_and_counts(llm: CacheTuneLLM, engine: CacheTune) -> None:
    engine.precompute([FIRST, SECOND])
    response = llm.complete(f"Read: {SECOND} {FIRST} What now?")
    assert llm.last_report is not None
    assert response.raw is not None
    assert response.raw["report"] == llm.last_report.as_dict()
    assert llm.last_report.recognised == 2
    assert llm.last_report.reused + llm.last_report.recomputed == len(FIRST) + len(SECOND)
    assert response.raw["usage"]["prompt_tokens"] == llm.last_report.prompt_tokens
    assert response.additional_kwargs["completion_tokens"] == 6
    assert response.raw["finish_reason"] == "length"
    first = next(llm.stream_chat([ChatMessage(content=FIRST)]))
    assert first.raw["report"]["recognised"] == 1


def test_a_prompt_is_read_again_where_the_model_is_not_sure(llm: CacheTuneLLM, engine: CacheTune) -> None:
    engine.precompute([FIRST, SECOND])
    prompt = f"Read: {SECOND} {FIRST} What now?"
    whole = llm.complete(prompt, reuse=False)
    sure = CacheTuneLLM(engine, max_new_tokens=6, min_sure=1.0)
    for response in (sure.complete(prompt), llm.complete(prompt, min_sure=1.0), list(sure.stream_complete(prompt))[-1]):
        assert response.raw["report"]["read_again"]["token"] == 0
        assert response.text == whole.text
    assert sure.last_report is not None
    assert sure.last_report.read_again is not None
    assert llm.complete(prompt).raw["report"]["read_again"] is None


def test_evicted_kv_is_recognised_after_a_restart_and_comes_back(engines: EngineMaker) -> None:
    budgets = {"host_budget": 0, "disk_budget": "120KiB"}
    with engines(**budgets) as engine:
        engine.precompute(FIRST)
        engine.precompute("Something long enough to need the room of all else. " * 4)
        assert not is_stored(engine, FIRST)
    llm = CacheTuneLLM(engines(**budgets), max_new_tokens=2)
    llm.complete(f"Read: {FIRST}")
    assert llm.last_report is not None
    assert (llm.last_report.recognised, llm.last_report.missed) == (1, len(FIRST))
    llm.engine.flush()
    llm.complete(f"Read: {FIRST}")
    assert llm.last_report.reused + llm.last_report.recomputed == len(FIRST)


def test_formatted_prompts_and_messages(llm: CacheTuneLLM, engine: CacheTune) -> None:
    asked = []
    stream = engine.stream
    engine.stream = lambda **options: asked.append(options["prompt"]) or stream(**options)  # type: ignore
    llm.complete("Hello", formatted=True)
    assert asked[-1] == engine.prompts.build_text(["Hello"])
    llm.complete("Hello")
    assert asked[-1] == engine.prompts.build_messages([{"role": "user", "content": "Hello"}])
    llm.chat(
        [
            ChatMessage(role=MessageRole.DEVELOPER, content="Be brief."),
            ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="a"), TextBlock(text="b")]),
            ChatMessage(role=MessageRole.MODEL, content="c"),
            ChatMessage(
                role=MessageRole.USER, blocks=[TextBlock(text="x"), ChunkBlock(text="chunk"), TextBlock(text="y")]
            ),
        ]
    )
    assert asked[-1] == engine.prompts.build_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": [Text("x"), Chunk("chunk"), Text("y")]},
        ]
    )
    with pytest.raises(PromptError, match="ImageBlock"):
        llm.chat([ChatMessage(blocks=[ImageBlock(url="http://x.org/a.png")])])


def test_settings_of_instance_and_request(engine: CacheTune) -> None:
    llm = CacheTuneLLM(engine, max_new_tokens=4, generate_kwargs={"do_sample": True, "seed": 3}, ratio=0.5)
    assert llm.complete("Hello").additional_kwargs["completion_tokens"] == 4
    assert llm.complete("Hello", max_tokens=2).additional_kwargs["completion_tokens"] == 2
    assert llm.complete("Hello", seed=3).text == llm.complete("Hello").text
    engine.precompute(FIRST)
    llm.complete(FIRST)
    assert llm.last_report is not None
    assert llm.last_report.ratio == 0.5
    llm.complete(FIRST, ratio=0.0, selector="none")
    assert llm.last_report.recomputed == 0
    with pytest.raises(ConfigError, match="ratio"):
        llm.complete("Hello", ratio=3)
    with pytest.raises(ConfigError, match=r"max_kl=0.1 needs a prediction"):
        CacheTuneLLM(engine, max_kl=0.1).complete("Hello")


def test_parameters_survive_serialisation(smollm_free_model: str, engines: EngineMaker) -> None:
    llm = CacheTuneLLM(model=smollm_free_model, store=str(engines.folder / "kv"), max_new_tokens=3, ratio=0.25)
    data = llm.to_dict()
    assert "engine" not in data
    again = CacheTuneLLM.from_dict(data)
    assert again.to_dict() == data
    assert again.complete("Hello").text == llm.complete("Hello").text
    assert pickle.loads(pickle.dumps(llm)).complete("Hello").text == llm.complete("Hello").text
    again.engine.close()
    llm.engine.close()
    with pytest.raises(ValueError, match="model="):
        CacheTuneLLM()


@pytest.fixture
def smollm_free_model(engines: EngineMaker) -> str:
    folder = engines.folder / "model"
    engines.model.save_pretrained(folder)
    engines.tokenizer.save_pretrained(folder)
    return str(folder)


def test_callbacks(llm: CacheTuneLLM) -> None:
    debug, counter = LlamaDebugHandler(print_trace_on_end=False), TokenCountingHandler()
    llm.callback_manager = CallbackManager([debug, counter])
    llm.chat([ChatMessage(content="Hello")])
    list(llm.stream_complete("Hello"))
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 2
    assert llm.last_report is not None
    assert counter.llm_token_counts[0].prompt_token_count == llm.last_report.prompt_tokens


async def test_the_event_loop_keeps_turning(llm: CacheTuneLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, turned = threading.Event(), threading.Event()
    begin = llm.engine.stream

    def waits_for_the_loop(**options: Any) -> Any:
        def wait() -> None:
            entered.set()
            assert turned.wait(60), "the event loop stood still while the model ran"

        stream = begin(**options)
        stream.looked_up = wait
        return stream

    monkeypatch.setattr(llm.engine, "stream", waits_for_the_loop)
    for call in (
        lambda: llm.acomplete("Hello"),
        lambda: llm.achat([ChatMessage(content="Hello")]),
        lambda: _drain(llm.astream_chat([ChatMessage(content="Hello")])),
        lambda: _drain(llm.astream_complete("Hello")),
    ):
        entered.clear()
        turned.clear()
        task = asyncio.ensure_future(call())
        while not entered.is_set() and not task.done():
            await asyncio.sleep(0.001)
        turned.set()
        await task
        assert entered.is_set()


async def _drain(stream: Any) -> list[Any]:
    return [response async for response in await stream]


async def test_a_stream_given_up_or_cancelled_leaves_the_engine_usable(llm: CacheTuneLLM) -> None:
    stream = await llm.astream_complete("Hello", max_new_tokens=200)
    async for _ in stream:
        break
    await stream.aclose()
    task = asyncio.ensure_future(_drain(llm.astream_complete("Hello", max_new_tokens=2000)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await llm.acomplete("Hello")).text == llm.complete("Hello").text


# -- synthesizer ------------------------------------------------------------------------------------------------------


def test_nodes_are_chunks_behind_their_metadata(llm: CacheTuneLLM, engine: CacheTune) -> None:
    nodes = [node(FIRST, metadata={"page": 3}), node(SECOND, metadata={"page": 4})]
    response = CacheTuneSynthesizer(llm).synthesize("Who built it?", nodes)
    engine.flush()
    assert is_stored(engine, FIRST), "computed on the miss and stored, without its header"
    assert not is_stored(engine, f"page: 3\n\n{FIRST}")
    assert [info.id for info in engine.documents()] == ["doc"]
    assert len(response.source_nodes) == 2
    CacheTuneSynthesizer(llm).synthesize("Who built it?", nodes[::-1])
    assert llm.last_report is not None
    assert llm.last_report.missed == 0
    assert llm.last_report.reused > 100


def test_the_prompt_is_the_stock_one(llm: CacheTuneLLM, engine: CacheTune) -> None:
    """Same ids as the compact synthesizer's prompt once its chunks are recognised."""
    engine.precompute([FIRST, SECOND])
    nodes = [node(FIRST), node(SECOND)]
    stock = get_response_synthesizer(llm=llm).synthesize("Who built it?", nodes)
    first = llm.last_report
    assert str(CacheTuneSynthesizer(llm).synthesize("Who built it?", nodes)) == str(stock)
    assert first is not None
    assert llm.last_report is not None
    assert (first.recognised, llm.last_report.recognised) == (2, 0)
    assert first.prompt_tokens == llm.last_report.prompt_tokens


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_is_built_once(engines: EngineMaker, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    """To see whether the nodes fit it has to be tokenised; that is what is answered then."""
    engine = engines(tokenizer=tiny.tokenizer(chat=chat))
    built: list[Any] = []
    for name in ("build_messages", "build_text", "build"):
        real = getattr(engine.prompts, name)
        monkeypatch.setattr(engine.prompts, name, lambda *a, real=real, **k: built.append(a) or real(*a, **k))
    llm = CacheTuneLLM(engine, max_new_tokens=3)
    assert str(CacheTuneSynthesizer(llm).synthesize("Who built it?", [node(FIRST), node(SECOND)]))
    assert len(built) == 1


def test_without_a_chat_template(engines: EngineMaker) -> None:
    engine = engines(tokenizer=tiny.tokenizer(chat=False))
    engine.precompute([FIRST, SECOND])
    llm = CacheTuneLLM(engine, max_new_tokens=5)
    nodes = [node(FIRST), node(SECOND)]
    stock = str(get_response_synthesizer(llm=llm).synthesize("Who built it?", nodes))
    for streaming in (False, True):
        response = CacheTuneSynthesizer(llm, streaming=streaming).synthesize("Who built it?", nodes)
        assert (str(response) if not streaming else "".join(response.response_gen)) == stock
    assert llm.last_report is not None
    assert llm.last_report.reused > 0
    assert llm.chat([ChatMessage(content="Hello")]).message.content


def test_prompts_get_and_update(llm: CacheTuneLLM) -> None:
    synthesizer = CacheTuneSynthesizer(llm)
    assert set(synthesizer.get_prompts()) == {"text_qa_template", "refine_template"}
    synthesizer.update_prompts(
        {"text_qa_template": PromptTemplate("Read {context_str} and say {query_str} in {style}.")}
    )
    synthesizer.get_response("it", [FIRST], style="verse")
    for wrong in ("No place for {query_str}", "{context_str} twice {context_str} {query_str}"):
        synthesizer.update_prompts({"text_qa_template": PromptTemplate(wrong)})
        with pytest.raises(PromptError, match="exactly one place"):
            synthesizer.get_response("it", [FIRST])


def test_more_nodes_than_fit_are_refined(engines: EngineMaker) -> None:
    engines.model = tiny.llama(max_positions=1800)
    llm = CacheTuneLLM(engines(), max_new_tokens=5)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm.callback_manager = CallbackManager([debug])
    nodes = [node(f"{i}. {FIRST * 5}") for i in range(4)]
    assert str(CacheTuneSynthesizer(llm).synthesize("Who?", nodes))
    assert 1 < len(debug.get_event_pairs(CBEventType.LLM)) <= 4
    assert asyncio.run(CacheTuneSynthesizer(llm).asynthesize("Who?", nodes)).source_nodes == nodes
    with pytest.raises(PromptTooLongError, match="smaller nodes"):
        CacheTuneSynthesizer(llm).synthesize("Who?", [node(FIRST * 30)])


def test_no_nodes_and_wrong_models(llm: CacheTuneLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(CacheTuneSynthesizer(llm, empty_response="Nothing.").synthesize("Who?", [])) == "Nothing."
    with pytest.raises(TypeError, match="MockLLM"):
        CacheTuneSynthesizer(MockLLM())  # type: ignore[arg-type]
    monkeypatch.setattr(Settings, "_llm", llm)
    assert llm.last_report is None
    assert str(CacheTuneSynthesizer().synthesize("Who?", [node(FIRST)]))
    assert llm.last_report is not None, "Settings.llm answers"


async def test_async_and_streaming_synthesis(llm: CacheTuneLLM) -> None:
    llm.engine.precompute([FIRST, SECOND])
    nodes = [node(FIRST), node(SECOND)]
    expected = str(CacheTuneSynthesizer(llm).synthesize("Who?", nodes))
    assert str(await CacheTuneSynthesizer(llm).asynthesize("Who?", nodes)) == expected
    response: Any = await CacheTuneSynthesizer(llm, streaming=True).asynthesize("Who?", nodes)
    assert "".join([piece async for piece in response.async_response_gen()]) == expected


def test_a_retriever_query_engine(llm: CacheTuneLLM) -> None:
    llm.engine.precompute([FIRST, SECOND])

    class Fixed(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            return [node(FIRST), node(SECOND)]

    engine = RetrieverQueryEngine.from_args(Fixed(), response_synthesizer=CacheTuneSynthesizer(llm), llm=llm)
    assert str(engine.query("Who?")) == str(CacheTuneSynthesizer(llm).get_response("Who?", [FIRST, SECOND]))


# -- precompute -------------------------------------------------------------------------------------------------------


def pipeline(kv: KVPrecompute, **options: Any) -> IngestionPipeline:
    return IngestionPipeline(transformations=[SentenceSplitter(chunk_size=40, chunk_overlap=0), kv], **options)


LONG = " ".join(f"Sentence number {i} says that {i} times {i} is {i * i}." for i in range(12))


def test_ingestion_precomputes_what_retrieval_shows(engine: CacheTune) -> None:
    kv = KVPrecompute(engine)
    nodes = pipeline(kv).run(documents=[Document(text=LONG, doc_id="doc", metadata={"title": "squares"})])
    assert len(nodes) > 2
    assert all(is_stored(engine, n.get_content()) for n in nodes)
    assert [info.id for info in engine.store.documents()] == ["doc"]
    assert kv.last_summary is not None
    assert kv.last_summary.chunks == len(nodes)


def test_the_pipelines_cache(engines: EngineMaker) -> None:
    cache, documents = IngestionCache(), [Document(text=LONG, doc_id="doc")]
    engine = engines()
    kv = KVPrecompute(engine)
    nodes = pipeline(kv, cache=cache).run(documents=documents)
    engine.remove("doc")
    pipeline(kv, cache=cache).run(documents=documents)
    assert not is_stored(engine, nodes[0].get_content(metadata_mode="llm")), "skipped by the pipeline's cache"
    # another store, or another model, is another key
    other = engines("other")
    pipeline(KVPrecompute(other), cache=cache).run(documents=documents)
    assert is_stored(other, nodes[0].get_content(metadata_mode="llm"))
    engines.model = tiny.llama(seed=5)
    changed = engines()
    pipeline(KVPrecompute(changed), cache=cache).run(documents=documents)
    assert is_stored(changed, nodes[0].get_content(metadata_mode="llm"))
    # what was lost comes back by a walk over the docstore
    docstore = SimpleDocumentStore()
    docstore.add_documents(nodes)
    assert kv.rebuild(docstore).chunks == len(nodes)
    assert is_stored(engine, nodes[0].get_content(metadata_mode="llm"))


def test_rebuild_from_a_pipelines_docstore(engines: EngineMaker) -> None:
    engine = engines()
    docstore = SimpleDocumentStore()
    made = pipeline(KVPrecompute(engine), docstore=docstore)
    nodes = made.run(documents=[Document(text=LONG, doc_id="doc")])
    again = KVPrecompute(engines("other"))
    assert again.rebuild(docstore, made.transformations[:1]).chunks == len(nodes)


def test_replacing_and_deleting_documents(engine: CacheTune) -> None:
    kv, docstore = KVPrecompute(engine), SimpleDocumentStore()
    kv.follow(docstore)
    made = pipeline(kv, docstore=docstore, docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE, vector_store=None)
    old = made.run(documents=[Document(text=LONG, doc_id="a"), Document(text=FIRST * 2, doc_id="b")])
    made.docstore_strategy = DocstoreStrategy.UPSERTS
    new = made.run(documents=[Document(text=SECOND * 3, doc_id="a")])
    assert not is_stored(engine, old[0].get_content(metadata_mode="llm"))
    assert is_stored(engine, new[0].get_content(metadata_mode="llm"))
    docstore.delete_document("b")
    assert [info.id for info in engine.store.documents()] == ["a"]
    assert kv.delete_ref_doc("a") > 0
    assert kv.delete_ref_doc("a") == 0
    with pytest.raises(TypeError, match="deletes no documents"):
        kv.follow(object())


async def test_async_ingestion_and_deletion(engine: CacheTune) -> None:
    kv, docstore = KVPrecompute(engine), SimpleDocumentStore()
    kv.follow(docstore)
    nodes = await pipeline(kv, docstore=docstore).arun(documents=[Document(text=LONG, doc_id="doc")])
    assert is_stored(engine, nodes[0].get_content(metadata_mode="llm"))
    await docstore.adelete_document("doc")
    assert not is_stored(engine, nodes[0].get_content(metadata_mode="llm"))


def test_whitespace_at_the_ends_of_a_node(llm: CacheTuneLLM, engine: CacheTune) -> None:
    """The compact synthesizer strips nodes, the explicit one doesn't: the stripped text stands in both."""
    padded = node(f"  {FIRST}  ")
    kv = KVPrecompute(engine)
    kv([padded.node])
    assert kv.last_summary is not None
    assert kv.last_summary.chunks == 1
    for synthesizer in (get_response_synthesizer(llm=llm), CacheTuneSynthesizer(llm)):
        synthesizer.synthesize("Who?", [padded])
        assert llm.last_report is not None
        assert llm.last_report.missed == 0
        assert llm.last_report.reused > 50


def test_worker_processes_are_refused_in_words(engine: CacheTune) -> None:
    copy = pickle.loads(pickle.dumps(KVPrecompute(engine)))
    with pytest.raises(RuntimeError, match="num_workers=None"):
        copy([TextNode(text=FIRST)])
