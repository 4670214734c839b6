"""The calls of the kernels that move chunks' rows: `gather` copies single rows from the host, `place` decodes, rotates and places them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachetune_rag.kernels import CODECS
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.family.rope import Tables
from cachetune_rag.reuse.layer_loader import head_bytes, row_format
from cachetune_store import HeadBytes, RowFormat


class RowKernels:
    """Calls the kernels with what they have to know of a model. The arguments called `key` are a codec's name and a dtype's.

    Args:
        adapter: the model.
        usable: whether kernels run on its device.
    """

    def __init__(self, adapter: ModelAdapter, usable: bool):
        self._adapter, self._usable = adapter, usable

    def can_place(self, key: tuple[str, str], layers: Sequence[int]) -> bool:
        """Whether `place` gives exactly what the codec's and the model's own code give, in all of `layers`."""
        codec, dtype = key
        return (
            self._usable
            and codec in CODECS
            and dtype == str(self._adapter.dtype).removeprefix("torch.")
            and all(self._adapter.half_split[layer] for layer in layers)
        )

    def own_bytes(self, layer: int, key: tuple[str, str]) -> HeadBytes | None:
        """Where the heads of this process lie in rows of a layer; None where it has all heads."""
        heads = self._adapter.heads
        if not heads.shared:
            return None
        own = heads.own(self._adapter.layers[layer])
        return head_bytes(*key, self._adapter.stored_layers[layer], own.start, own.stop - own.start)

    def gather(
        self,
        layer: int,
        key: tuple[str, str],
        form: RowFormat,
        *,
        hosts: Tensor,
        bases: Tensor,
        where: Tensor,
        count: Tensor,
    ) -> None:
        """Queue copies of single rows from page-locked host memory, as `kernels.rows.gather`; `form` says how they lie."""
        from cachetune_rag.kernels.rows import gather

        gather(
            hosts,
            bases,
            where,
            count,
            row_bytes=form.row_bytes,
            group_rows=form.group_rows,
            group_bytes=form.group_bytes,
            wanted=self.own_bytes(layer, key),
        )

    def place(
        self,
        layer: int,
        key: tuple[str, str],
        form: RowFormat,
        buffers: KVBuffers,
        tables: dict[str | None, Tables],
        *,
        bases: Tensor,
        where: Tensor,
        places: Tensor,
        split: Tensor | None = None,
        rest: bool = False,
    ) -> None:
        """Queue putting rows into their places of a layer's buffers, as `kernels.rows.place`; `tables` are the prompt's rotary tables."""
        from cachetune_rag.kernels.rows import place

        adapter = self._adapter
        cos, sin = adapter.rotation(layer, tables)
        place(
            bases,
            where,
            places,
            cos,
            sin,
            buffers.key_rows[layer],
            buffers.value_rows[layer],
            codec=key[0],
            row_bytes=form.row_bytes,
            group_rows=form.group_rows,
            group_bytes=form.group_bytes,
            aligned=not (form.row_bytes % 16 or form.group_bytes % 16),
            stored_heads=adapter.stored_layers[layer].heads,
            first_head=adapter.heads.own(adapter.layers[layer]).start,
            split=split,
            rest=rest,
        )


def warm_up(adapter: ModelAdapter, codec: str) -> None:
    """Compile the kernels that move rows of `codec`, for all shapes of layers."""
    if codec not in CODECS or not adapter.cuda_kernels:
        return
    tables, buffers = adapter.rotary_tables(1), adapter.new_buffers(1)
    key, kernels = (codec, str(adapter.dtype).removeprefix("torch.")), RowKernels(adapter, usable=True)
    done = set()
    for layer, spec in enumerate(adapter.layers):
        shape = spec, adapter.rotation(layer, tables)[0] is None
        if shape in done or not adapter.half_split[layer]:
            continue
        done.add(shape)
        form = row_format(*key, adapter.stored_layers[layer])
        row = torch.zeros(form.span(1), dtype=torch.uint8, device=adapter.device)
        bases = torch.tensor([row.data_ptr(), 0], device=adapter.device)
        nothing = torch.zeros(2, dtype=torch.int64, device=adapter.device)
        # All rows at once (None); those that a selector sees first, which are gathered before they are placed (False); and the others (True).
        for part in (None, False, True):
            split = None if part is None else nothing[:1]
            if part is False:
                kernels.gather(layer, key, form, hosts=nothing, bases=bases, where=nothing, count=nothing[:1])
            kernels.place(
                layer, key, form, buffers, tables, bases=bases, where=nothing, places=nothing, split=split, rest=bool(part)
            )  # fmt: skip
    torch.cuda.synchronize(adapter.device)
