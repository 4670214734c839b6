"""Tools and structured output, on a scripted tiny model whose chat template shows tools."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
from engines import EngineMaker
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

from cachetune_rag import CacheTuneError
from llama_index.llms.cachetune import CacheTuneLLM

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Scripted:
    """A real request, whose text is another one's."""

    def __init__(self, stream: Any, text: str):
        self._stream, self._text = stream, text
        self._pieces = self._run()

    def _run(self) -> Iterator[str]:
        for _ in self._stream:
            pass
        yield from (self._text[i : i + 5] for i in range(0, len(self._text), 5))

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    @property
    def report(self) -> Any:
        return self._stream.report

    @property
    def answer(self) -> Any:
        return replace(self._stream.answer, text=self._text)


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def says() -> list[str]:
    """What the model says, in turn."""
    return []


@pytest.fixture
def llm(engines: EngineMaker, asked: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch) -> CacheTuneLLM:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = TEMPLATE
    engine = engines(tokenizer=tokenizer)
    stream = engine.stream

    def scripted(**options: Any) -> Any:
        asked.append(engine.tokenizer.decode(options["prompt"].ids))
        return Scripted(stream(**{**options, "max_new_tokens": 1}), says.pop(0))

    monkeypatch.setattr(engine, "stream", scripted)
    return CacheTuneLLM(engine)


def test_a_tool_is_shown_called_and_answered(llm: CacheTuneLLM, asked: list[str], says: list[str]) -> None:
    tool = FunctionTool.from_defaults(add)
    assert llm.metadata.is_function_calling_model
    says += [f"Let me see. {CALL}{CALL}", "It is 5."]
    response = llm.chat_with_tools([tool], user_msg="What is 2 + 3?")
    assert '"name": "add"' in asked[0]
    assert response.message.content == "Let me see."
    (call,) = llm.get_tool_calls_from_response(response)
    assert isinstance(call, ToolSelection)
    assert (call.tool_name, call.tool_kwargs) == ("add", {"a": 2, "b": 3})
    answer = ChatMessage(role=MessageRole.TOOL, content="5", additional_kwargs={"tool_call_id": call.tool_id})
    history = [ChatMessage(content="What is 2 + 3?"), response.message, answer]
    assert llm.chat_with_tools([tool], chat_history=history).message.content == "It is 5."
    assert call.tool_id in asked[1]
    says.append(CALL)
    assert str(llm.predict_and_call([tool], user_msg="2 + 3?")) == "5"


async def test_a_streamed_call_never_shows_as_text(llm: CacheTuneLLM, says: list[str]) -> None:
    says += [f"Let me see. {CALL}"] * 2
    tool = FunctionTool.from_defaults(add)
    sync = list(llm.stream_chat_with_tools([tool], user_msg="2 + 3?"))
    stream = await llm.astream_chat_with_tools([tool], user_msg="2 + 3?")
    for responses in (sync, [response async for response in stream]):
        assert "".join(r.delta or "" for r in responses) == "Let me see."
        assert [c.tool_name for c in llm.get_tool_calls_from_response(responses[-1])] == ["add"]


def test_an_answer_without_a_call(llm: CacheTuneLLM, says: list[str]) -> None:
    says.append("No idea.")
    response = llm.chat_with_tools([FunctionTool.from_defaults(add)], user_msg="2 + 3?")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(CacheTuneError, match="calls no tool"):
        llm.get_tool_calls_from_response(response)


def test_a_template_without_tools_says_what_to_do(engines: EngineMaker) -> None:
    llm = CacheTuneLLM(engines())
    assert not llm.metadata.is_function_calling_model
    with pytest.raises(NotImplementedError, match="ReActAgent"):
        llm.chat_with_tools([FunctionTool.from_defaults(add)], user_msg="2 + 3?")


class Sum(BaseModel):
    """A sum."""

    value: int


def test_structured_output_by_a_schema_in_the_prompt(llm: CacheTuneLLM, asked: list[str], says: list[str]) -> None:
    says += ['Here it is: {"value": 5}', '{"value": 6}']
    assert llm.structured_predict(Sum, PromptTemplate("Add {a} and 3."), a=2) == Sum(value=5)
    assert '"value"' in asked[0]
    assert llm.as_structured_llm(Sum).complete("Add 3 and 3.").raw == Sum(value=6)
