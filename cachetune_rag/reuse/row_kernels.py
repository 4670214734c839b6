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

_STEP, _FAR = 16, 1 << 31
"""From layer to layer, keys and values lie a multiple of so many numbers apart, and fewer than so many bytes, where several layers are placed together."""


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

    def alike_until(
        self, forms: Sequence[list[RowFormat]], buffers: KVBuffers, tables: dict[str | None, Tables]
    ) -> list[int]:
        """For each layer, the first one behind it of which rows can't be moved by the same calls: layers whose rows lie alike and are rotated alike, and
        whose memory in the prompt's buffers lies at equal distances.

        Args:
            forms: of each group of the prompt's chunks, how its rows lie in every layer. The kernel can place them all.
            buffers, tables: the prompt's buffers, and its rotary tables.
        """
        adapter, count = self._adapter, self._adapter.num_layers
        steps = [self._steps(buffers, layer) for layer in range(1, count)]
        turns = [adapter.rotation(layer, tables)[0] for layer in range(count)]
        until = [count] * count
        for layer in reversed(range(count - 1)):
            behind = layer + 1
            alike = (
                turns[layer] is turns[behind]
                and adapter.layers[layer] == adapter.layers[behind]
                and adapter.stored_layers[layer] == adapter.stored_layers[behind]
                and all(form[layer] is form[behind] or form[layer] == form[behind] for form in forms)
            )
            if steps[layer] is None or not alike:
                until[layer] = behind
            else:
                until[layer] = until[behind] if steps[layer] == steps[min(behind, count - 2)] else behind + 1
        return until

    @staticmethod
    def _steps(buffers: KVBuffers, layer: int) -> tuple[int, int] | None:
        """By how many numbers keys and values of a layer lie behind those of the layer before; None: not so that `kernels.rows.place` takes it."""
        size = buffers.dtype.itemsize
        steps = [rows[layer].data_ptr() - rows[layer - 1].data_ptr() for rows in (buffers.key_rows, buffers.value_rows)]
        if any(step % (_STEP * size) or not 0 < step < _FAR for step in steps):
            return None
        return steps[0] // size, steps[1] // size

    def gather(
        self,
        layers: range,
        key: tuple[str, str],
        form: RowFormat,
        *,
        hosts: Tensor,
        bases: Tensor,
        where: Tensor,
        count: Tensor,
    ) -> None:
        """Queue copies of single rows of some layers from page-locked host memory, as `kernels.rows.gather`; `form` says how they lie.

        Of several layers, each is before `alike_until` of the first one.
        """
        from cachetune_rag.kernels.rows import gather

        gather(
            hosts,
            bases,
            where,
            count,
            row_bytes=form.row_bytes,
            group_rows=form.group_rows,
            group_bytes=form.group_bytes,
            wanted=self.own_bytes(layers.start, key),
        )

    def place(
        self,
        layers: range,
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
        """Queue putting rows into their places of some layers' buffers, as `kernels.rows.place`; `tables` are the prompt's rotary tables.

        Of several layers, each is before `alike_until` of the first one.
        """
        from cachetune_rag.kernels.rows import place

        adapter, layer = self._adapter, layers.start
        steps = self._steps(buffers, layer + 1) if len(layers) > 1 else (0, 0)
        assert steps is not None
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
            steps=steps,
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
        bases, layers = torch.tensor([[row.data_ptr(), 0]], device=adapter.device), range(layer, layer + 1)
        nothing = torch.zeros(2, dtype=torch.int64, device=adapter.device)
        # All rows at once (None); those that a selector sees first, which are gathered before they are placed (False); and the others (True).
        for part in (None, False, True):
            split = None if part is None else nothing[:1]
            if part is False:
                kernels.gather(layers, key, form, hosts=nothing[None], bases=bases, where=nothing, count=nothing[:1])
            kernels.place(
                layers, key, form, buffers, tables, bases=bases, where=nothing, places=nothing, split=split, rest=bool(part)
            )  # fmt: skip
    torch.cuda.synchronize(adapter.device)
