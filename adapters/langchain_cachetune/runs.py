"""Uses LangChain's callbacks to find the documents that were retrieved for a request, and the reports that belong to a run.

LangChain calls a handler when a run begins, in the context of its caller. Each outermost run gets a record then, in a context variable.
All that the run does inherits it, on any thread or task, and no other request does.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.tracers.context import register_configure_hook

from cachetune_rag import Report
from cachetune_store import changes_so_far

Retrieved = tuple[Document, int]
"""A document, and the number of `changes_so_far` when it was retrieved. If it is deleted later, it isn't stored again."""

_KEPT = 256
"""How many of the latest retrieved documents a context keeps."""
_PROBE = 24
_NO_LETTER = re.compile(r"[\W_]+")


class _Run:
    """An outermost run: the documents that were retrieved in it or before it in the same context, and its reports."""

    def __init__(self, before: _Run | None, id: UUID | None = None):
        self.id = id
        self.documents: deque[Retrieved] = deque(before.documents if before else (), maxlen=_KEPT)
        self.reports: dict[object, Report] = {}
        self.around: list[weakref.ref[_Run]]
        # The runs inside which this one began, such as a batch. They get its reports as well. Runs that came before it in the same
        # context have ended, and are dropped from this list.
        around = [*before.around, weakref.ref(before)] if before else []
        self.around = [reference for reference in around if reference() is not None]
        self._retrieves = False

    def report(self, key: object, report: Report) -> None:
        for run in (self, *(reference() for reference in self.around)):
            if run is not None:
                run.reports[key] = report

    def retrieved(self, documents: Iterable[Document]) -> None:
        """Add documents that were retrieved. The first ones of a run replace those of earlier runs."""
        if not self._retrieves:
            self.documents.clear()
            self._retrieves = True
        now = changes_so_far()
        self.documents.extend((document, now) for document in documents)

    def end(self) -> None:
        """The run has ended. Later runs keep its documents until one of them retrieves others."""
        self._retrieves = False


_run: ContextVar[_Run | None] = ContextVar("cachetune_run", default=None)
_collecting: ContextVar[tuple[list[Report], ...]] = ContextVar("cachetune_reports", default=())


class _Watcher(BaseCallbackHandler):
    """Makes a record when an outermost run begins, and adds the documents that retrievers return."""

    run_inline = True  # in the context of the run, also under asyncio
    ignore_llm = ignore_agent = ignore_retry = ignore_custom_event = True

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        if parent_run_id is None:
            _run.set(_Run(_run.get(), run_id))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        if (run := _run.get()) is not None and run.id == run_id:
            run.end()

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self.on_chain_end(None, run_id=run_id)

    def on_chat_model_start(
        self,
        serialized: Any,
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        if parent_run_id is None:
            _run.set(_Run(_run.get(), run_id))

    def on_retriever_end(
        self, documents: Sequence[Document], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        run = _run.get()
        if run is None:  # a retriever was called alone: its documents are for the next run in this context
            run = _Run(None)
            _run.set(run)
        run.retrieved(document for document in documents if isinstance(document, Document))


_WATCHER = _Watcher()  # has no state of its own, so all contexts share it
_watcher: ContextVar[BaseCallbackHandler | None] = ContextVar("cachetune_watcher", default=_WATCHER)
register_configure_hook(_watcher, inheritable=True)


class RunRecord:
    """The run that a request belongs to. Make it in the run's context. Any thread may call its methods."""

    def __init__(self) -> None:
        self._run, self._collecting = _run.get(), _collecting.get()

    @property
    def documents(self) -> list[Retrieved]:
        """The documents that were retrieved in this run, or before it in the same context."""
        return list(self._run.documents) if self._run else []

    def report(self, key: object, report: Report, *, whole: bool = True) -> None:
        """Keep a request's report as the latest one of this run. `whole` says that the request has ended."""
        if self._run:
            self._run.report(key, report)
        if whole:
            for reports in self._collecting:
                reports.append(report)


def latest_report(key: object) -> Report | None:
    """The latest report of this context's run; None if it has none."""
    run = _run.get()
    return run.reports.get(key) if run else None


@contextmanager
def collect_reports() -> Iterator[list[Report]]:
    """The reports of all requests made inside, by whatever chain, thread or task, in the order in which they end.

    with collect_reports() as reports:
        answer = chain.invoke(...)
    """
    reports: list[Report] = []
    token = _collecting.set((*_collecting.get(), reports))
    try:
        yield reports
    finally:
        _collecting.reset(token)


def shown_documents(documents: Iterable[Retrieved], texts: Iterable[str]) -> list[Retrieved]:
    """The documents that the texts show, perhaps stripped, quoted or cut. Each is returned once.

    Retrieved documents aren't always for this request: a chain may rank documents one by one, or only ask for a better query.
    """
    prompt = _letters("\n".join(texts))
    made: dict[tuple[str | None, str], Retrieved] = {}
    for document, since in documents:
        letters = _letters(document.page_content)
        if not letters:
            continue
        starts = {0, max(0, len(letters) // 2 - _PROBE // 2), max(0, len(letters) - _PROBE)}
        if any(letters[start : start + _PROBE] in prompt for start in starts):
            made[document.id, document.page_content] = document, since
    return list(made.values())


def _letters(text: str) -> str:
    return _NO_LETTER.sub("", text).lower()
