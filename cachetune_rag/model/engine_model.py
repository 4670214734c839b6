"""One engine's view of a model that several engines may share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model.heads import ALL_HEADS, Heads
from cachetune_rag.model.shared import SharedModel


class EngineModel:
    """One engine's part in a model that several engines may share.

    Attributes:
        adapter: runs the model.
        lock: held around every use of the model, by all engines on it. Always write `with model.lock.reserved(), model.lock:` in full
            where it is used: a context manager of our own around both could be interrupted by Ctrl-C between acquiring and entering.
        fingerprint: identifies the weights that this engine stores chunks for.

    Args:
        model: see the class `CacheTune`.
        cuda_kernels: see `ModelAdapter`.
        fingerprint: `model_fingerprint` of the checkpoint that the model's weights were loaded from, where they don't all lie in the
            model (`ForeignLinear`); None computes it.
        heads: see `ModelAdapter`.

    Raises:
        UnsupportedModelError: the architecture can't be served exactly; the message says why.
        ModelChangedError: the weights are being changed while they are read.
        ForkedError: this process was forked while the model was computing.
    """

    def __init__(self, model: Any, *, cuda_kernels: bool, fingerprint: str | None = None, heads: Heads = ALL_HEADS):
        self._shared = SharedModel.of(model)
        self.lock = self._shared.lock
        self._given = fingerprint
        self.fingerprint = self._shared.read(fingerprint)
        self.adapter = self._shared.adapter(cuda_kernels=cuda_kernels, heads=heads)
        self._layout = self.adapter.layout

    def check(self) -> None:
        """Refuse to go on with weights other than those this engine stores for. The caller holds the lock.

        This happens with every request, so it must not keep a GPU busy for long (`Weights.change` explains what is left out).

        Raises:
            ModelChangedError: names what was changed.
        """
        self._shared.check(self.fingerprint, every=False)

    def check_all(self, fingerprint: str) -> None:
        """As `check`, but look at every weight: before chunks are stored under `fingerprint`. The caller holds the lock.

        Raises:
            ModelChangedError: names what was changed.
        """
        self._shared.check(fingerprint)

    def step_check(self) -> Callable[[], None]:
        """A check to call before each token of one answer, so that no answer is finished with other weights than it began with.

        The returned function looks at autograd's counters alone, which is fast. Its caller holds the lock.
        """
        fingerprint = self.fingerprint
        return lambda: self._shared.check(fingerprint, thorough=False)

    def renew(self) -> bool:
        """Go on with the weights as they are now. The caller holds the lock.

        Returns:
            Whether they differ from those before.

        Raises:
            ModelChangedError: dtype, device or shapes have changed, or weights are being changed.
            UnsupportedModelError: the model can't be served as it is now.
        """
        if self._given is not None:
            raise ModelChangedError(
                "the model's weights were changed, and not all of them can be read to find out what they are now: the engine was given "
                "their fingerprint. Close it, and make a new one with the fingerprint of the new weights."
            )
        found = self._shared.read()
        layout = self.adapter.layout
        if layout != self._layout:
            raise ModelChangedError(
                f"the model was changed to {layout.description}; this engine was made for {self._layout.description}. Close it and make a new one."
            )
        changed, self.fingerprint = found != self.fingerprint, found
        return changed
