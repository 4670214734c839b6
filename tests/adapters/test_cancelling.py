"""A cancelled task of a framework stops the model before its next token."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune
from langchain_cachetune import ChatCacheTune
from llama_index.llms.cachetune import CacheTuneLLM

_SILENT = 1
"""The beginning-of-text token, which has no text: a stream that is asked for its next piece goes on to the next token."""


class _Gate:
    """A logits processor that chooses a token without text, and stops at the third until it is let go."""

    def __init__(self) -> None:
        self.tokens = 0
        self.there, self.go = threading.Event(), threading.Event()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tokens += 1
        if self.tokens == 3:
            self.there.set()
            assert self.go.wait(60)
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, _SILENT] = 0
        return chosen


async def _read(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


def _calls(engine: CacheTune, gate: _Gate) -> dict[str, Callable[[], Coroutine[Any, Any, object]]]:
    index = CacheTuneLLM(engine, max_new_tokens=200, generate_kwargs={"logits_processor": [gate]})
    chat = ChatCacheTune(engine=engine, max_tokens=200, generate_kwargs={"logits_processor": [gate]})

    async def index_stream() -> None:
        await _read(await index.astream_complete("hi"))

    return {
        "LlamaIndex acomplete": lambda: index.acomplete("hi"),
        "LlamaIndex astream_complete": index_stream,
        "LangChain ainvoke": lambda: chat.ainvoke("hi"),
        "LangChain astream": lambda: _read(chat.astream("hi")),
    }


@pytest.mark.parametrize(
    "name", ["LlamaIndex acomplete", "LlamaIndex astream_complete", "LangChain ainvoke", "LangChain astream"]
)
async def test_no_token_begins_after_the_cancellation(engine: CacheTune, name: str) -> None:
    gate = _Gate()
    task = asyncio.ensure_future(_calls(engine, gate)[name]())
    while not gate.there.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    gate.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    while engine.runtime.model.lock.wanted:  # until the request's thread has closed the stream
        await asyncio.sleep(0.001)
    assert gate.tokens == 3


async def test_a_request_cancelled_while_it_waits_for_the_model_is_not_made(engine: CacheTune) -> None:
    gate = _Gate()
    llm = CacheTuneLLM(engine, max_new_tokens=200)
    lock = engine.runtime.model.lock
    with lock:
        task = asyncio.ensure_future(llm.acomplete("hi", logits_processor=[gate]))
        while not lock.wanted:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    while lock.wanted:
        await asyncio.sleep(0.001)
    assert gate.tokens == 0
