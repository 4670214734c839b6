"""Uses LlamaIndex's spans to find the nodes that were retrieved for a request, and the response that a request belongs to.

The framework opens a span around each call of a query engine, retriever, postprocessor, synthesizer, agent and LLM, and passes the
current span on to tasks and threads in context variables. `Traces` listens at the root dispatcher. Nodes that a span returns, or that a
synthesizer gets, belong to all spans around it, and so do the reports of its requests. A request only sees what belongs to its own spans.
All of it is dropped when the outermost span ends.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import (
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine.types import AgentChatResponse, StreamingAgentChatResponse
from llama_index.core.evaluation import BaseEvaluator
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import NodeWithScore
from llama_index_instrumentation import root_dispatcher
from llama_index_instrumentation.span import active_span_id

from cachetune_rag import Chunk, Report
from llama_index.llms.cachetune.deletions import Deletions
from llama_index.llms.cachetune.shown import chunks_of

REPORTS = "cachetune_reports"
"""The key in a response's `metadata` of the reports of all its requests, in order."""

_RESPONSES = (Response, StreamingResponse, AsyncStreamingResponse, PydanticResponse, AgentChatResponse)


_STREAM: ContextVar[Trace | None] = ContextVar("_STREAM", default=None)
"""The span that a stream came from, while the stream makes a piece."""


@dataclass(eq=False)
class Trace:
    """One open span.

    Attributes:
        parent: the span around it.
        retrieved: the bodies of nodes that spans within it returned or were given to show, by text.
        reports: reports of the requests within it, in the order of their first pieces; a request's report changes until it ends.
        requests: how many requests were begun within it.
        deletions: what was deleted within it, in the span that is the run of an ingestion pipeline.
        was_returned: whether a span within it, such as that of a retriever, has returned nodes.
        judged: whether it is the query of an evaluator. Documents of such a query exist only for it.
    """

    parent: Trace | None = None
    retrieved: dict[str, Chunk] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    requests: int = 0
    deletions: Deletions | None = None
    was_returned: bool = False
    judged: bool = False

    def around(self) -> Iterator[Trace]:
        """This span and the spans around it, the innermost first."""
        span: Trace | None = self
        while span is not None:
            yield span
            span = span.parent

    @property
    def chunks(self) -> list[Chunk]:
        """The nodes that were retrieved within the outermost span so far, which a request's prompt may show."""
        *_, outermost = self.around()
        return list(outermost.retrieved.values())

    def add_returned(self, nodes: object) -> None:
        """Add the result of a span, if it is a list of nodes."""
        if found := _chunks(nodes):
            for span in self.around():
                span.was_returned = True
            self._add(found)

    def add_given(self, nodes: object) -> None:
        """A synthesizer was given `nodes` to show.

        Nodes that a synthesizer is given without any retriever's span count as retrieved: a retriever of the user's own may have found
        them. But where retrievers did return nodes, a node that none of them returned and that has no source document is a text
        made in between, such as the answer to a sub-question. It was not retrieved, and can't be in the store.
        """
        *_, outermost = self.around()
        found = _chunks(nodes)
        if outermost.was_returned:
            found = [chunk for chunk in found if chunk.document is not None or chunk.text in outermost.retrieved]
        self._add(found)

    def _add(self, found: Sequence[Chunk]) -> None:
        if any(span.judged for span in self.around()):
            found = [Chunk(chunk.text) for chunk in found]  # of no document, so that it isn't learned
        for span in self.around():
            for chunk in found:
                known = span.retrieved.get(chunk.text)
                # A chunk that is retrieved again is known to exist now.
                if known is None or known.document is None or known.document == chunk.document:
                    span.retrieved[chunk.text] = chunk

    @property
    def ingestion(self) -> Deletions | None:
        """The deletions of the ingestion run around this span; None if there is none."""
        return next((span.deletions for span in self.around() if span.deletions is not None), None)

    def begun(self) -> None:
        """Count a request that begins."""
        for span in self.around():
            span.requests += 1

    def reports_of_one_request(self) -> Callable[[Report], None]:
        """A function that takes each report of one request, possibly after the span has ended.

        The first one adds an entry to the reports of the spans; later ones bring this entry up to date. So a stream has its entry
        from its first piece on, however and whenever it is closed.
        """
        entry: dict[str, Any] = {}

        def keep(report: Report) -> None:
            is_first = not entry
            entry.update(report.as_dict())
            if is_first:
                for span in self.around():
                    span.reports.append(entry)

        return keep


