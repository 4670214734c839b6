"""The engine as a LangChain chat model."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils import from_env
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from cachetune_rag import CacheTune, Report
from cachetune_rag.concurrency.async_calls import OwnThread, call_in_thread
from cachetune_rag.errors import ConfigError
from cachetune_rag.options import REUSE_NAMES
from cachetune_rag.reuse.config import check_kept_reuse
from cachetune_store.printing import shown
from langchain_cachetune import settings
from langchain_cachetune.chat_request import ChatRequest, Deadline
from langchain_cachetune.prompting import build_prompt, takes_tools, template_names
from langchain_cachetune.runs import RunRecord, latest_report
from langchain_cachetune.tools import (
    METHODS,
    ToolRequest,
    output_parser,
    schema_format,
)

_loading = threading.Lock()
_REQUEST = {"max_tokens", "temperature", "stop", "timeout", *settings.REUSE, *settings.TOOLS}
"""Arguments of a request besides generation settings and the chat template's arguments."""


def _after_fork() -> None:
    """In a forked process no engine is being loaded, whoever held the lock at the fork."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class ChatCacheTune(BaseChatModel):
    """A chat model that reuses the KV of retrieved chunks.

    Chunks are the text blocks made by `chunk_block`, and all stored chunks found in the text of the messages. The report
    of a request is in the answer's `response_metadata["report"]`; usage counts reused tokens as `cache_read` and
    chunks that were computed and stored as `cache_creation`.

    Args:
        engine: the engine. None: it is loaded from `model` at the first use.
        model: path or hub id for `CacheTune.from_pretrained` (default: $CACHETUNE_MODEL). With an engine, it is only a name.
            Can also be given as model_name.
        store: folder of the KV store (default: $CACHETUNE_STORE).
        engine_kwargs: further arguments of `CacheTune.from_pretrained`.
        max_tokens: most tokens of an answer. Can also be given as max_new_tokens or max_completion_tokens. If it is not given, the
            limit of `generation_config` or of the model counts, or 256 if they have none. None: the same, but the answer may go
            to the end of the context if they have none.
        temperature: above 0 samples, 0 is greedy. Default: as in the model's generation config.
        stop: strings that end an answer. Can also be given as stop_sequences.
        timeout: seconds for an answer. It is checked between pieces of the answer, and raises `TimeoutError`.
        ratio, selector, max_kl, min_top1, min_sure: what is recomputed, and when reuse is given up. See `CacheTune.stream`.
        generate_kwargs: further sampling settings (top_p, repetition_penalty, seed, ...). They can also be given directly:
            `ChatCacheTune(..., top_p=0.9)`.
        learn: whether texts that retrievers returned and a prompt shows unchanged, but the store doesn't have, are stored after
            the answer under their document's id, as if they had been precomputed. Documents without an id are never stored.
        streaming: whether `invoke` also streams the answer, for callbacks that want tokens.
        max_retries, api_key: usual arguments in LangChain. They are accepted, but a local model needs neither.

    All but the first four can also be given to a request, together with arguments of the tokenizer's chat template. An unknown argument
    is refused. Any number of threads may use one instance. A deep copy shares the engine. An instance can be pickled if it loads its
    engine itself; the copy then loads it again.
    """

    engine: CacheTune | None = Field(default=None, exclude=True, repr=False)
    model: str = Field(default_factory=from_env("CACHETUNE_MODEL", default=""))
    store: str | None = Field(default_factory=from_env("CACHETUNE_STORE", default=None))
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    max_tokens: int | None = Field(default=256, gt=0, strict=True)
    temperature: float | None = Field(default=None, ge=0, strict=True)
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    timeout: float | None = Field(default=None, gt=0, strict=True)
    ratio: float | str = "auto"
    selector: str = "auto"
    max_kl: float | None = None
    min_top1: float | None = None
    min_sure: float | None = None
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)
    learn: bool = Field(default=True, strict=True)
    streaming: bool = Field(default=False, strict=True)
    max_retries: int | None = Field(default=None, exclude=True)
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)

    _loads: bool = PrivateAttr(default=False)
    _latest: Report | None = PrivateAttr(default=None)
    _reports: object = PrivateAttr(default_factory=object)

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Give arguments that other models name differently their name here, collect sampling settings, and refuse unknown ones."""
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        try:
            given = settings.renamed(values, "ChatCacheTune")
            others = settings.generation_names() - set(fields)
            sampling = {name: given.pop(name) for name in others if name in given}
            twice = sorted(sampling.keys() & (given.get("generate_kwargs") or {}).keys())
            if twice:
                raise ConfigError(f"{', '.join(twice)} stands in generate_kwargs as well: give it once.")
            settings.take_length(given)
            if sampling:
                given["generate_kwargs"] = {**(given.get("generate_kwargs") or {}), **sampling}
            known = {*fields, *settings.ALIASES, *settings.generation_names()}
            settings.refuse_unknown(given, known, "ChatCacheTune")
            check_kept_reuse(given, given.get("generate_kwargs"))  # before they are turned into what the fields hold
        except ConfigError as error:
            raise ValueError(str(error)) from error  # as pydantic wants it
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        return given

    @model_validator(mode="after")
    def _name_engine(self) -> Self:
        if self.engine is not None:
            # A saved copy of this model has to say which engine to load.
            if "model" not in self.model_fields_set:
                self.model = str(getattr(self.engine.adapter.config, "_name_or_path", ""))
            if "store" not in self.model_fields_set and self.engine.store.path is not None:
                self.store = str(self.engine.store.path)
        elif not self.model:
            raise ValueError("ChatCacheTune needs engine=, or model= (a path or hub id, or $CACHETUNE_MODEL).")
        else:
            self._loads = True
        try:
            settings.check_engine_options(self.engine_kwargs)
            self._check_generation(self.generate_kwargs)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def _reuse(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in REUSE_NAMES}

    def _check_generation(self, given: Mapping[str, Any]) -> None:
        known = {*settings.generation_names(), *settings.REUSE}
        if self.engine is None:
            # The chat template's arguments are checked when the engine is loaded.
            return
        arguments = template_names(self.engine, given)
        settings.refuse_unknown(given, known | self.engine.prompts.argument_names, "generate_kwargs")
        sampling = {name: value for name, value in given.items() if name not in arguments | set(settings.REUSE)}
        settings.check_sampling(self.engine, sampling)

    # -- what LangChain asks of a model ---------------------------------------------------------------------------

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
        """The report of the latest request of the run in this context (a thread or asyncio task), or else of any run.

        `collect_reports` gives the reports of a whole chain.
        """
        return latest_report(self._reports) or self._latest

    @property
    def _llm_type(self) -> str:
        return "cachetune"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model", "store", "max_tokens", "temperature", "stop", *REUSE_NAMES, "generate_kwargs")
        return {name: getattr(self, name) for name in names}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "cachetune"
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of an answer in LangChain's cache. It contains all that an answer depends on, above all the model's weights."""
        engine = self._loaded()
        namespace, config = engine.namespace, getattr(engine.adapter.model, "generation_config", None)
        parts = {
            "model": namespace.model,
            "tokenizer": namespace.tokenizer,
            "dtype": namespace.dtype,
            "tenant": namespace.tenant,
            "lead_ins": namespace.digest,
            "chat_template": str(getattr(engine.tokenizer, "chat_template", None)),
            "generation_config": config.to_json_string() if config is not None else "",
            "settings": {name: repr(value) for name, value in self._identifying_params.items()},
        }
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{json.dumps(parts, sort_keys=True)}"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with its own settings and the same engine, because models and stores can't be copied."""
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        """The state for a pickle, which says how to load the engine again.

        Raises:
            PicklingError: this object was given an engine, so it isn't known how to load it.
        """
        if not self._loads:
            raise pickle.PicklingError(
                "this ChatCacheTune was given an engine, and how that was made is not known, so it can't be loaded again "
                "elsewhere: make it with model=, store= and engine_kwargs= instead of engine=, or in each process anew."
            )
        state: dict[Any, Any] = super().__getstate__()
        return {
            **state,
            "__dict__": {**state["__dict__"], "engine": None},
            "__pydantic_private__": {"_loads": True, "_latest": None},
        }

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore the state from a pickle. The engine is loaded at the first use."""
        super().__setstate__({**state, "__pydantic_private__": {**state["__pydantic_private__"], "_reports": object()}})

    def get_num_tokens(self, text: str) -> int:
        """Tokens of a text as it would stand in a prompt."""
        return len(self._loaded().prompts.encode(text))

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text as it would stand in a prompt."""
        return self._loaded().prompts.encode(text)

    # -- tools and structured output ------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model that is shown these tools and may call them.

        The tokenizer's chat template lays them out if it knows tools; otherwise the system message describes them, as for
        Hermes. Calls are read from the answer's text. Whether a model calls well is up to the model.

        Args:
            tools: tools, functions, pydantic classes or schemas.
            tool_choice: "auto"; "none"; "any" (or True, or "required"): the prompt asks for a call; a tool's name: only this tool
                is shown, and the prompt asks to call it. The model may not follow.
            strict: is passed on in the tools' schemas. It doesn't force the model to follow them.
            kwargs: further arguments of the requests.

        Raises:
            ConfigError: tool_choice is invalid, or an argument is unknown.
        """
        formats = {name: value for name, value in kwargs.items() if name != "ls_structured_output_format"}
        self._check_request(formats)
        made = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        ToolRequest.of(made, tool_choice)
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=made, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A model whose answers are parsed into a schema. The prompt asks for it, but the model may not follow. An answer that can't
        be parsed raises `OutputParserException` (or is in `parsing_error`).

        Args:
            schema: a pydantic class, TypedDict, or JSON schema.
            include_raw: return {"raw", "parsed", "parsing_error"}.
            method: "function_calling": a tool call; "json_schema": the prompt has the schema; "json_mode": your own prompt
                describes the JSON. Default: "function_calling" where the tokenizer's chat template knows tools, else
                "json_schema".
            strict: as for `bind_tools`.
            kwargs: further arguments of the requests.

        Raises:
            ConfigError: an unknown method or argument.
        """
        if method is None:
            # Without an engine the template isn't known yet. A schema in the prompt works with every model.
            method = METHODS[0] if self.engine is not None and takes_tools(self.engine) else METHODS[1]
        if method not in METHODS:
            raise ConfigError(f"method is {shown(method)}: use {', '.join(METHODS)}.")
        described = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        model: Runnable[LanguageModelInput, AIMessage]
        if method == "function_calling":
            model = self.bind_tools(
                [schema], tool_choice="any", strict=strict, ls_structured_output_format=described, **kwargs
            )
        else:
            self._check_request(kwargs)
            model = self.bind(
                response_format=schema_format(schema, method), ls_structured_output_format=described, **kwargs
            )
        parser = output_parser(schema, method)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=lambda raw: parser.invoke(raw["raw"]), parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    # -- answering ------------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._answer(messages, stop, kwargs, RunRecord())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        # It runs on a thread of its own, because it may wait long for the model. It stops when the task is cancelled.
        return await call_in_thread(self._answer, messages, stop, kwargs, RunRecord())

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        options: dict[str, Any],
        run: RunRecord,
    ) -> ChatResult:
        request = self._request(messages, stop, options, run)
        with request.stream as pieces:
            for _ in pieces:
                request.check_time()
            answer = pieces.answer
        self._keep_report(run, answer.report)
        return ChatResult(generations=[ChatGeneration(message=request.message(answer))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages, stop, kwargs, RunRecord()):
            if run_manager is not None:
                run_manager.on_llm_new_token(str(chunk.message.content), chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chunks = self._chunks(messages, stop, kwargs, RunRecord())
        with OwnThread() as thread:
            try:
                while (chunk := await thread.call(next, chunks, None)) is not None:
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(str(chunk.message.content), chunk=chunk)
                    yield chunk
            finally:
                # Nothing may be awaited here, because this also runs while an event loop shuts down, which would drop the task.
                # The stream is closed on its thread, after the piece that is being computed.
                thread.later(chunks.close)

    def _chunks(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any], run: RunRecord
    ) -> Any:
        """Parts of the answer's message. Text that may be a tool call comes at the end, in one piece."""
        request = self._request(messages, stop, options, run)
        reader = request.tool_call_reader()
        with request.stream as pieces:
            try:
                for piece in pieces:
                    self._keep_report(run, pieces.report, whole=False)
                    request.check_time()
                    shown = reader.push(piece) if reader else piece
                    if shown:
                        yield ChatGenerationChunk(message=AIMessageChunk(content=shown))
            except (GeneratorExit, asyncio.CancelledError):  # the stream is closed early, which ends the request
                pieces.close()
                self._keep_report(run, pieces.report)
                raise
            answer = pieces.answer
        self._keep_report(run, answer.report)
        rest, calls = reader.finish() if reader else ("", [])
        yield ChatGenerationChunk(message=request.last_chunk(answer, rest, calls))

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any], run: RunRecord
    ) -> ChatRequest:
        started = time.monotonic()
        engine = self._loaded()
        given = self._check_request(options)
        tools = ToolRequest.of(*(given.pop(name, None) for name in settings.TOOLS))
        timeout: float | None = given.pop("timeout", self.timeout)
        # If no limit was given, that of the generation config counts.
        own_limit = self.max_tokens if "max_tokens" in self.model_fields_set else "auto"
        decoding = settings.decoding_settings(
            max_tokens=given.pop("max_tokens", own_limit),
            temperature=given.pop("temperature", self.temperature),
            stop=stop or given.pop("stop", None) or self.stop,
            others={**self._reuse(), **self.generate_kwargs, **given},
        )
        layout = {name: decoding.pop(name) for name in template_names(engine, decoding)}
        prompt = build_prompt(engine, messages, tools, layout, run.documents, learn=self.learn)
        return ChatRequest(
            stream=engine.stream(prompt=prompt, **decoding),
            tools=tools,
            model_name=self.model or engine.model_name,
            deadline=None if timeout is None else Deadline(started, timeout),
        )

    def _keep_report(self, run: RunRecord, report: Report, *, whole: bool = True) -> None:
        self._latest = report
        run.report(self._reports, report, whole=whole)

    def _check_request(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A request's arguments under the names of this class.

        Raises:
            ConfigError: an argument is unknown.
        """
        given = settings.renamed(options, "a request")
        known = {*_REQUEST, *settings.generation_names()}
        others = [name for name in given if name not in known]
        if others and self.engine is not None:
            known |= self.engine.prompts.argument_names
        settings.refuse_unknown(others, known, "a request to ChatCacheTune")
        return given

    def _loaded(self) -> CacheTune:
        if self.engine is None:
            with _loading:
                if self.engine is None:
                    engine = CacheTune.from_pretrained(self.model, self.store, **self.engine_kwargs)
                    self.engine = engine
                    self._check_generation(self.generate_kwargs)
        return self.engine
