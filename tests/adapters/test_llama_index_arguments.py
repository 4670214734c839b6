"""Arguments of `CacheTuneLLM`: none is ignored, and invalid ones are refused before a request."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
from engines import EngineMaker
from llama_index.core import Document, PromptTemplate, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from refused import REFUSED
from transformers import GenerationConfig

from cachetune_rag import CacheTune, CacheTuneError, PromptError, PromptTooLongError
from llama_index.llms.cachetune import CacheTuneLLM, KVPrecompute

START, END = "<|im_start|>", "<|im_end|>"


def control_ids(engine: CacheTune, *tokens: str) -> list[int]:
    return engine.tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.fixture
def asked(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the engine was asked."""
    calls: list[dict[str, Any]] = []
    stream = engine.stream
    monkeypatch.setattr(engine, "stream", lambda **options: calls.append(options) or stream(**options))
    return calls


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"rato": 0.5}, "'ratio'"),
        ({"temprature": 0.5}, "'temperature'"),
        ({"generate_kwargs": {"temperture": 0.3}}, "'temperature'"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "same argument"),
        ({"ratio": 15}, "from 0"),
        ({"ratio": "half"}, "'auto'"),
        ({"max_kl": -1}, "max_kl is -1"),
        ({"min_sure": 1.5}, "min_sure is 1.5"),
        ({"min_top1": 0.9, "ratio": 0.2}, "leave ratio out"),
        ({"selector": "frequent"}, "frequency"),
        ({"engine_kwargs": {"tennant": "a"}}, "'tenant'"),
    ],
)
def test_what_cant_be_served_is_refused_when_it_is_made(engine: CacheTune, wrong: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        CacheTuneLLM(engine, **wrong)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_no_number_is_made_of_what_a_request_would_be_refused_for(engine: CacheTune, name: str, value: Any) -> None:
    for given in ({name: value}, {"generate_kwargs": {name: value}}):
        with pytest.raises(ValueError, match=f"{name} is "):
            CacheTuneLLM(engine, **given)
        with pytest.raises(ValueError, match=f"{name} is "):
            CacheTuneLLM(model="nowhere", **given)


def test_values_of_other_arguments_are_taken_as_they_are_or_not_at_all(engine: CacheTune) -> None:
    for name, value in (
        ("max_new_tokens", True),
        ("max_tokens", "3"),
        ("context_window", True),
        ("learn_retrieved", "no"),
        ("temperature", "hot"),
        ("top_p", 7),
        ("generate_kwargs", {"top_p": True}),
        ("generate_kwargs", {"reuse": "no"}),
    ):
        with pytest.raises(ValueError, match=r"valid|temperature|top_p|reuse is"):
            CacheTuneLLM(engine, **{name: value})
    with pytest.raises(ValueError, match="min_sure stands in generate_kwargs as well"):
        CacheTuneLLM(engine, min_sure=0.5, generate_kwargs={"min_sure": 0.9})
    kept = {"min_sure": 0.9, "ratio": 1}
    saved = CacheTuneLLM(engine, generate_kwargs=kept).to_dict()  # with all fields, also those that nobody gave
    assert CacheTuneLLM(engine, **{**saved, "model": "x"}).generate_kwargs == kept


def test_a_typing_error_is_found_before_the_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="'top_p'"):
        CacheTuneLLM(model="nowhere", generate_kwargs={"topp": 0.5})
    CacheTuneLLM(
        model="nowhere", generate_kwargs={"enable_thinking": False}
    )  # what a chat template takes isn't known yet


def test_the_frameworks_usual_names(engine: CacheTune, asked: list[dict[str, Any]]) -> None:
    llm = CacheTuneLLM(
        engine, max_tokens=3, temperature=0.7, top_p=0.9, stop=["x"], additional_kwargs={"seed": 1}, context_window=512
    )
    assert (llm.metadata.num_output, llm.metadata.context_window) == (3, 512)
    llm.complete("Hello")
    given = {name: asked[-1][name] for name in ("max_new_tokens", "temperature", "top_p", "stop", "seed")}
    assert given == {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9, "stop": ["x"], "seed": 1}
    llm.complete("Hello", temperature=0, max_tokens=1)
    assert (asked[-1]["temperature"], asked[-1]["max_new_tokens"]) == (0, 1)


def test_a_generation_configs_own_limit_counts(engine: CacheTune) -> None:
    llm = CacheTuneLLM(engine, generation_config=GenerationConfig(max_new_tokens=2))
    assert llm.complete("Hello").additional_kwargs["completion_tokens"] == 2


def ask(llm: CacheTuneLLM, nodes: int = 2) -> str:
    text = "The lighthouse has 214 steps and a clock that strikes every hour of the day. " * 3
    index = VectorStoreIndex.from_documents([Document(text=text)] * 9, embed_model=MockEmbedding(4))
    return str(index.as_query_engine(llm=llm, similarity_top_k=nodes).query("How many?"))


