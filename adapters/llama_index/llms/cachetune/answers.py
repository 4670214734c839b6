"""The engine's answers for LlamaIndex: whole or streamed, for threads or an event loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)

from cachetune_rag import AnswerStream, Report
from cachetune_rag.concurrency.async_calls import OwnThread, call_in_thread
from cachetune_rag.text.tool_calls import ToolCall, ToolCallStream


@dataclass(frozen=True)
class Step:
    """What a stream has returned so far: the whole text, the newest piece, the `raw` of a response, and at the end the tool calls."""

    text: str
    delta: str
    raw: dict[str, Any]
    calls: tuple[ToolCall, ...] = ()

    @property
    def counts(self) -> dict[str, Any]:
        """Token counts, in the place where LlamaIndex's token counter looks for them."""
        return dict(self.raw.get("usage", {}))

    def completion(self) -> CompletionResponse:
        """The step of a completion."""
        return CompletionResponse(text=self.text, delta=self.delta, raw=self.raw, additional_kwargs=self.counts)

    def chat(self) -> ChatResponse:
        """The step of a chat."""
        message = ChatMessage(role=MessageRole.ASSISTANT, content=self.text)
        if self.calls:
            blocks = [ToolCallBlock(tool_call_id=_id(), tool_name=c.name, tool_kwargs=c.arguments) for c in self.calls]
            message.blocks = [TextBlock(text=self.text), *blocks] if self.text else [*blocks]
            # The framework's parser of streamed objects looks for them here.
            message.additional_kwargs["tool_calls"] = [_openai(block) for block in blocks]
        return ChatResponse(message=message, delta=self.delta, raw=self.raw, additional_kwargs=self.counts)


@dataclass
class Request:
    """One request to the engine.

    Attributes:
        begin: starts the request.
        on_step: called with the report so far at each step, in the context of the code that reads the answer.
        keep_report: called with the report so far at each step, and once more when the stream is closed before its end. That last
            call may come from any thread and in any context, such as the garbage collector's.
        tools: the names of the tools that the model was shown; None if it was shown none.
    """

    begin: Callable[[], AnswerStream]
    on_step: Callable[[Report], None]
    keep_report: Callable[[Report], None]
    tools: Collection[str] | None = None

    def answer(self) -> Step:
        """The last step."""
        *_, last = self.steps()
        return last

    def steps(self) -> Iterator[Step]:
        """The answer piece by piece. The request begins now, not when the first piece is asked for."""
        stream = self.begin()
        return self._steps(stream)

    async def aanswer(self) -> Step:
        """As `answer`, on a thread of its own. The model stops when the task is cancelled."""
        last = await call_in_thread(self.answer)
        if self._report is not None:
            self.on_step(self._report)  # the thread that answered has another context
        return last

    async def asteps(self) -> AsyncIterator[Step]:
        """As `steps`. Everything that waits for the model runs on a thread of this request."""
        thread = OwnThread()
        try:
            stream = await thread.call(self.begin)
        except BaseException:
            thread.close()
            raise
        return self._asteps(stream, thread)

    # -- inside ---------------------------------------------------------------------------------------------------

    _report: Report | None = field(default=None, init=False)

    def _steps(self, stream: AnswerStream) -> Iterator[Step]:
        progress = _Progress(self.tools)
        finished = False
        try:
            for piece in stream:
                yield progress.step(piece, self._raw(stream))
            finished = True
            # One more step for the counts, so that an empty answer has a step too.
            yield progress.end(self._end(stream))
        finally:
            if not finished:
                self._close_early(stream)

    async def _asteps(self, stream: AnswerStream, thread: OwnThread) -> AsyncIterator[Step]:
        progress = _Progress(self.tools)
        finished = False
        try:
            while (piece := await thread.call(next, stream, None)) is not None:
                yield progress.step(piece, self._raw(stream))
            finished = True
            yield progress.end(self._end(stream))
        finally:
            if not finished:
                # The reader was cancelled or has closed this generator, and must not be kept waiting. The token that is being
                # computed can't be stopped, so the stream is closed after it, on the same thread.
                thread.later(self._close_early, stream)
            thread.close()

    def _close_early(self, stream: AnswerStream) -> None:
        stream.close()
        if self._report is not None:  # closing has added the chunks that will be stored
            self.keep_report(stream.report)

    def _tell(self, report: Report) -> None:
        self._report = report
        self.on_step(report)
        self.keep_report(report)

    def _raw(self, stream: AnswerStream) -> dict[str, Any]:
        self._tell(stream.report)
        return {"report": stream.report.as_dict()}

    def _end(self, stream: AnswerStream) -> dict[str, Any]:
        answer = stream.answer
        self._tell(answer.report)
        return {
            "report": answer.report.as_dict(),
            "finish_reason": answer.finish_reason,
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": len(answer.token_ids),
                "total_tokens": answer.prompt_tokens + len(answer.token_ids),
            },
        }


class _Progress:
    """The text so far. Text that may be a tool call is held back until this is clear."""

    def __init__(self, tools: Collection[str] | None):
        self._text = ""
        self._calls = None if tools is None else ToolCallStream(tools)

    def step(self, piece: str, raw: dict[str, Any]) -> Step:
        if self._calls is not None:
            piece = self._calls.push(piece)
        self._text += piece
        return Step(self._text, piece, raw)

    def end(self, raw: dict[str, Any]) -> Step:
        rest, calls = ("", []) if self._calls is None else self._calls.finish()
        self._text += rest
        return Step(self._text, rest, raw, tuple(calls))


def _id() -> str:
    return f"call_{uuid4().hex}"


def _openai(block: ToolCallBlock) -> dict[str, Any]:
    arguments = json.dumps(block.tool_kwargs, ensure_ascii=False)
    return {
        "id": block.tool_call_id,
        "type": "function",
        "function": {"name": block.tool_name, "arguments": arguments},
    }
