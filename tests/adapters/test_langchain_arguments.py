"""Arguments of the LangChain adapter are accepted under their usual names, and refused when they are given, not at a request."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import EngineMaker
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from refused import REFUSED
from transformers import GenerationConfig

from cachetune_rag import CacheTune, CacheTuneError, ConfigError
from langchain_cachetune import CacheTuneIndex, ChatCacheTune, collect_reports, create_cachetune_chain

UNKNOWN = {
    "rato": "ratio",
    "temprature": "temperature",
    "max_token": "max_tokens",
    "top_pp": "top_p",
}


@pytest.mark.parametrize("name", UNKNOWN)
async def test_an_unknown_argument_is_refused_wherever_it_is_given(engine: CacheTune, name: str) -> None:
    near = f"did you mean '{UNKNOWN[name]}'"
    with pytest.raises(ValueError, match=near):
        ChatCacheTune(engine=engine, **{name: 1})
    with pytest.raises(ConfigError, match=near):
        create_cachetune_chain(engine, **{name: 1})
    model = ChatCacheTune(engine=engine, max_tokens=2)
    for ask in (model.invoke, lambda *a, **k: list(model.stream(*a, **k)), model.bind(**{name: 1}).invoke):
        with pytest.raises(ConfigError, match=near):
            ask("hi", **{name: 1})
    with pytest.raises(ConfigError, match=near):
        await model.ainvoke("hi", **{name: 1})
    with pytest.raises(ConfigError, match=near):
        model.bind_tools([], **{name: 1})


def test_an_unknown_argument_of_the_chain_or_the_index_is_refused(engine: CacheTune) -> None:
    with pytest.raises(ConfigError, match="did you mean 'document_prompt'"):
        create_cachetune_chain(engine, document_promt=None)
    with pytest.raises(ValueError, match="did you mean 'search_kwargs'"):
        CacheTuneIndex(
            engine=engine, vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=4)), search_kwarg={}
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 15},
        {"max_kl": -1.0},
        {"min_sure": 1.5},
        {"min_top1": 0.9, "selector": "frequency"},
        {"selector": "frequncy"},
        {"generate_kwargs": {"temperture": 0.3}},
        {"generate_kwargs": {"top_p": 7}},
        {"top_p": 7},
        {"top_p": 0.5, "generate_kwargs": {"top_p": 0.5}},
        {"max_tokens": 3, "max_new_tokens": 4},
        {"engine_kwargs": {"tennant": "a"}},
        {"temperature": -1},
        {"base_url": "http://localhost"},
    ],
    ids=str,
)
def test_what_no_request_could_use_is_refused_at_construction(engine: CacheTune, wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=next(iter(wrong.get("generate_kwargs") or wrong.get("engine_kwargs") or wrong))
    ):
        ChatCacheTune(engine=engine, **wrong)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_no_number_is_made_of_what_a_request_would_be_refused_for(engine: CacheTune, name: str, value: Any) -> None:
    for given in ({name: value}, {"generate_kwargs": {name: value}}):
        with pytest.raises(ValueError, match=f"{name} is "):
            ChatCacheTune(engine=engine, **given)
        with pytest.raises(ValueError, match=f"{name} is "):
            ChatCacheTune(model="nowhere", **given)


def test_values_of_other_arguments_are_taken_as_they_are_or_not_at_all(engine: CacheTune) -> None:
    for name, value in (
        ("max_tokens", True),
        ("max_new_tokens", "3"),
        ("temperature", True),
        ("timeout", "3"),
        ("learn", "no"),
        ("streaming", 1),
        ("generate_kwargs", {"reuse": "no"}),
    ):
        with pytest.raises(ValueError, match=r"valid|reuse is"):
            ChatCacheTune(engine=engine, **{name: value})
    with pytest.raises(ValueError, match="min_sure stands in generate_kwargs as well"):
        ChatCacheTune(engine=engine, min_sure=0.5, generate_kwargs={"min_sure": 0.9})
    kept = {"min_sure": 0.9, "ratio": 1}
    saved = ChatCacheTune(
        engine=engine, generate_kwargs=kept
    ).model_dump()  # with all fields, also those that nobody gave
    assert ChatCacheTune(engine=engine, **saved).generate_kwargs == kept


def test_what_requests_are_refused_for_is_swallowed_by_no_framework(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=2)
    image = HumanMessage([{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}])
    twice = create_cachetune_chain(engine, ChatPromptTemplate.from_template("{context} {context}"))
    requests = [
        lambda: model.invoke("hi", ratio=15),
        lambda: model.invoke("hi", max_kl=0.1),  # nothing was calibrated
        lambda: ChatCacheTune(engine=engine, min_top1=0.9).invoke("hi"),
        lambda: model.invoke("hi", selector="none of these"),
        lambda: model.invoke([image]),
        lambda: model.invoke("long " * 5000),
        lambda: twice.invoke({"context": [Document(page_content="a passage")]}),
    ]
    for request in requests:
        with pytest.raises(CacheTuneError) as caught:
            request()
        assert not isinstance(caught.value, ValueError | TypeError)


def test_the_length_of_an_answer_is_the_nearest_that_was_given(engine: CacheTune) -> None:
    def length(*, request: dict[str, Any] | None = None, **given: Any) -> int:
        model = ChatCacheTune(engine=engine, eos_token_id=[], **given)
        return int(model.invoke("hi", **(request or {})).usage_metadata["output_tokens"])

    config = GenerationConfig(max_new_tokens=3)
    assert length(generation_config=config) == length(generation_config=config, max_tokens=None) == 3
    assert length(generate_kwargs={"generation_config": config}) == length(request={"generation_config": config}) == 3
    assert length(generation_config=config, max_tokens=4) == length(generate_kwargs={"max_new_tokens": 4}) == 4
    engine.adapter.model.generation_config.max_new_tokens = 5
    assert length() == length(max_tokens=None) == 5
    assert length(generation_config=config) == 3
    with pytest.raises(ValueError, match="give the answer's length once"):
        ChatCacheTune(engine=engine, max_tokens=3, generate_kwargs={"max_new_tokens": 4})


def test_usual_names_mean_what_they_say(engine: CacheTune) -> None:
    for name in ("max_tokens", "max_new_tokens", "max_completion_tokens"):
        model = ChatCacheTune(engine=engine, **{name: 3})
        assert model.invoke("hi").usage_metadata["output_tokens"] == 3
        assert ChatCacheTune(engine=engine).invoke("hi", **{name: 2}).usage_metadata["output_tokens"] == 2
    drawn = [
        ChatCacheTune(engine=engine, max_tokens=8, temperature=2.0, seed=i).invoke("hi").content for i in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ChatCacheTune(engine=engine, temperature=0.5).temperature == 0.5
    direct = engine.generate(
        prompt=engine.prompt_from_messages([{"role": "user", "content": "hi"}]),
        max_new_tokens=8,
        top_k=5,
        top_p=0.7,
        seed=3,
    )
    assert ChatCacheTune(engine=engine, max_tokens=8, top_k=5, top_p=0.7, seed=3).invoke("hi").content == direct.text
    whole = ChatCacheTune(engine=engine, max_tokens=8).invoke("hi").content
    assert (
        ChatCacheTune(engine=engine, max_tokens=8, stop=whole[2]).invoke("hi").content == whole[: whole.index(whole[2])]
    )
    named = ChatCacheTune(engine=engine, model_name="mine", max_retries=2, api_key="none", timeout=60)
    assert named.invoke("hi", max_tokens=1).response_metadata["model_name"] == "mine"


def test_an_answer_that_takes_longer_than_its_timeout_is_given_up(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=64, timeout=1e-9)
    with pytest.raises(TimeoutError, match="timeout=1e-09"):
        model.invoke("hi")
    assert model.invoke("hi", timeout=600, max_tokens=2).usage_metadata["output_tokens"] == 2


def test_the_cache_tells_models_and_settings_apart(engines: EngineMaker) -> None:
    other = copy.deepcopy(engines.model)
    with torch.no_grad():
        other.lm_head.weight.copy_(torch.randn(other.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
    first = engines()
    with CacheTune(other, engines.tokenizer, None) as second:
        models = [
            ChatCacheTune(engine=first, max_tokens=6),
            ChatCacheTune(engine=second, max_tokens=6),
            ChatCacheTune(engine=first, max_tokens=4),
            ChatCacheTune(engine=first, max_tokens=6, temperature=1.5, seed=5),
        ]
        plain = [model.invoke("who are you?").content for model in models]
        assert len(set(plain)) == 4
        kept: set[tuple[str, str]] = set()

        class Recording(InMemoryCache):
            def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
                kept.add((prompt, llm_string))
                super().update(prompt, llm_string, return_val)

        set_llm_cache(Recording())
        try:
            for _ in range(2):
                assert [model.invoke("who are you?").content for model in models] == plain
            assert len(kept) == 4
        finally:
            set_llm_cache(None)


def test_copies_share_the_engine_and_pickles_load_their_own(
    engine: CacheTune, engines: EngineMaker, tmp_path: Path
) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=3, stop=["x"])
    copied = copy.deepcopy(model)
    assert copied.engine is engine
    assert copied.stop == ["x"]
    assert copied.stop is not model.stop
    assert copied.invoke("hi").content == model.invoke("hi").content
    index = CacheTuneIndex(engine=engine, vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=4)))
    assert copy.deepcopy(index).engine is engine
    with pytest.raises(pickle.PicklingError, match="model=, store= and engine_kwargs="):
        pickle.dumps(model)
    engines.model.save_pretrained(tmp_path / "model")
    engines.tokenizer.save_pretrained(tmp_path / "model")
    loading = ChatCacheTune(model=str(tmp_path / "model"), max_tokens=3, engine_kwargs={"tenant": "a"})
    unused = pickle.loads(pickle.dumps(loading))
    expected = loading.invoke("hi").content
    used = pickle.loads(pickle.dumps(loading))
    for loaded in (unused, used):
        assert loaded.engine is None
        assert loaded.invoke("hi").content == expected
        assert loaded.engine.namespace.tenant == "a"
        loaded.engine.close()
    loading.engine.close()


async def test_a_prompt_is_read_again_where_the_model_is_not_sure(engine: CacheTune) -> None:
    engine.precompute(text := "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler.")
    model = ChatCacheTune(engine=engine, max_tokens=6)
    sure = ChatCacheTune(engine=engine, max_tokens=6, min_sure=1.0)
    whole = model.invoke(text, reuse=False).content
    for message in (sure.invoke(text), model.invoke(text, min_sure=1.0), await sure.ainvoke(text)):
        assert message.response_metadata["report"]["read_again"]["token"] == 0
        assert message.content == whole
    assert "".join(str(part.content) for part in sure.stream(text)) == whole
    assert sure.last_report is not None
    assert sure.last_report.read_again is not None
    assert model.invoke(text).response_metadata["report"]["read_again"] is None


async def test_each_task_has_its_own_last_report(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=2)
    chain = ChatPromptTemplate.from_template("{q}") | model
    lengths = [5, 50, 500]

    async def ask(length: int, runnable: Any) -> tuple[int, int]:
        message = await runnable.ainvoke({"q": "a" * length} if runnable is chain else "a" * length)
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(10)))
        assert model.last_report is not None
        return message.usage_metadata["input_tokens"], model.last_report.prompt_tokens

    for runnable in (model, chain):
        for told, reported in await asyncio.gather(*(ask(length, runnable) for length in lengths)):
            assert told == reported
    model.batch(["x", "y"])
    assert (
        model.last_report.prompt_tokens
        == engine.generate(
            prompt=engine.prompt_from_messages([{"role": "user", "content": "x"}]), max_new_tokens=1
        ).report.prompt_tokens
    )


def test_reports_of_a_chain_that_answers_with_a_str(engine: CacheTune) -> None:
    chain = create_cachetune_chain(engine, max_tokens=2)
    inputs = {"context": [Document(page_content="The lighthouse has 214 steps.")], "input": "?"}
    with collect_reports() as reports:
        assert isinstance(chain.invoke(inputs), str)
        chain.batch([inputs, inputs])
    chain.invoke(inputs)
    assert [report.retrieved for report in reports] == [29] * 3


async def test_waiting_requests_leave_asyncio_its_threads(engine: CacheTune) -> None:
    """With far more requests than the default executor has threads, one of its jobs still runs."""
    from concurrent.futures import ThreadPoolExecutor

    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    model = ChatCacheTune(engine=engine, max_tokens=2)

    async def streamed() -> str:
        return "".join([str(piece.content) async for piece in model.astream("hi")])

    with engine.runtime.model.lock:
        waiting = [asyncio.ensure_future(model.ainvoke("hi")) for _ in range(4)]
        waiting += [asyncio.ensure_future(streamed()) for _ in range(4)]
        assert await asyncio.wait_for(loop.run_in_executor(None, lambda: 7), 30) == 7
        assert not any(task.done() for task in waiting)
    answers = await asyncio.gather(*waiting)
    assert len({getattr(answer, "content", answer) for answer in answers}) == 1


def test_a_stream_closed_early_has_its_report(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=20)
    with collect_reports() as reports:
        stream = model.stream("hi")
        next(stream)
        stream.close()
        model.invoke("hi")
    assert [report.prompt_tokens for report in reports] == [reports[0].prompt_tokens] * 2


def test_a_loop_may_end_while_a_stream_is_open(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    """`asyncio.run` cancels what still runs; a stream whose closing had to be awaited would be dropped with a message."""
    model = ChatCacheTune(engine=engine, max_tokens=20)

    async def first_piece() -> str:
        async for piece in model.astream("hi"):
            return str(piece.content)
        return ""

    with caplog.at_level("ERROR", logger="asyncio"):
        for _ in range(3):
            asyncio.run(first_piece())
        gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []
    assert model.invoke("hi").usage_metadata is not None, "the model is free again"


def test_a_tiny_model_without_a_chat_template_still_continues_one_text() -> None:
    with CacheTune(tiny.llama(), tiny.tokenizer(chat=False), None) as engine:
        assert ChatCacheTune(engine=engine, max_tokens=2).invoke("Once").usage_metadata["output_tokens"] == 2
