"""A response synthesizer that passes nodes to the engine as separate chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_REFINE_PROMPT_SEL, DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer, QueryTextType
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from cachetune_rag import PromptTooLongError
from cachetune_rag.concurrency.async_calls import call_in_thread
from llama_index.llms.cachetune.llm import CacheTuneLLM
from llama_index.llms.cachetune.node_prompts import NodePrompt, ShownNode
from llama_index.llms.cachetune.shown import with_body_apart

_NODES: ContextVar[Sequence[NodeWithScore]] = ContextVar("_NODES", default=())
"""The nodes that `synthesize` was called with. `get_response` only gets their texts."""


class CacheTuneSynthesizer(BaseSynthesizer):
    """Answers over nodes, each shown exactly as `MetadataMode.LLM` gives it: its header of metadata as text, its body as a chunk.

    As many nodes as fit are put into one prompt. The answer is refined with the others, as in the compact synthesizer. A body that isn't
    stored is computed in the request, and stored after the answer under the node's `ref_doc_id`.

    Args:
        llm: a `CacheTuneLLM`. Default: `Settings.llm`.
        text_qa_template: the prompt, with {context_str} once and {query_str}.
        refine_template: the prompt for further nodes, with {context_msg} once, {existing_answer} and {query_str}.
        streaming: whether answers come piece by piece.
        callback_manager, empty_response: see `BaseSynthesizer`.
    """

    _llm: CacheTuneLLM

    def __init__(
        self,
        llm: CacheTuneLLM | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        refine_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
    ):
        chosen = llm or Settings.llm
        if not isinstance(chosen, CacheTuneLLM):
            raise TypeError(
                f"llm is a {type(chosen).__name__}: CacheTuneSynthesizer needs a CacheTuneLLM, here or as Settings.llm."
            )
        super().__init__(
            llm=chosen, callback_manager=callback_manager, streaming=streaming, empty_response=empty_response
        )
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        self._refine_template = refine_template or DEFAULT_REFINE_PROMPT_SEL

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template, "refine_template": self._refine_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)
        self._refine_template = prompts.get("refine_template", self._refine_template)

    def synthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """See `BaseSynthesizer.synthesize`."""
        with _shown(nodes):
            return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """See `BaseSynthesizer.asynthesize`."""
        with _shown(nodes):
            return await super().asynthesize(query, nodes, additional_source_nodes, **response_kwargs)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer from texts. Returns a str, or a generator of pieces when streaming. `response_kwargs` are for the templates.

        Texts of the nodes that `synthesize` got are shown as these nodes. The document of other texts isn't known, so stored chunks are
        found in them, but nothing of them is stored.
        """
        request, rest = self._first(query_str, _with_nodes(text_chunks), response_kwargs)
        while rest:
            request, rest = self._next(query_str, rest, request.run(), response_kwargs)
        return request.stream() if self._streaming else request.run() or self._empty_response

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """As `get_response`, asynchronously."""
        shown = _with_nodes(text_chunks)
        request, rest = await call_in_thread(self._first, query_str, shown, response_kwargs)
        while rest:
            request, rest = await call_in_thread(self._next, query_str, rest, await request.arun(), response_kwargs)
        if self._streaming:
            return request.astream()
        return await request.arun() or self._empty_response

    # -- inside ---------------------------------------------------------------------------------------------------

    def _first(
        self, query: str, nodes: Sequence[ShownNode], extra: dict[str, Any]
    ) -> tuple[NodePrompt, Sequence[ShownNode]]:
        return self._pack(self._text_qa_template.partial_format(query_str=query), "context_str", nodes, extra)

    def _next(
        self, query: str, nodes: Sequence[ShownNode], answer: str, extra: dict[str, Any]
    ) -> tuple[NodePrompt, Sequence[ShownNode]]:
        template = self._refine_template.partial_format(query_str=query, existing_answer=answer)
        return self._pack(template, "context_msg", nodes, extra)

    def _pack(
        self, template: BasePromptTemplate, variable: str, nodes: Sequence[ShownNode], extra: dict[str, Any]
    ) -> tuple[NodePrompt, Sequence[ShownNode]]:
        """A request with the first nodes, as many as fit with room for the answer, and the remaining nodes."""
        metadata = self._llm.metadata
        count = len(nodes)
        room = metadata.context_window - metadata.num_output
        while True:
            request = NodePrompt(self._llm, template, variable, nodes[:count], extra)
            length = len(request.prompt.ids)
            if length <= room or count <= 1:
                break
            # The first try usually fits, and there are never more tries than nodes.
            count = max(1, min(count - 1, count * room // length))
        if length > metadata.context_window - 1:
            raise PromptTooLongError(
                f"the prompt with a single node has {length} tokens and the model's context is "
                f"{metadata.context_window}: split documents into smaller nodes."
            )
        return request, nodes[count:]


@contextmanager
def _shown(nodes: Sequence[NodeWithScore]) -> Iterator[None]:
    token = _NODES.set(nodes)
    try:
        yield
    finally:
        _NODES.reset(token)


def _with_nodes(texts: Sequence[str]) -> list[ShownNode]:
    """The texts as prompts show them, each with its node, if that is known."""
    nodes: dict[str, BaseNode] = {}
    for item in _NODES.get():
        nodes.setdefault(item.node.get_content(metadata_mode=MetadataMode.LLM), item.node)
    return [ShownNode(nodes.get(text), with_body_apart(text, nodes.get(text))) for text in texts if text]
