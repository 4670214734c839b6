"""The engine as a LlamaIndex LLM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from cachetune_rag import AnswerStream, CacheTune, Prompt, Report, Text
from cachetune_rag.async_calls import call_in_thread
from llama_index.llms.cachetune.blocks import engine_messages, plain_segments

_LOADING = threading.Lock()


@dataclass(frozen=True)
class _Step:
    """What a stream has given so far: the whole text, the newest piece, and what goes into a response's raw."""

    text: str
    delta: str
    raw: dict[str, Any]

    @property
    def counts(self) -> dict[str, Any]:
        """Token counts, where LlamaIndex's token counter looks for them."""
        return dict(self.raw.get("usage", {}))


class CacheTuneLLM(CustomLLM):
    """A LlamaIndex LLM that reuses the KV of the stored chunks it finds in its prompts.

    Args:
        engine: the engine; or else it is loaded from `model` at the first use.
        model: path or hub id for `CacheTune.from_pretrained`; with an engine, only a name.
        store: folder of the KV store.
        engine_kwargs: further arguments of `CacheTune.from_pretrained`.
        max_new_tokens: most tokens of an answer.
        ratio, selector: what is recomputed, see `CacheTune.stream`.
        generate_kwargs: sampling settings (do_sample, temperature, top_p, ...) and stop, for every request. A request's
            own keyword arguments override them.

    The report of a request is at `raw["report"]` of its response and at `last_report`. Any number of threads may use one
    instance; the model runs one forward at a time.
    """

    model: str = Field(default="", description="Path or hub id of the model.")
    store: str | None = Field(default=None, description="Folder of the KV store.")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of CacheTune.from_pretrained.")
    max_new_tokens: int = Field(default=256, gt=0, description="Most tokens of an answer.")
    ratio: float | str = Field(default="auto", description="Share of the chunk tokens to recompute, or 'auto'.")
    selector: str = Field(default="auto", description="Which tokens are recomputed.")
    generate_kwargs: dict[str, Any] = Field(default_factory=dict, description="Sampling settings of every request.")

    _engine: CacheTune | None = PrivateAttr(default=None)
    _last_report: Report | None = PrivateAttr(default=None)

    def __init__(self, engine: CacheTune | None = None, **kwargs: Any):
        if engine is not None:
            kwargs.setdefault("model", str(getattr(engine.adapter.config, "_name_or_path", "")))
            if engine.store.path is not None:
                kwargs.setdefault("store", str(engine.store.path))
        elif not kwargs.get("model"):
            raise ValueError("CacheTuneLLM needs engine=, or model= (a path or hub id) and store= to load one.")
        super().__init__(**kwargs)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "CacheTuneLLM"

    @property
    def engine(self) -> CacheTune:
        """The engine, loaded at the first use."""
        engine: CacheTune | None = getattr(self, "_engine", None)  # a copy that came through pickle has lost it
        if engine is None:
            with _LOADING:
                engine = getattr(self, "_engine", None)
                if engine is None:
                    engine = CacheTune.from_pretrained(self.model, self.store, **self.engine_kwargs)
                    self._engine = engine
        return engine

    @property
    def last_report(self) -> Report | None:
        """Report of the request that got furthest most recently, whichever thread made it."""
        return self._last_report

    @property
    def metadata(self) -> LLMMetadata:
        """What the framework plans prompts by."""
        engine = self.engine
        return LLMMetadata(
            context_window=engine.adapter.max_positions or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_new_tokens,
            is_chat_model=bool(getattr(engine.tokenizer, "chat_template", None)),
            model_name=self.model,
        )

    # -- completion -----------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponse:
        """Answer a prompt.

        Args:
            prompt: the prompt; a chat model takes it as one user message, unless `formatted`.
            formatted: the prompt is complete as it is.
            built: the same prompt as the engine reads it, if that is known already; `prompt` is for callbacks then.
            kwargs: max_new_tokens, stop, ratio, selector and sampling settings of this request.
        """
        return _completion(self._last(self._steps(self._completion(prompt, formatted, built, kwargs))))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponseGen:
        """As `complete`, piece by piece."""
        stream = self._completion(prompt, formatted, built, kwargs)
        return (_completion(step) for step in self._steps(stream))

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponse:
        """As `complete`; the model runs in another thread, and stops when the task is cancelled."""
        return _completion(await self._alast(lambda: self._completion(prompt, formatted, built, kwargs)))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """As `stream_complete`; the model runs in another thread."""
        stream = await call_in_thread(self._completion, prompt, formatted, built, kwargs)

        async def responses() -> CompletionResponseAsyncGen:
            async for step in self._asteps(stream):
                yield _completion(step)

        return responses()

    # -- chat -----------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any) -> ChatResponse:
        """Answer a conversation. A `ChunkBlock` in a message is a chunk; others are found in the text.

        Args:
            messages: the conversation.
            built: the same as the engine reads it, if that is known already; `messages` are for callbacks then.
            kwargs: as for `complete`.
        """
        return _chat(self._last(self._steps(self._conversation(messages, built, kwargs))))

    @llm_chat_callback()
    def stream_chat(
        self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any
    ) -> ChatResponseGen:
        """As `chat`, piece by piece."""
        stream = self._conversation(messages, built, kwargs)
        return (_chat(step) for step in self._steps(stream))

    @llm_chat_callback()
    async def achat(
        self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any
    ) -> ChatResponse:
        """As `chat`; the model runs in another thread, and stops when the task is cancelled."""
        return _chat(await self._alast(lambda: self._conversation(messages, built, kwargs)))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """As `stream_chat`; the model runs in another thread."""
        stream = await call_in_thread(self._conversation, messages, built, kwargs)

        async def responses() -> ChatResponseAsyncGen:
            async for step in self._asteps(stream):
                yield _chat(step)

        return responses()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _completion(self, prompt: str, formatted: bool, built: Prompt | None, options: dict[str, Any]) -> AnswerStream:
        if built is not None:
            return self._start(built, options)
        content = [Text(prompt)]
        if formatted or not self.metadata.is_chat_model:
            return self._start(self.engine.prompt_from_text(content), options)
        return self._start(self.engine.prompt_from_messages([{"role": "user", "content": content}]), options)

    def _conversation(
        self, messages: Sequence[ChatMessage], built: Prompt | None, options: dict[str, Any]
    ) -> AnswerStream:
        if built is not None:
            return self._start(built, options)
        if self.metadata.is_chat_model:
            return self._start(self.engine.prompt_from_messages(engine_messages(messages)), options)
        return self._start(self.engine.prompt_from_text(plain_segments(messages)), options)

    def _start(self, prompt: Prompt, options: dict[str, Any]) -> AnswerStream:
        settings = {
            "max_new_tokens": self.max_new_tokens,
            "ratio": self.ratio,
            "selector": self.selector,
            **self.generate_kwargs,
            **options,
        }
        if "max_tokens" in settings:  # what most other LLMs of the framework call it
            settings["max_new_tokens"] = settings.pop("max_tokens")
        return self.engine.stream(prompt=prompt, **settings)

    def _steps(self, stream: AnswerStream) -> Iterator[_Step]:
        text = ""
        with stream:
            for piece in stream:
                text += piece
                yield self._step(stream, text, piece)
            # One more, so that the counts arrive, and an empty answer is an answer.
            yield self._end(stream, text)

    async def _asteps(self, stream: AnswerStream) -> AsyncIterator[_Step]:
        text = ""
        pull: Callable[[], str | None] = lambda: next(stream, None)  # noqa: E731
        while True:
            turn = asyncio.ensure_future(call_in_thread(pull))
            try:
                piece = await asyncio.shield(turn)
            except asyncio.CancelledError:
                # The forward under way can't be stopped, only waited for; nobody is left to wait.
                turn.add_done_callback(lambda _: stream.close())
                raise
            if piece is None:
                break
            text += piece
            try:
                yield self._step(stream, text, piece)
            except GeneratorExit:
                stream.close()
                raise
        yield self._end(stream, text)

    def _step(self, stream: AnswerStream, text: str, piece: str) -> _Step:
        self._last_report = stream.report
        return _Step(text, piece, {"report": stream.report.as_dict()})

    def _end(self, stream: AnswerStream, text: str) -> _Step:
        answer = stream.answer
        self._last_report = answer.report
        return _Step(
            text,
            "",
            {
                "report": answer.report.as_dict(),
                "finish_reason": answer.finish_reason,
                "usage": {
                    "prompt_tokens": answer.prompt_tokens,
                    "completion_tokens": len(answer.token_ids),
                    "total_tokens": answer.prompt_tokens + len(answer.token_ids),
                },
            },
        )

    async def _alast(self, begin: Callable[[], AnswerStream]) -> _Step:
        cancelled = threading.Event()

        def answer() -> _Step:
            last = _Step("", "", {})
            for step in self._steps(begin()):
                last = step
                if cancelled.is_set():
                    break  # which closes the stream
            return last

        try:
            return await call_in_thread(answer)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @staticmethod
    def _last(steps: Iterator[_Step]) -> _Step:
        *_, last = steps
        return last


def _completion(step: _Step) -> CompletionResponse:
    return CompletionResponse(text=step.text, delta=step.delta, raw=step.raw, additional_kwargs=step.counts)


def _chat(step: _Step) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=step.text)
    return ChatResponse(message=message, delta=step.delta, raw=step.raw, additional_kwargs=step.counts)
