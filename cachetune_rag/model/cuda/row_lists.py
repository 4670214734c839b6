"""Which rows the layers of a probe use, where they don't use all: those of a shortlist, and none of new passages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.model.cuda.graphs import Inputs, Kind
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.model.plain.shortlist import seen_rows


class RowLists:
    """Writes which rows the layers of a probe use. The host doesn't wait for it.

    Args:
        probe: says which.
        summed: see `DeviceForward.expected_error`; None: the probe has no shortlist.
    """

    def __init__(self, probe: ProbePass, summed: Callable[[Tensor], Tensor] | None = None):
        self._probe, self._summed = probe, summed
        self._shortlist = None if summed is None else probe.shortlist

    @property
    def roles(self) -> NDArray[np.int64]:
        """What becomes of each row, int64 [length]: 1 if it may be hidden by the shortlist, 2 if it is left out, 0 if all layers use it."""
        length, (left_out, shortlist) = self._probe.buffers.length, (self._probe.left_out, self._shortlist)
        roles = np.zeros(length, np.int64) if shortlist is None else shortlist.among.numpy().astype(np.int64)
        if left_out is not None:
            roles[left_out.numpy()] = 2
        return roles

    def write(self, layer: int, inputs: Inputs, total: Tensor) -> None:
        """Write the rows that `layer` and those behind it use, if it is the first one that uses them. `total` is what was added up before it."""
        length, shortlist = self._probe.buffers.length, self._shortlist
        if layer == 0 and self._probe.left_out is not None:
            inputs.list_rows(inputs.roles[:length] != 2, self._probe.looked_at)
        if shortlist is not None and layer == shortlist.after:
            assert self._summed is not None
            roles = inputs.roles[:length]
            seen = seen_rows(self._summed(total.sum(0)[:length]), roles == 1, shortlist.count, roles == 2)
            inputs.list_rows(seen, self._probe.shortlisted)
            shortlist.found(seen)


def listing(
    before: Callable[[int], None], kind: Kind, lists: RowLists | None, inputs: Inputs, total: Tensor | None
) -> Callable[[int], None]:
    """`before`, ahead of which `lists` writes which rows a layer uses."""
    if lists is None or total is None or kind.listed is None:
        return before

    def list_and_go_on(layer: int) -> None:
        lists.write(layer, inputs, total)
        before(layer)

    return list_and_go_on
