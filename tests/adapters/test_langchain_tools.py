"""Tools, agents and structured output through LangChain: LangChain's own suite on a model that does as it is told, and more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from chat_templates import QWEN3
from engines import EngineMaker
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel
from scripted import Scripted, obedient

from cachetune_rag import CacheTune, ConfigError
from langchain_cachetune import ChatCacheTune

PASSAGE = "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler."


class TestSuite(ChatModelIntegrationTests):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _engine(cls) -> Iterator[None]:
        with CacheTune(tiny.llama(layers=1, max_positions=16384), tiny.tokenizer(), None) as cls.engine:
            yield

    @property
    def chat_model_class(self) -> type[ChatCacheTune]:
        return ChatCacheTune

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "max_tokens": 512, "logits_processor": [Scripted(obedient)]}

    @property
    def supports_json_mode(self) -> bool:
        return True


@tool
def retrieve(query: str) -> str:
    """Finds a passage."""
    return PASSAGE


class Steps(BaseModel):
    """How many steps there are."""

    steps: int


@pytest.fixture
def told(engine: CacheTune) -> tuple[ChatCacheTune, Scripted]:
    """A model that does as it is told, and what it was shown."""
    script = Scripted(obedient)
    return ChatCacheTune(engine=engine, max_tokens=512, logits_processor=[script]), script


def test_an_agents_loop_finds_the_passage_that_its_tool_returned(
    engine: CacheTune, told: tuple[ChatCacheTune, Scripted]
) -> None:
    engine.precompute(PASSAGE)
    model, script = told
    bound = model.bind_tools([retrieve])
    history: list[Any] = [SystemMessage("You are brief."), HumanMessage("Who built it?")]
    call = bound.invoke(history)
    assert call.response_metadata["finish_reason"] == "tool_calls"
    assert call.content == ""
    (asked,) = call.tool_calls
    assert (asked["name"], asked["args"]) == ("retrieve", {"query": "a text"})
    assert asked["id"].isalnum()
    assert len(asked["id"]) == 9
    history += [call, retrieve.invoke(asked)]
    done = bound.invoke(history)
    assert (done.content, done.tool_calls) == ("It is done.", [])
    assert model.last_report.recognised == 1
    shown = script.prompts[-1]
    assert "You are brief.\n\nYou may call one or more of these functions:" in shown
    assert '<tool_call>\n{"name": "retrieve", "arguments": {"query": "a text"}}\n</tool_call>' in shown
    assert f"<|im_start|>user\n<tool_response>\n{PASSAGE}\n</tool_response><|im_end|>" in shown


def test_results_of_one_turn_are_one_turn(told: tuple[ChatCacheTune, Scripted]) -> None:
    model, script = told
    calls = [{"name": "retrieve", "args": {"query": q}, "id": q, "type": "tool_call"} for q in ("a", "b")]
    model.bind_tools([retrieve]).invoke(
        [
            HumanMessage("?"),
            AIMessage("", tool_calls=calls),
            ToolMessage("one", tool_call_id="a"),
            ToolMessage("two", tool_call_id="b"),
        ]
    )
    assert "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>" in script.prompts[-1]


def test_a_stream_shows_the_words_before_a_call_and_the_call_whole(engine: CacheTune) -> None:
    said = 'Let me look.\n<tool_call>\n{"name": "retrieve", "arguments": {"query": "é"}}\n</tool_call>'
    model = ChatCacheTune(engine=engine, max_tokens=512, logits_processor=[Scripted(lambda _: said)])
    pieces = list(model.bind_tools([retrieve]).stream("?"))
    assert "".join(str(piece.content) for piece in pieces) == "Let me look."
    assert len(pieces) > 5
    (asked,) = [call for piece in pieces for call in piece.tool_calls]
    assert (asked["name"], asked["args"]) == ("retrieve", {"query": "é"})
    assert model.invoke("?").content == said, "without tools it is text"


def test_a_choice_of_tools(told: tuple[ChatCacheTune, Scripted]) -> None:
    model, script = told

    @tool
    def other(number: int) -> int:
        """Another."""
        return number

    assert model.bind_tools([retrieve, other], tool_choice="other").invoke("?").tool_calls[0]["name"] == "other"
    assert '"name": "retrieve"' not in script.prompts[-1]
    assert model.bind_tools([retrieve, other], tool_choice="any").invoke("?").tool_calls
    assert model.bind_tools([retrieve, other], tool_choice="none").invoke("?").tool_calls == []
    assert "<tools>" not in script.prompts[-1]
    for wrong in ("retreive", 5):
        with pytest.raises(ConfigError, match="one of the tools, retrieve, other"):
            model.bind_tools([retrieve, other], tool_choice=wrong)
    with pytest.raises(ConfigError, match="no tools"):
        model.bind_tools([], tool_choice="any")


@pytest.mark.parametrize("method", [None, "function_calling", "json_schema"])
def test_structured_output(told: tuple[ChatCacheTune, Scripted], method: str | None) -> None:
    model, _ = told
    assert model.with_structured_output(Steps, method=method).invoke("?") == Steps(steps=3)
    assert model.with_structured_output(Steps.model_json_schema(), method=method).invoke("?") == {"steps": 3}
    raw = model.with_structured_output(Steps, method=method, include_raw=True).invoke("?")
    assert raw["parsed"] == Steps(steps=3)
    assert raw["parsing_error"] is None
    assert raw["raw"].response_metadata["report"]["prompt_tokens"] > 0


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_an_answer_that_keeps_to_no_schema_is_an_error(engine: CacheTune, method: str) -> None:
    model = ChatCacheTune(engine=engine, max_tokens=32, logits_processor=[Scripted(lambda _: "I don't know.")])
    with pytest.raises(OutputParserException, match="I don't know"):
        model.with_structured_output(Steps, method=method).invoke("?")
    raw = model.with_structured_output(Steps, method=method, include_raw=True).invoke("?")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


def test_wrong_arguments_are_refused_at_once(engine: CacheTune) -> None:
    model = ChatCacheTune(engine=engine)
    with pytest.raises(ConfigError, match="function_calling, json_schema, json_mode"):
        model.with_structured_output(Steps, method="xml")
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        model.with_structured_output(Steps, temprature=1)
    with pytest.raises(ConfigError, match="parallel_tool_calls"):
        model.bind_tools([retrieve], parallel_tool_calls=False)
    with pytest.raises(ConfigError, match="response_format"):
        model.invoke("?", response_format="json")


def test_a_template_that_knows_tools_lays_them_out(engines: EngineMaker) -> None:
    tokenizer = copy.deepcopy(engines.tokenizer)
    tokenizer.chat_template = QWEN3
    engine = engines(None, tokenizer=tokenizer)
    script = Scripted(obedient)
    model = ChatCacheTune(engine=engine, max_tokens=512, logits_processor=[script])
    bound = model.bind_tools([retrieve])
    history: list[Any] = [HumanMessage("Call retrieve.")]
    history.append(bound.invoke(history))
    history.append(retrieve.invoke(history[-1].tool_calls[0]))
    bound.invoke(history)
    expected = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Call retrieve."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "retrieve", "arguments": {"query": "a text"}}}
                ],
            },
            {"role": "tool", "content": PASSAGE, "name": "retrieve"},
        ],
        tools=[convert_to_openai_tool(retrieve)],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert script.prompts[-1] == expected
    assert model.with_structured_output(Steps).invoke("?") == Steps(steps=3)
    assert "<tools>" in script.prompts[-1], "a call, as the template knows them"


def test_arguments_of_the_template_go_to_the_template(engines: EngineMaker) -> None:
    tokenizer = copy.deepcopy(engines.tokenizer)
    tokenizer.chat_template = QWEN3
    engine = engines(None, tokenizer=tokenizer)
    script = Scripted(lambda _: "Yes.")
    model = ChatCacheTune(engine=engine, logits_processor=[script])
    assert model.invoke("?", enable_thinking=False).content == "Yes."
    assert script.prompts[-1].endswith("<think>\n\n</think>\n\n")
    set_once = ChatCacheTune(engine=engine, generate_kwargs={"enable_thinking": False, "logits_processor": [script]})
    set_once.invoke("?")
    assert script.prompts[-1].endswith("<think>\n\n</think>\n\n")
    model.invoke("?")
    assert script.prompts[-1].endswith("<|im_start|>assistant\n")
    with pytest.raises(ConfigError, match="did you mean 'enable_thinking'"):
        model.invoke("?", enable_thinkin=False)
