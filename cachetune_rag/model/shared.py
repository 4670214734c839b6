"""A loaded model, and what all engines on it have in common.

Two engines (two tenants, two stores) may be made on one model. They run it through the same adapter, so they have one lock: one
forward at a time, and what one engine does in the background gives way to the other one's requests. They also notice together that
the model's weights were changed, and each engine is served again once it has taken in the change (`CacheTune.model_changed`).
"""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakValueDictionary

from cachetune_rag.arguments import check_flag
from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model import families
from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.changes import Weights
from cachetune_rag.model.fingerprint import model_fingerprint
from cachetune_rag.model.neutral import neutral
from cachetune_rag.model.private import check_modules
from cachetune_rag.model.view import unwrapped
from cachetune_rag.model.weights import check_finite
from cachetune_rag.model_lock import ModelLock


class SharedModel:
    """One model; `of` gives the same object to everybody who has the same one.

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
        """What engines on this model share; it lives as long as one of them."""
        # A forked child's engines share nothing with its parent's, whose threads may have held the lock.
        place = os.getpid(), id(unwrapped(model))
        with _mutex:
            known = _known.get(place)
            if known is None:
                known = _known[place] = SharedModel(model)
            return known

    def adapter(self, *, cuda_kernels: bool) -> ModelAdapter:
        """The model's adapter. `read` has to have been called.

        Raises:
            UnsupportedModelError: the architecture can't be served exactly; the message says why.
        """
        check_flag(cuda_kernels, "cuda_kernels")
        with self.lock, neutral():
            if cuda_kernels not in self._adapters:
                self._adapters[cuda_kernels] = ModelAdapter(self.model, cuda_kernels=cuda_kernels)
            return self._adapters[cuda_kernels]

    def read(self) -> str:
        """Take the weights as they are now, and return their fingerprint. It takes one pass over them.

        What was made of other weights (compiled layers, graphs, tables) is dropped; engines that were made for them are refused
        from now on.

        Raises:
            UnsupportedModelError: weights that are no numbers, or an architecture that can't be served.
            ModelChangedError: they are being changed.
        """
        check_modules()
        with self.lock.reserved(), self.lock, neutral():
            model = unwrapped(self.model)
            families.check(model)
            known, self._weights = self._weights, None
            weights = Weights(model)
            check_finite(model)
            found = model_fingerprint(model)
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
            fingerprint: of the weights that are wanted.
            thorough: False looks at autograd's counts alone, for use before every token.
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


def _after_fork() -> None:
    global _mutex
    _mutex = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
