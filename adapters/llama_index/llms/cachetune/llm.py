"""The engine as a LlamaIndex LLM."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, model_validator
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW, DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import PydanticProgramMode

from cachetune_rag import AnswerStream, CacheTune, Prompt, PromptTooLongError, Report
from cachetune_rag.options import REUSE_NAMES
from llama_index.llms.cachetune import last_reports
from llama_index.llms.cachetune.answers import Request
from llama_index.llms.cachetune.arguments import (
    check_engine_kwargs,
    check_generate_kwargs,
    check_sampling,
    check_settings,
    settle_names,
)
from llama_index.llms.cachetune.prompts import PromptMaker
from llama_index.llms.cachetune.tools import ToolCalling
from llama_index.llms.cachetune.traces import TRACES

_loading = threading.Lock()


def _after_fork() -> None:
    """In a forked process no engine is being loaded, whoever held the lock at the fork."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Unlaid(str):
    """A prompt that only lacks the layout by `completion_to_prompt`."""


class CacheTuneLLM(ToolCalling, CustomLLM):
    """A LlamaIndex LLM that reuses the KV of the stored chunks it finds in its prompts.

    Args:
        engine: the engine. None: it is loaded from `model` at the first use.
        model: path or hub id for `CacheTune.from_pretrained`. With an engine, it is only a name.
        store: folder of the KV store.
        engine_kwargs: further arguments of `CacheTune.from_pretrained`.
        max_new_tokens: most tokens of an answer (also as `max_tokens`); None: as the model's configuration says.
        context_window: a smaller number of tokens than the model's context, for which prompts are planned.
        ratio, selector, max_kl, min_top1, min_sure: what is recomputed, and when reuse is given up. See `CacheTune.stream`.
        generate_kwargs: sampling settings (do_sample, temperature, top_p, ...) and stop, for every request. They can also be given
            directly. A request's keyword arguments override them.
        learn_retrieved: whether nodes that were retrieved for a request, and are in its prompt but not stored, are computed as
            chunks and stored after the answer under their `ref_doc_id`, so that the next request finds them. False: only
            precomputed chunks are found.
        system_prompt, query_wrapper_prompt, messages_to_prompt, completion_to_prompt, output_parser, callback_manager, ...: as in
            LlamaIndex's own LLMs.

    The report of a request is at `raw["report"]` of its response and at `last_report`; a query engine's response has those of all
    its requests at `metadata["cachetune_reports"]`. Any number of threads and tasks may use one instance; the model runs one
    forward at a time.
    """

    model: str = Field(default="", description="Path or hub id of the model.")
    store: str | None = Field(default=None, description="Folder of the KV store.")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of CacheTune.from_pretrained.")
    max_new_tokens: int | None = Field(default=256, gt=0, strict=True, description="Most tokens of an answer.")
    context_window: int | None = Field(
        default=None, gt=0, strict=True, description="Tokens that prompts are planned for."
    )
    ratio: float | str = Field(default="auto", description="Share of the chunk tokens to recompute, or 'auto'.")
    selector: str = Field(default="auto", description="Which tokens are recomputed.")
    max_kl: float | None = Field(default=None, description="The most KL of an answer's first token, by prediction.")
    min_top1: float | None = Field(
        default=None, description="The least top-1 agreement of an answer's first token, by prediction."
    )
    min_sure: float | None = Field(
        default=None,
        description="The least probability of the likeliest candidate at each token, below which a prompt is read again in full.",
    )
    generate_kwargs: dict[str, Any] = Field(default_factory=dict, description="Sampling settings of every request.")
    learn_retrieved: bool = Field(
        default=True, strict=True, description="Whether retrieved nodes are stored where they aren't yet."
    )
    # Local models seldom write a tool call for a schema's sake; they follow a schema in the prompt's text.
    pydantic_program_mode: PydanticProgramMode = PydanticProgramMode.LLM

    _engine: CacheTune | None = PrivateAttr(default=None)
    _was_given: bool = PrivateAttr(default=False)
    _last_report: Report | None = PrivateAttr(default=None)

    def __init__(self, engine: CacheTune | None = None, **kwargs: Any):
        if engine is not None:
            kwargs.setdefault("model", str(getattr(engine.adapter.config, "_name_or_path", "")))
            if engine.store.path is not None:
                kwargs.setdefault("store", str(engine.store.path))
        elif not kwargs.get("model"):
            raise ValueError("CacheTuneLLM needs engine=, or model= (a path or hub id) and store= to load one.")
        super().__init__(**kwargs)
        self._engine, self._was_given = engine, engine is not None
        check_generate_kwargs(self.generate_kwargs, None if engine is None else PromptMaker(engine).argument_names)
        if engine is not None:
            check_sampling(engine, self.generate_kwargs)
        TRACES.install()

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        settled = settle_names(given, cls.model_fields)
        check_settings(settled)  # before they are turned into what the fields hold
        return settled

    @model_validator(mode="after")
    def _check_engine_kwargs(self) -> Self:
        check_engine_kwargs(self.engine_kwargs)
        return self

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "CacheTuneLLM"

    @property
    def engine(self) -> CacheTune:
        """The engine, loaded at the first use."""
        engine: CacheTune | None = getattr(self, "_engine", None)  # a copy that came through pickle has lost it
        if engine is None:
            with _loading:
                engine = getattr(self, "_engine", None)
                if engine is None:
                    engine = CacheTune.from_pretrained(self.model, self.store, **self.engine_kwargs)
                    self._engine = engine
        return engine

    @property
    def last_report(self) -> Report | None:
        """Report of the last request of this thread or task, or of those that it began; if there is none, of any request."""
        return last_reports.last(self) or self._last_report

    @property
    def metadata(self) -> LLMMetadata:
        """The values by which the framework plans prompts."""
        maker = self.prompt_maker
        context = self.engine.adapter.max_positions or self.context_window or DEFAULT_CONTEXT_WINDOW
        return LLMMetadata(
            context_window=min(context, self.context_window or context),
            num_output=self.max_new_tokens or DEFAULT_NUM_OUTPUTS,
            is_chat_model=maker.is_chat,
            is_function_calling_model=maker.takes_tools,
            model_name=self.model,
        )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy of the settings that shares the engine."""
        memo = {} if memo is None else memo
        if self._engine is not None:
            memo[id(self._engine)] = self._engine
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a pickle, without the engine, which the copy loads at its first use.

        Raises:
            pickle.PicklingError: this object was given an engine, so it isn't known how to load it.
        """
        if getattr(self, "_was_given", False):
            raise pickle.PicklingError(
                "this CacheTuneLLM was given an engine, which stays in its process: make it with model=, store= and "
                "engine_kwargs= instead, and each process loads an engine of its own."
            )
        # A copy, because the framework's own method deletes from the object what it can't pickle.
        bare = self.model_copy()
        bare.__pydantic_private__ = {**(bare.__pydantic_private__ or {}), "_engine": None}
        return super(CacheTuneLLM, bare).__getstate__()

    # -- completion -----------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponse:
        """Answer a prompt.

        Args:
            prompt: the prompt. For a chat model it becomes a user message, unless it is `formatted`.
            formatted: whether the prompt is complete as it is.
            built: the same prompt for the engine, if it was built already. `prompt` is only for callbacks then.
            kwargs: max_new_tokens, stop, ratio, selector and sampling settings of this request; and `retrieved`, the nodes
                that a retriever of your own returned, where the framework doesn't know them.
        """
        return self._completion(prompt, formatted, built, kwargs).answer().completion()

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponseGen:
        """As `complete`, piece by piece."""
        steps = self._completion(prompt, formatted, built, kwargs).steps()
        return (step.completion() for step in steps)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponse:
        """As `complete`, with the model on another thread. It stops when the task is cancelled."""
        return (await self._completion(prompt, formatted, built, kwargs).aanswer()).completion()

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, *, built: Prompt | None = None, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """As `stream_complete`, with the model on another thread."""
        steps = await self._completion(prompt, formatted, built, kwargs).asteps()
        return (step.completion() async for step in steps)

    # -- chat -----------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any) -> ChatResponse:
        """Answer a conversation. A `ChunkBlock` in a message is a chunk; others are found in the text.

        Args:
            messages: the conversation.
            built: the same prompt for the engine, if it was built already. `messages` are only for callbacks then.
            kwargs: as for `complete`; and `tools`, descriptions as in OpenAI's API, for a chat template that shows them.
        """
        return self._conversation(messages, built, kwargs).answer().chat()

    @llm_chat_callback()
    def stream_chat(
        self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any
    ) -> ChatResponseGen:
        """As `chat`, piece by piece."""
        steps = self._conversation(messages, built, kwargs).steps()
        return (step.chat() for step in steps)

    @llm_chat_callback()
    async def achat(
        self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any
    ) -> ChatResponse:
        """As `chat`, with the model on another thread. It stops when the task is cancelled."""
        return (await self._conversation(messages, built, kwargs).aanswer()).chat()

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], *, built: Prompt | None = None, **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """As `stream_chat`, with the model on another thread."""
        steps = await self._conversation(messages, built, kwargs).asteps()
        return (step.chat() async for step in steps)

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def prompt_maker(self) -> PromptMaker:
        """Makes prompts by this model's settings."""
        given, completion = self.messages_to_prompt, self.completion_to_prompt
        return PromptMaker(
            self.engine,
            learn=self.learn_retrieved,
            system_prompt=self.system_prompt,
            query_wrapper=self.query_wrapper_prompt,
            messages_layout=None if given is generic_messages_to_prompt else given,
            completion_layout=None if completion is default_completion_to_prompt else completion,
        )

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """A completion's prompt from a template.

        The framework would apply `completion_to_prompt` here. Then control tokens of the layout could not be told from such text in
        the content. So `complete` applies it.
        """
        if self.prompt_maker.completion_layout is None:
            return super()._get_prompt(prompt, **prompt_args)
        text = prompt.format(llm=self, **prompt_args)
        if self.output_parser is not None:
            text = self.output_parser.format(text)
        return Unlaid(self._extend_prompt(text))

    def _completion(self, prompt: str, formatted: bool, built: Prompt | None, options: dict[str, Any]) -> Request:
        formatted = formatted and not isinstance(prompt, Unlaid)

        def make(nodes: Iterable[object], layout: dict[str, Any]) -> Prompt:
            return built or self.prompt_maker.completion(prompt, formatted, nodes, **layout)

        return self._request(make, options)

    def _conversation(self, messages: Sequence[ChatMessage], built: Prompt | None, options: dict[str, Any]) -> Request:
        tools = options.pop("tools", None)

        def make(nodes: Iterable[object], layout: dict[str, Any]) -> Prompt:
            return built or self.prompt_maker.conversation(messages, nodes, tools, **layout)

        return self._request(make, options, tools)

    def _request(
        self,
        make: Callable[[Iterable[object], dict[str, Any]], Prompt],
        options: dict[str, Any],
        tools: Sequence[Any] | None = None,
    ) -> Request:
        """A request. When it begins, its prompt is made from the retrieved nodes and the arguments of the chat template."""
        trace, retrieved = TRACES.current(), options.pop("retrieved", None)

        def begin() -> AnswerStream:
            names = self.prompt_maker.argument_names
            settings = {**_renamed(self.generate_kwargs), **_renamed(options)}
            layout = {name: settings.pop(name) for name in list(settings) if name in names}
            stream = self._start(make(trace.chunks if retrieved is None else retrieved, layout), settings)
            trace.begun()
            return stream

        def on_step(report: Report) -> None:
            self._last_report = report
            last_reports.tell(self, report)

        names = None if not tools else [str(tool["function"]["name"]) for tool in tools]
        return Request(begin, on_step, trace.reports_of_one_request(), names)

    def _start(self, prompt: Prompt, given: dict[str, Any]) -> AnswerStream:
        own = {name: getattr(self, name) for name in REUSE_NAMES}
        if "max_new_tokens" in self.model_fields_set:  # a generation_config may have a limit of its own
            own["max_new_tokens"] = self.max_new_tokens
        try:
            return self.engine.stream(prompt=prompt, **{**own, **given})
        except PromptTooLongError as error:
            raise PromptTooLongError(
                f"{error} LlamaIndex fits prompts into the context by its own count, of another tokenizer's tokens unless told: "
                "set Settings.tokenizer = llm.engine.tokenizer.encode, retrieve fewer or smaller nodes, or use "
                "CacheTuneSynthesizer, which counts the model's tokens."
            ) from error


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """A request's options, with `max_tokens`, the usual name in the framework, renamed to max_new_tokens."""
    return {"max_new_tokens" if name == "max_tokens" else name: value for name, value in options.items()}
