"""The engine as a LangChain chat model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import run_in_executor
from langchain_core.utils import from_env
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from cachetune_rag import Answer, AnswerStream, CacheTune, Prompt, Report
from langchain_cachetune.messages import engine_messages

_LOADING = threading.Lock()


class ChatCacheTune(BaseChatModel):
    """A chat model that reuses the KV of retrieved chunks.

    Chunks are the text blocks made by `chunk_block`, and all stored chunks found in the text of the messages. The report
    of a request is in the answer's `response_metadata["report"]`; usage counts reused tokens as `cache_read` and
    chunks that were computed and stored as `cache_creation`.

    Args:
        engine: the engine; or else it is loaded from `model` at the first use.
        model: path or hub id for `CacheTune.from_pretrained` (default: $CACHETUNE_MODEL); with an engine, only a name.
        store: folder of the KV store (default: $CACHETUNE_STORE).
        engine_kwargs: further arguments of `CacheTune.from_pretrained`.
        max_tokens: most tokens of an answer.
        temperature: above 0 samples, 0 is greedy; default: the model's own generation config.
        stop: strings that end an answer.
        ratio, selector: what is recomputed, see `CacheTune.stream`.
        generate_kwargs: further sampling settings (top_p, repetition_penalty, seed, ...).

    All but the first four can be given per request too. Any number of threads may use one instance.
    """

    engine: CacheTune | None = Field(default=None, exclude=True, repr=False)
    model: str = Field(default_factory=from_env("CACHETUNE_MODEL", default=""))
    store: str | None = Field(default_factory=from_env("CACHETUNE_STORE", default=None))
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    max_tokens: int = Field(default=256, gt=0)
    temperature: float | None = Field(default=None, ge=0)
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    ratio: float | str = "auto"
    selector: str = "auto"
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)

    _last_report: Report | None = PrivateAttr(default=None)

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    @model_validator(mode="after")
    def _name_engine(self) -> ChatCacheTune:
        if self.engine is not None:
            # Whoever loads a saved copy of this model needs to know what the engine was made of.
            if "model" not in self.model_fields_set:
                self.model = str(getattr(self.engine.adapter.config, "_name_or_path", ""))
            if "store" not in self.model_fields_set and self.engine.store.path is not None:
                self.store = str(self.engine.store.path)
        elif not self.model:
            raise ValueError("ChatCacheTune needs engine=, or model= (a path or hub id, or $CACHETUNE_MODEL).")
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain may save it: yes, without the engine, which is loaded again from `model` and `store`."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class again."""
        return ["langchain_cachetune", "chat_model"]

    @property
    def last_report(self) -> Report | None:
        """Report of the latest request, whichever thread made it."""
        return self._last_report

    @property
    def _llm_type(self) -> str:
        return "cachetune"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model", "store", "max_tokens", "temperature", "stop", "ratio", "selector", "generate_kwargs")
        return {name: getattr(self, name) for name in names}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "cachetune"
        return params

    def get_num_tokens(self, text: str) -> int:
        """Tokens of a text as it would stand in a prompt."""
        return len(self._loaded().prompts.encode(text))

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text as it would stand in a prompt."""
        return self._loaded().prompts.encode(text)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._answer(messages, stop, kwargs, threading.Event())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        # In another thread, as by default, but it stops when the task is cancelled.
        cancelled = threading.Event()
        try:
            return await run_in_executor(None, self._answer, messages, stop, kwargs, cancelled)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def _answer(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any], cancelled: threading.Event
    ) -> ChatResult:
        with self._start(messages, stop, options) as pieces:
            for _ in pieces:
                if cancelled.is_set():
                    raise RuntimeError("cancelled")  # nobody hears it
            answer = pieces.answer
        self._last_report = answer.report
        message = AIMessage(
            content=answer.text, response_metadata=self._metadata(answer), usage_metadata=_usage(answer)
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._start(messages, stop, kwargs) as pieces:
            for piece in pieces:
                self._last_report = pieces.report
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            answer = pieces.answer
        self._last_report = answer.report
        last = AIMessageChunk(
            content="",
            response_metadata=self._metadata(answer),
            usage_metadata=_usage(answer),
            chunk_position="last",
        )
        chunk = ChatGenerationChunk(message=last)
        if run_manager is not None:
            run_manager.on_llm_new_token("", chunk=chunk)
        yield chunk

    def _start(self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> AnswerStream:
        settings: dict[str, Any] = {"ratio": self.ratio, "selector": self.selector, **self.generate_kwargs}
        settings["max_new_tokens"] = options.pop("max_tokens", self.max_tokens)
        temperature = options.pop("temperature", self.temperature)
        if temperature is not None:
            settings["do_sample"] = temperature > 0
            if temperature > 0:
                settings["temperature"] = temperature
        settings["stop"] = stop or self.stop
        return self._loaded().stream(prompt=self._prompt(messages), **{**settings, **options})

    def _prompt(self, messages: list[BaseMessage]) -> Prompt:
        engine = self._loaded()
        converted = engine_messages(messages)
        if getattr(engine.tokenizer, "chat_template", None) or len(converted) != 1:
            return engine.prompt_from_messages(converted)
        # A base model knows no conversations, but it does continue a single text.
        return engine.prompt_from_text(converted[0]["content"])

    def _loaded(self) -> CacheTune:
        if self.engine is None:
            with _LOADING:
                if self.engine is None:
                    self.engine = CacheTune.from_pretrained(self.model, self.store, **self.engine_kwargs)
        return self.engine

    def _metadata(self, answer: Answer) -> dict[str, Any]:
        return {
            "report": answer.report.as_dict(),
            "finish_reason": answer.finish_reason,
            "model_name": self.model,
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