class Traces(BaseSpanHandler[BaseSpan]):
    """The open spans of this process. One instance, `TRACES`, serves all models."""

    _open: dict[str, Trace] = PrivateAttr(default_factory=dict)
    _left: weakref.WeakValueDictionary[str, Trace] = PrivateAttr(default_factory=weakref.WeakValueDictionary)
    _guard: Any = PrivateAttr(default_factory=threading.Lock)

    def install(self) -> None:
        """Listen at the root dispatcher, also if a program has replaced its handlers meanwhile."""
        root = root_dispatcher
        with self._guard:
            if not any(handler is self for handler in root.span_handlers):
                root.add_span_handler(self)

    def current(self) -> Trace:
        """The span of this context; a new one if there is none."""
        return self._span(active_span_id.get()) or Trace(_STREAM.get())

    # -- called by the dispatcher, which ignores a handler's errors: these methods must not fail -------------------

    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A span begins."""
        trace = Trace(self._span(parent_id) or _STREAM.get())
        if isinstance(instance, BaseSynthesizer):
            trace.add_given(bound_args.arguments.get("nodes"))
        if isinstance(instance, IngestionPipeline):
            trace.deletions = Deletions()
        trace.judged = isinstance(instance, BaseQueryEngine) and _is_evaluation()
        self._open[id_] = trace

    def span_exit(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> None:
        """A span has returned `result`."""
        trace = self._open.pop(id_, None)
        if trace is None:
            return
        if trace.deletions is not None:
            trace.deletions.apply(result or ())
        trace.add_returned(result)
        if isinstance(instance, BaseSynthesizer):
            # Some synthesizers make a stream's request when its first piece is asked for, after their span has ended.
            if isinstance(result, StreamingResponse):
                result.response_gen = _resumed(result.response_gen, trace)
            elif isinstance(result, AsyncStreamingResponse):
                result.response_gen = _aresumed(result.response_gen, trace)
        streams = isinstance(result, StreamingResponse | AsyncStreamingResponse)
        if isinstance(result, _RESPONSES) and (trace.requests or streams):
            result.metadata = {**(result.metadata or {}), REPORTS: trace.reports}
        elif isinstance(result, StreamingAgentChatResponse):  # the one response that has no such field of its own
            result.__dict__["metadata"] = {REPORTS: trace.reports}
            # The answer is computed in another task, after this span has ended.
            result.__dict__["cachetune_trace"] = self._left[id_] = trace

    def span_drop(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> None:
        """A span has raised an exception."""
        trace = self._open.pop(id_, None)
        if trace is not None and trace.deletions is not None:
            trace.deletions.apply()

    def _span(self, id: str | None) -> Trace | None:
        return self._open.get(id or "") or self._left.get(id or "")

    def new_span(self, *args: Any, **kwargs: Any) -> None:
        """Not used: spans are kept by `span_enter`."""

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None:
        """Not used: spans are kept by `span_enter`."""

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None:
        """Not used: spans are kept by `span_enter`."""


def _chunks(nodes: object) -> list[Chunk]:
    """The chunks of a list of nodes; none for anything else. They are taken now, because the framework changes nodes in place."""
    if not isinstance(nodes, Sequence) or isinstance(nodes, str):
        return []
    return chunks_of(item for item in nodes if isinstance(item, NodeWithScore))


def _is_evaluation() -> bool:
    """Whether this call was made by an evaluator.

    Evaluators put the contexts that they judge into an index that lives for one query, under document ids that nobody will ever
    delete. Nothing public tells: `BaseEvaluator` opens no span, sends no event and takes no callbacks; its index, documents
    and query engine are ordinary ones; and its prompts can be replaced by the user, so they identify nothing. That leaves the call
    stack. It holds the evaluator because the framework's evaluators query within `evaluate` or `aevaluate`, on the same thread
    and task. One that hands its query to another task isn't recognised, and what it judges is learned like other nodes.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in ("evaluate", "aevaluate") and isinstance(frame.f_locals.get("self"), BaseEvaluator):
            return True
        frame = frame.f_back
    return False


def _resumed(pieces: Generator[Any, None, None], trace: Trace) -> Generator[Any, None, None]:
    """A stream whose spans belong to the span that it came from."""
    try:
        while True:
            token = _STREAM.set(trace)
            try:
                piece = next(pieces)
            except StopIteration:
                return
            finally:
                _STREAM.reset(token)
            yield piece
    finally:
        pieces.close()


async def _aresumed(pieces: AsyncGenerator[Any, None], trace: Trace) -> AsyncGenerator[Any, None]:
    """The same for an asynchronous stream."""
    try:
        while True:
            token = _STREAM.set(trace)
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
            finally:
                _STREAM.reset(token)
            yield piece
    finally:
        await pieces.aclose()


TRACES = Traces()
