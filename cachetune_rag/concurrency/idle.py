"""Background work that waits until no request wants the model."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.concurrency.model_lock import ModelLock

IDLE_SECONDS = 0.05
"""How long no request must have wanted the model before background work begins."""

_LOOK_AGAIN = 0.01

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class IdleQueue(Generic[_T]):
    """Items that are worked on one after another, in order, on a thread of their own.

    The thread starts with the first item and ends with the last one. An item stays in the queue until its work is done, so the first
    item is the one that is being worked on.

    Args:
        name: the thread's name.
        model: the lock of the model that the work needs.
        attempt: `attempt(item)` works on an item; it holds no lock when it is called. It calls `done(item)` once the work is done, or
            has failed. If it returns without that, because a request came in between, say, it is called again for the same item.
        dropped: `dropped(item)` is told of each item that was removed undone. The mutex is held.

    Attributes:
        mutex: guards the queue; the owner may keep figures of its own under it. It is not reentrant.
        closed: no more items are taken.
        dropped: the items that wait are not to be worked on any more, and the work under way should end soon.
    """

    def __init__(self, name: str, model: ModelLock, attempt: Callable[[_T], None], dropped: Callable[[_T], None]):
        self._name, self._model, self._attempt, self._tell_dropped = name, model, attempt, dropped
        self.mutex = threading.Lock()
        self.closed = self.dropped = False
        self._items: deque[_T] = deque()
        self._hurried = 0
        self._thread: threading.Thread | None = None
        self._origin = this_process()

    # -- for a caller that holds the mutex ------------------------------------------------------------------------

    def put(self, item: _T) -> bool:
        """Add an item. Returns False if the queue is closed. The caller holds the mutex."""
        if self.closed:
            return False
        self._items.append(item)
        self.start()
        return True

    def start(self) -> None:
        """Start the thread if items wait and there is none: Ctrl-C may have kept it from starting. The caller holds the mutex."""
        if self._items and not self.busy and not self.dropped:
            # A thread inside of torch while the interpreter goes away would crash the process.
            atexit.register(self.drop)
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def done(self, item: _T) -> bool:
        """Remove the first item, whose work has ended. The caller holds the mutex.

        Returns:
            False if the item was removed before, by `clear`: what came of its work doesn't count.
        """
        if not self.is_first(item):
            return False
        self._items.popleft()
        return True

    def clear(self) -> None:
        """Remove all items, the one that is being worked on as well. The caller holds the mutex."""
        while self._items:
            self._tell_dropped(self._items.popleft())

    def is_first(self, item: _T) -> bool:
        """Whether this very item is the first one. The caller holds the mutex."""
        return bool(self._items) and self._items[0] is item

    def items(self) -> list[_T]:
        """All items, the one that is being worked on first. The caller holds the mutex."""
        return list(self._items)

    # -- for a caller that does not -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._items)

    @property
    def here(self) -> bool:
        """Whether this process made the queue. In a forked process its thread is gone, and the mutex may be locked for ever."""
        return self._origin.here

    @property
    def busy(self) -> bool:
        """Whether the thread is running."""
        return (thread := self._thread) is not None and thread.is_alive()

    @property
    def hurried(self) -> bool:
        """Whether somebody waits for the work, which therefore waits for no idle model."""
        return self._hurried > 0

    def wait_idle(self, patience: float | None = None) -> bool:
        """Wait, in an attempt, until no request has wanted the model for `IDLE_SECONDS`.

        Args:
            patience: the longest wait, in seconds; None: as long as it takes.

        Returns:
            Whether the model is idle. False as soon as somebody waits for the work, or it is to be dropped.
        """
        return self._model.wait_idle(IDLE_SECONDS, lambda: self.dropped or self.hurried, patience)

    @contextmanager
    def in_a_hurry(self) -> Iterator[None]:
        """Let the work not wait for an idle model meanwhile."""
        self._hurry(1)
        try:
            yield
        finally:
            self._hurry(-1)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no items are left. Returns False if that took longer than `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        with self.mutex:
            self.start()
        while (thread := self._thread) is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
            if until is not None and time.monotonic() >= until:
                return not self._items
        return True

    def wait_for(self, item: _T) -> None:
        """Wait until an item is not in the queue any more."""
        while (thread := self._thread) is not None and thread.is_alive():
            with self.mutex:
                if not any(each is item for each in self._items):
                    return
            thread.join(_LOOK_AGAIN)

    def close(self) -> None:
        """Take no more items. Those that wait are still worked on."""
        with self.mutex:
            self.closed = True

    def drop(self) -> None:
        """Take no more items and remove those that wait. Returns once the work under way has ended, which `dropped` asks it to do."""
        if not self.here:
            return
        with self.mutex:
            self.closed = self.dropped = True
        self._model.wake()
        self.wait()
        with self.mutex:  # where no thread did it, because Ctrl-C had kept it from starting
            self.clear()

    def _hurry(self, more: int) -> None:
        with self.mutex:
            self._hurried += more
        self._model.wake()

    def _run(self) -> None:
        while True:
            with self.mutex:
                if self.dropped:
                    self.clear()
                if not self._items:
                    self._thread = None
                    atexit.unregister(self.drop)
                    return
                item = self._items[0]
            try:
                self._attempt(item)
            except Exception:
                _log.exception("background work on the thread %s failed and is not tried again", self._name)
                with self.mutex:
                    if self.done(item):
                        self._tell_dropped(item)
            del item  # it may hold much memory