def test_an_error_of_a_request_is_no_empty_response(engines: EngineMaker) -> None:
    """The compact synthesizer treats ValueError and TypeError as an answer that can't be parsed."""
    engines.model = tiny.llama(max_positions=2300)
    llm = CacheTuneLLM(engines(), max_new_tokens=64)
    with pytest.raises(PromptTooLongError, match=r"Settings\.tokenizer"):
        ask(llm, 9)
    llm = CacheTuneLLM(engines(), max_new_tokens=4)
    llm.generate_kwargs["nonsense"] = 1  # behind the back of the checks
    with pytest.raises(CacheTuneError, match="nonsense"):
        ask(llm)


# -- layouts of the user's own ----------------------------------------------------------------------------------------


def layout(messages: Sequence[ChatMessage]) -> str:
    return "".join(f"{START}{message.role.value}\n{message.content}{END}" for message in messages)


def test_messages_to_prompt_writes_control_tokens_and_contents_dont(engine: CacheTune, asked: Any) -> None:
    llm = CacheTuneLLM(engine, max_new_tokens=2, messages_to_prompt=layout)
    llm.chat([ChatMessage(role="system", content="Be brief."), ChatMessage(content=f"What is {END}?")])
    ids = asked[-1]["prompt"].ids
    (start, end) = control_ids(engine, START, END)
    assert (ids.count(start), ids.count(end)) == (2, 2)
    assert engine.tokenizer.decode(ids).endswith(f"{START}user\nWhat is {END}?{END}")


def test_chunks_are_found_in_the_users_layout(engine: CacheTune) -> None:
    text = "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler."
    engine.precompute(text)
    llm = CacheTuneLLM(engine, max_new_tokens=2, messages_to_prompt=layout)
    report = llm.chat([ChatMessage(content=f"Read: {text} Who?")]).raw["report"]
    assert report["recognised"] == 1
    assert report["missed"] == 0


def test_a_layout_that_drops_contents_is_taken_at_its_word(engine: CacheTune, asked: Any) -> None:
    llm = CacheTuneLLM(
        engine,
        max_new_tokens=2,
        messages_to_prompt=lambda messages: f"{START}{messages[-1].content.upper()}",
        completion_to_prompt=lambda prompt: f"C{END}",
    )
    llm.chat([ChatMessage(content="first"), ChatMessage(content="last")])
    assert engine.tokenizer.decode(asked[-1]["prompt"].ids).endswith(f"{START}LAST")
    llm.complete("hi")
    assert asked[-1]["prompt"].ids[-1] == control_ids(engine, END)[0]
    with pytest.raises(PromptError, match="control token"):
        CacheTuneLLM(engine, messages_to_prompt=lambda ms: f"{START}{ms[0].content}{ms[0].content}").chat(
            [ChatMessage(content=END)]
        )


def test_completion_to_prompt_of_a_model_without_chat_template(engines: EngineMaker) -> None:
    """The framework's `predict` lays out a template's text. Control tokens in it must stay control tokens."""
    engine = engines(tokenizer=tiny.tokenizer(chat=False))
    llm = CacheTuneLLM(engine, max_new_tokens=2, completion_to_prompt=lambda prompt: f"{START}{prompt}{END}")
    ids: list[Any] = []
    stream = engine.stream
    engine.stream = lambda **options: ids.append(options["prompt"].ids) or stream(**options)  # type: ignore[method-assign]
    llm.predict(PromptTemplate("Say {what}."), what=END)
    llm.complete(f"Say {END}.")
    assert ids[0] == ids[1]
    start, end = control_ids(engine, START, END)
    assert (ids[0].count(start), ids[0].count(end)) == (1, 1)


def test_system_prompt_and_query_wrapper(engine: CacheTune, asked: Any) -> None:
    wrapper = PromptTemplate("Q: {query_str}")
    llm = CacheTuneLLM(engine, max_new_tokens=2, system_prompt="Be brief.", query_wrapper_prompt=wrapper)
    llm.complete("Hello")
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: Hello"}]
    assert asked[-1]["prompt"].ids == engine.prompts.build_messages(expected).ids


# -- copies -----------------------------------------------------------------------------------------------------------


def test_copies_share_the_engine_and_pickles_say_why_not(engine: CacheTune) -> None:
    llm = CacheTuneLLM(engine, max_new_tokens=3, generate_kwargs={"seed": 1})
    made = copy.deepcopy(llm)
    assert made.engine is engine
    made.generate_kwargs["seed"] = 2
    assert llm.generate_kwargs == {"seed": 1}
    assert copy.deepcopy(KVPrecompute(engine)).engine is engine
    with pytest.raises(pickle.PicklingError, match="model="):
        pickle.dumps(llm)
