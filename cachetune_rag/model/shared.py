"""A loaded model, and the state that all engines on it share.

Two engines (two tenants, two stores) may be made on one model. They run it through the same adapter, so they have one lock: one
forward at a time, and what one engine does in the background gives way to the other one's requests. They also notice together that
the model's weights were changed, and each engine is served again once it has taken in the change (`CacheTune.model_changed`).

If a process is forked while a thread computes, locks inside torch and its libraries may stay locked in the child for ever, and
whatever computes there may wait for one of them. So a fork waits until no model is running a forward. If that takes too long, no
engine can be made in the child.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from cachetune_rag.checking.arguments import check_flag
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.errors import ForkedError, ModelChangedError
from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.family import families
from cachetune_rag.model.heads import ALL_HEADS, Heads
from cachetune_rag.model.libraries.neutral import neutral
from cachetune_rag.model.libraries.private import check_modules, end_openmp_threads
from cachetune_rag.model.loaded.changes import Weights
from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_rag.model.loaded.view import unwrapped
from cachetune_rag.model.loaded.weights import check_finite


class SharedModel:
    """One model. `of` returns the same object to all callers with the same model.

    Attributes:
        model: the caller's own object.
        lock: held around every use.
    """

    def __init__(self, model: Any):
        self.model = model
        self.lock = ModelLock()
        self._adapters: dict[bool, ModelAdapter] = {}
        self._fingerprint: str | None = None
        self._weights: Weights | None = None
        self._why = ""

    @staticmethod
    def of(model: Any) -> SharedModel:
        """The object that engines on this model share. It lives as long as one of them.

        Raises:
            ForkedError: this process was forked during a forward, so a computation in it could wait for ever.
        """
        if _torn:
            raise ForkedError(
                f"process {_torn} was computing when this one ({os.getpid()}) was forked off it, longer than the fork waited "
                f"({FORK_SECONDS:g} s): locks inside of torch may stay locked here for ever. Fork while no request is being answered, "
                "before the first engine is made, or start processes by 'spawn'."
            )
        # A forked child's engines share nothing with its parent's, whose threads may have held the lock.
        place = os.getpid(), id(unwrapped(model))
        with _mutex:
            known = _known.get(place)
            if known is None:
                known = _known[place] = SharedModel(model)
            return known

    def adapter(self, *, cuda_kernels: bool, heads: Heads = ALL_HEADS) -> ModelAdapter:
        """The model's adapter. `read` has to have been called, and `heads` is the same for all engines on the model.

        Raises:
            UnsupportedModelError: the architecture can't be served exactly; the message says why.
        """
        check_flag(cuda_kernels, "cuda_kernels")
        with self.lock, neutral():
            if cuda_kernels not in self._adapters:
                self._adapters[cuda_kernels] = ModelAdapter(self.model, cuda_kernels=cuda_kernels, heads=heads)
            return self._adapters[cuda_kernels]

    def read(self, given: str | None = None) -> str:
        """Take the weights as they are now, and return their fingerprint. This reads all of them once.

        Everything that was made from other weights (compiled layers, graphs, tables) is dropped, and engines for other weights are
        refused from now on.

        Args:
            given: the weights' fingerprint, if not all of them can be read; None computes it.

        Raises:
            UnsupportedModelError: some weights are NaN or infinite, or the architecture can't be served.
            ModelChangedError: they are being changed.
        """
        check_modules()
        with self.lock.reserved(), self.lock, neutral():
            model = unwrapped(self.model)
            families.check(model)
            known, self._weights = self._weights, None
            weights = Weights(model)
            check_finite(model)
            found = model_fingerprint(model) if given is None else given
            if (change := weights.change()) is not None:
                self._why = change
                raise ModelChangedError(_told(f"{change} while the engine read it"))
            why = None if known is None else known.change()
            if known is None or why is not None or found != self._fingerprint:
                for adapter in self._adapters.values():
                    adapter.renew()
                self._why = why or "its weights are others than when the engine was made"
                known = weights
            self._fingerprint, self._weights = found, known
            return found

    def check(self, fingerprint: str, *, thorough: bool = True, every: bool = True) -> None:
        """Refuse weights that seem to be others than those of `fingerprint`. The caller holds the lock.

        Args:
            fingerprint: fingerprint of the expected weights.
            thorough: False checks only autograd's counts, which is fast enough for every token.
            every: see `Weights.change`.

        Raises:
            ModelChangedError: names what was changed.
        """
        if self._weights is None or fingerprint != self._fingerprint:
            raise ModelChangedError(_told(self._why))
        change = self._weights.change(every=every) if thorough else self._weights.counted_change()
        if change is not None:
            raise ModelChangedError(_told(change))


def _told(change: str) -> str:
    return (
        f"the model was changed: {change}. What is stored was computed with the weights before that. Call engine.model_changed(), "
        "once all changes are made, to go on with the model as it is: its chunks are stored anew, and those stored before are found "
        "again by an engine on the old weights. If the weights are what they were after all, nothing stored is lost."
    )


_mutex = threading.RLock()  # garbage collection may run a finaliser in between
_known: WeakValueDictionary[tuple[int, int], SharedModel] = WeakValueDictionary()
FORK_SECONDS = 5.0
"""Seconds that a fork waits for running forwards."""
_stopped: list[SharedModel] = []  # whose locks the thread that forks holds
_torn = 0
"""The parent process, if this one was forked off during a forward; else 0."""
_busy = False
_log = logging.getLogger(__name__)


def _models() -> list[SharedModel]:
    # If another thread adds a model meanwhile, iterating fails, and is tried again.
    while True:
        with suppress(RuntimeError):
            return list(_known.values())


def _before_fork() -> None:
    """Wait until no forward is running, and keep new ones from beginning."""
    global _busy
    until = time.monotonic() + FORK_SECONDS
    for shared in _models():
        if shared.lock.acquire(timeout=max(0.0, until - time.monotonic())):
            _stopped.append(shared)
        else:
            _busy = True
    end_openmp_threads()


def _in_parent() -> None:
    global _busy
    if _busy:
        _log.warning("the process was forked while a model was computing: an engine can't be made in the child")
    _busy = False
    while _stopped:
        _stopped.pop().lock.release()


def _in_child() -> None:
    global _mutex, _torn, _busy
    _mutex = threading.RLock()
    if _busy:
        _torn, _busy = os.getppid(), False
    _stopped.clear()
    for shared in _models():
        shared.lock.renew()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
