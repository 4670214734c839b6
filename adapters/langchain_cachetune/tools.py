"""Tools and structured output: how a prompt shows them, and how they are read from an answer's text."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.messages.tool import ToolCall, ToolCallChunk, tool_call, tool_call_chunk
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from cachetune_rag.errors import ConfigError
from cachetune_rag.text import tool_calls
from cachetune_store.printing import shown

METHODS = ("function_calling", "json_schema", "json_mode")

_HERMES = """You may call one or more of these functions:
<tools>
{tools}
</tools>

To call one, write a JSON object with its name and arguments inside <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The text that Hermes and Qwen are trained on, for chat templates that don't show tools."""


@dataclass(frozen=True)
class ToolRequest:
    """The tools of one request.

    Attributes:
        tools: in the form of OpenAI's API, as chat templates take them.
        instruction: a further instruction for the prompt; "" for none.
    """

    tools: tuple[dict[str, Any], ...] = ()
    instruction: str = ""

    @property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [tool["function"]["name"] for tool in self.tools]

    @classmethod
    def of(cls, tools: Sequence[Any] | None, tool_choice: Any = None, response_format: Any = None) -> ToolRequest:
        """The tools that a request's arguments ask for.

        Raises:
            ConfigError: the choice isn't one of the tools, or the format is unknown.
        """
        made = tuple(convert_to_openai_tool(tool) for tool in tools or ())
        wanted = _format(response_format)
        named = tool_choice
        if isinstance(tool_choice, Mapping):  # as OpenAI's API writes it
            named = (tool_choice.get("function") or tool_choice).get("name")
        if named in (None, False, "auto"):
            return cls(made, wanted)
        if named == "none":
            return cls((), wanted)
        names = [tool["function"]["name"] for tool in made]
        if named in (True, "any", "required"):
            if not made:
                raise ConfigError(f"tool_choice is {shown(tool_choice)}, but there are no tools: bind some.")
            return cls(made, "Answer by calling a function." if len(made) > 1 else f"Call the function {names[0]}.")
        if named not in names:
            raise ConfigError(
                f"tool_choice is {shown(tool_choice)}: use 'auto', 'any', 'none' or one of the tools, {', '.join(names)}."
            )
        return cls(tuple(tool for tool in made if tool["function"]["name"] == named), f"Call the function {named}.")

    def as_text(self) -> str:
        """The tools for a prompt whose template doesn't show them."""
        return _HERMES.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.tools))


def langchain_calls(calls: Sequence[tool_calls.ToolCall]) -> list[ToolCall]:
    """An answer's calls in LangChain's form. Their ids have nine letters and digits, as Mistral's template requires."""
    return [tool_call(name=call.name, args=call.arguments, id=uuid.uuid4().hex[:9]) for call in calls]


def call_chunks(calls: Sequence[ToolCall]) -> list[ToolCallChunk]:
    """The same calls as parts of a stream. Each part is a whole call."""
    return [
        tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=i)
        for i, call in enumerate(calls)
    ]


def output_parser(schema: Any, method: str) -> BaseOutputParser[Any]:
    """Parses an answer into what the schema describes. An answer that can't be parsed raises `OutputParserException`."""
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        if is_class:
            return _CalledPydantic(tools=[schema], first_tool_only=True)
        name = convert_to_openai_tool(schema)["function"]["name"]
        return _CalledJson(key_name=name, first_tool_only=True)
    return PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()


def schema_format(schema: Any, method: str) -> dict[str, Any]:
    """The `response_format` of a request for JSON."""
    if method == "json_mode":
        return {"type": "json_object"}
    described = convert_to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": described.get("title", "answer"), "schema": described}}


def _format(response_format: Any) -> str:
    if response_format is None:
        return ""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return "Answer with one JSON object and nothing else."
    if kind == "json_schema":
        given = response_format.get("json_schema", {})
        schema = json.dumps(given.get("schema", given), ensure_ascii=False)
        return f"Answer with one JSON object that keeps to this JSON schema, and nothing else:\n{schema}"
    raise ConfigError(
        f"response_format is {shown(response_format, 200)}: use {{'type': 'json_object'}} or {{'type': 'json_schema', "
        "'json_schema': {'schema': ...}}, or with_structured_output."
    )


def _check_called(result: Sequence[Any], partial: bool) -> None:
    """Raise an error if an answer has no call. LangChain's own parsers would return None."""
    message = getattr(result[0], "message", None) if result else None
    if not partial and isinstance(message, AIMessage) and not message.tool_calls:
        raise OutputParserException(
            "the model answered without a call, so there is nothing to read: use method='json_schema', a larger model, or "
            f"more max_tokens if the answer was cut off. It said: {shown(str(message.content)[:500])}",
            llm_output=str(message.content),
        )


class _CalledPydantic(PydanticToolsParser):
    def parse_result(self, result: list[Any], *, partial: bool = False) -> Any:
        _check_called(result, partial)
        return super().parse_result(result, partial=partial)


class _CalledJson(JsonOutputKeyToolsParser):
    def parse_result(self, result: list[Any], *, partial: bool = False) -> Any:
        _check_called(result, partial)
        return super().parse_result(result, partial=partial)
