"""The last report of the calling thread or task, and of the threads and tasks that it has begun.

If requests run at the same time (`asyncio.gather`, threads), each sees its own report. The caller that waits for them sees the latest of
their reports, also if a synchronous call of the framework runs an event loop inside.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cachetune_rag import Report

_DEEPEST = 16


@dataclass(eq=False)
class _Scope:
    """A thread or task that made a request.

    Attributes:
        owner: identifies the thread and task.
        around: the scope in which it began.
        depth: how many scopes are around it.
        last: the model that was last asked in this scope, and the report.
    """

    owner: tuple[int, int]
    around: _Scope | None
    depth: int
    last: tuple[weakref.ref[Any], Report] | None = None


_SCOPE: ContextVar[_Scope | None] = ContextVar("_SCOPE", default=None)


def tell(model: object, report: Report) -> None:
    """Keep the report of a request to `model`."""
    scope: _Scope | None = _here()
    while scope is not None:
        scope.last = (weakref.ref(model), report)
        scope = scope.around


def last(model: object) -> Report | None:
    """The latest report of this thread or task; None if its last request was to another model, or if there was none."""
    scope = _SCOPE.get()
    told = None if scope is None else scope.last
    return told[1] if told is not None and told[0]() is model else None


def _here() -> _Scope:
    scope, owner = _SCOPE.get(), _owner()
    if scope is None or scope.owner != owner:
        # The depth is limited, because tasks may begin each other without end.
        around = scope if scope is not None and scope.depth < _DEEPEST else None
        scope = _Scope(owner, around, 0 if around is None else around.depth + 1)
        _SCOPE.set(scope)
    return scope


def _owner() -> tuple[int, int]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), 0 if task is None else id(task)
