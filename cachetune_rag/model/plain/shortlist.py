"""What a probe looks at: all rows of a prompt but those that are left out, and in its later layers those alone that scored highest in the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.model.family.taps import Hooks
from cachetune_rag.model.plain import attention


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Which tokens a probe goes on looking at. The rows of the others are hidden from all computed tokens in its later layers.

    Attributes:
        after: so many of the first layers look at all rows.
        count: how many of the tokens in `among` are looked at behind them: those with the largest scores so far.
        among: bool [length] on the host; the tokens that may be hidden. All others are always looked at.
        found: called once, before the first of the later layers, with what these use: bool [length] on the model's device.
    """

    after: int
    count: int
    among: Tensor
    found: Callable[[Tensor], None]


def seen_rows(scores: Tensor, among: Tensor, count: int, left_out: Tensor | None = None) -> Tensor:
    """Which rows the later layers use: bool [length]. `scores` so far, float32 [length], `among` and `left_out` are on one device, which isn't
    waited for.

    Of equal scores the first ones count as larger, on every device.
    """
    ranked = torch.where(among, scores, float("-inf")).sort(descending=True, stable=True).indices
    always = ~among if left_out is None else ~(among | left_out)
    return always.index_fill_(0, ranked[:count], True)


class MasksNotNamedError(Exception):
    """Rows were to be left out of a probe, in a family of models whose code doesn't hand attention masks over by name."""


class Narrowing:
    """Hides rows from the layers of a forward that runs on any device.

    Args:
        left_out: bool [length] on the host; rows that no layer uses. None: every row may be used.
        shortlist: which of the others the later layers use; None: all.
        scores: gives the scores so far, float32 [length], for a shortlist.
        device: where the model is.
    """

    def __init__(
        self, left_out: Tensor | None, shortlist: Shortlist | None, scores: Callable[[], Tensor], device: torch.device
    ):
        self._left_out = None if left_out is None else left_out.to(device)
        self._shortlist, self._scores = shortlist, scores
        self._rows: Tensor | None = None
        self._narrowed = self._given_up = False  # whether `_rows` are those of the shortlist; whether no row is hidden
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def wanted(self) -> bool:
        """Whether any layer is to look at some of the rows alone."""
        return self._left_out is not None or self._shortlist is not None

    def rows(self, layer: int) -> Tensor | None:
        """Places of the rows that a layer uses, int64, ascending; None for all. The layers before it are done."""
        if self._given_up:
            return None
        shortlist = self._shortlist
        if shortlist is not None and layer >= shortlist.after and not self._narrowed:
            scores, self._narrowed = self._scores(), True
            seen = seen_rows(scores, shortlist.among.to(scores.device), shortlist.count, self._left_out)
            self._use(seen)
            shortlist.found(seen)
        elif self._rows is None and self._left_out is not None:
            self._use(~self._left_out)
        return self._rows

    def _use(self, seen: Tensor) -> None:
        self._rows, self._masks = seen.nonzero()[:, 0], {}
        attention.narrow(self._rows)

    def without_mask(self) -> None:
        """A layer got no mask whose columns could be chosen: unless that was done before, every layer looks at all rows.

        Raises:
            MasksNotNamedError: some of the rows must not be looked at.
        """
        if self._left_out is not None:
            raise MasksNotNamedError
        self._given_up = self._rows is None

    def mask(self, rows: Tensor, mask: Tensor) -> Tensor:
        """The columns of an attention mask [1, 1, tokens, length] that belong to `rows`."""
        # All layers of one type get the same mask. It is kept alive, so that no other mask gets its id.
        if id(mask) not in self._masks:
            self._masks[id(mask)] = mask, mask.index_select(3, rows)
        return self._masks[id(mask)][1]


@contextmanager
def masks_narrowed(attentions: Sequence[nn.Module], narrowing: Narrowing) -> Iterator[None]:
    """While the context is open, the attention of each layer gets the mask of the rows that it uses. In a family that doesn't hand masks over by
    name, no row is hidden.

    Hooks see every forward of the model, so the caller holds the lock under which the model runs.
    """
    if not narrowing.wanted:
        yield
        return
    hooks = Hooks()
    try:
        for number, module in enumerate(attentions):

            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], number: int = number) -> Any:
                if not hooks.live:
                    return None
                mask = kwargs.get("attention_mask")
                if not isinstance(mask, Tensor):
                    narrowing.without_mask()
                if (rows := narrowing.rows(number)) is None:
                    return None
                if not isinstance(mask, Tensor):
                    raise RuntimeError(
                        f"{type(module).__name__} of layer {number} was given no attention_mask by name, though layers before were; "
                        "use a selector that looks at all rows, such as expected_error_early."
                    )
                return args, {**kwargs, "attention_mask": narrowing.mask(rows, mask)}

            hooks.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        hooks.live = False
        hooks.remove()
