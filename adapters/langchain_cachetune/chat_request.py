"""One request of a chat model: the answer's stream, and the messages that are made of it for LangChain."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from cachetune_rag import Answer, AnswerStream
from cachetune_rag.text.tool_calls import ToolCall, ToolCallStream, parse
from langchain_cachetune.tools import ToolRequest, call_chunks, langchain_calls


@dataclass(frozen=True)
class Deadline:
    """How long an answer may take.

    Attributes:
        started: when the request came, by `time.monotonic`.
        timeout: the seconds that it may take.
    """

    started: float
    timeout: float

    def check(self) -> None:
        """Raise an error if the time is over.

        Raises:
            TimeoutError: the time is over.
        """
        if time.monotonic() > self.started + self.timeout:
            raise TimeoutError(
                f"the answer took longer than timeout={self.timeout:g} seconds: give it more, or fewer tokens."
            )


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Attributes:
        stream: the answer.
        tools: the tools that the model was shown.
        model_name: the name for each message's metadata.
        deadline: when the answer has to be finished; None if there is no limit.
    """

    stream: AnswerStream
    tools: ToolRequest
    model_name: str
    deadline: Deadline | None

    def check_time(self) -> None:
        """Raise `TimeoutError` if the time of the request is over."""
        if self.deadline is not None:
            self.deadline.check()

    def tool_call_reader(self) -> ToolCallStream | None:
        """Reads tool calls from the pieces of the answer; None if the model was shown no tools."""
        return ToolCallStream(self.tools.names) if self.tools.tools else None

    def message(self, answer: Answer) -> AIMessage:
        """The message of a whole answer."""
        content, calls = parse(answer.text, self.tools.names) if self.tools.tools else (answer.text, [])
        return AIMessage(
            content=content,
            tool_calls=langchain_calls(calls),
            response_metadata=self._metadata(answer, bool(calls)),
            usage_metadata=_usage(answer),
        )

    def last_chunk(self, answer: Answer, rest: str, calls: Sequence[ToolCall]) -> AIMessageChunk:
        """The last part of a streamed message: the text that was held back, the tool calls, and the metadata of the answer."""
        return AIMessageChunk(
            content=rest,
            tool_call_chunks=call_chunks(langchain_calls(calls)),
            response_metadata=self._metadata(answer, bool(calls)),
            usage_metadata=_usage(answer),
            chunk_position="last",
        )

    def _metadata(self, answer: Answer, called: bool) -> dict[str, Any]:
        return {
            "report": answer.report.as_dict(),
            "finish_reason": "tool_calls" if called else answer.finish_reason,
            "model_name": self.model_name,
            "model_provider": "cachetune",
        }


def _usage(answer: Answer) -> UsageMetadata:
    report, generated = answer.report, len(answer.token_ids)
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=generated,
        total_tokens=report.prompt_tokens + generated,
        input_token_details=InputTokenDetails(cache_read=report.reused, cache_creation=report.missed),
    )
