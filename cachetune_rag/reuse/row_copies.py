"""Copies of a prompt's encoded rows to the device: into staging memory, on the stream that copies.

Rows in page-locked memory are copied by their addresses (`host_copies.py`) where that is possible, all of some layers by one call; others are
read as tensors, and torch copies them. What is then made of the rows, and when which layer's turn is, `device_loader.py` knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cachetune_rag.model.libraries.private import copy_all
from cachetune_rag.reuse.device_groups import DeviceGroups, Narrowed
from cachetune_rag.reuse.host_copies import HostCopies, copied_bytes
from cachetune_rag.reuse.layer_loader import REST
from cachetune_rag.reuse.row_kernels import RowKernels
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.streams import Streams
from cachetune_store import HeadBytes, RowFormat
from cachetune_store.tier_kinds import HOST


class RowCopies:
    """Copies the rows of some layers after the other: `begin`, `collect` for each layer and group, `gather` where single rows are copied, `queue`.

    It doesn't refer to the loader that has it: see `RowForms`.

    Args:
        streams: on which rows are copied.
        kernels: which bytes of a row are wanted, and copying single rows.
        on_device: where each group's rows go.
        copies: copies by address; None if there are none.
        forms: gives how a group's rows lie in every layer.
        keep: so many times `begin` has to be called until memory that torch doesn't know to be in use may be freed.
    """

    def __init__(
        self,
        streams: Streams,
        kernels: RowKernels,
        on_device: DeviceGroups,
        copies: HostCopies | None,
        forms: Callable[[tuple[str, str]], list[RowFormat]],
        *,
        keep: int,
    ):
        self._streams, self._kernels, self._on_device = streams, kernels, on_device
        self._copies, self._forms = copies, forms
        # Rows from disks, of which torch doesn't know that they are being copied; by what was queued together.
        self._kept: deque[list[Tensor]] = deque(maxlen=keep)

    def begin(self) -> None:
        """What is collected from now on is queued together."""
        self._kept.append([])

    def collect(
        self,
        layer: int,
        key: tuple[str, str],
        group: Sequence[Source],
        slow: Iterator[Tensor],
        narrowed: Narrowed | None,
        part: str,
    ) -> None:
        """Queue the copies of a group's rows into its staging memory. Rows that the kernel reads where they lie are only counted, and sources that
        come in two parts are left out of the first one, of which single rows are gathered."""
        form, mine, on_device = (
            self._forms(key)[layer],
            self._kernels.own_bytes(layer, key),
            self._on_device.prepare(key),
        )
        addresses = on_device.addresses[layer]
        if part == REST:
            # All rows of a source, also those that are there: gathering the others would keep multiprocessors from the recompute, while the
            # bus has nothing else to do.
            if narrowed is not None and self._copies is not None:
                hosts = narrowed.addresses[layer]
                later = [each for each in zip(addresses, hosts, group, strict=False) if each[1]]
                self._copies.collect_rows([(to, host, source.rows) for to, host, source in later], form, mine)
            return
        by_torch: list[tuple[Source, int]] = []
        locked: list[tuple[int, int, int]] = []
        others: list[tuple[int, int, int]] = []
        for number, source in enumerate(group):
            reader = source.reader
            if on_device.in_place[number]:
                reader.locate(layer, source.rows)
            elif narrowed is not None and narrowed.apart[number]:
                continue
            elif self._copies is not None and reader.kind is HOST:
                some = locked if reader.page_locked else others
                some.append((addresses[number], reader.locate(layer, source.rows), source.rows))
            else:
                by_torch.append((source, addresses[number]))
        if self._copies is not None:
            self._copies.collect_rows(locked, form, mine)
            self._copies.collect_rows(others, form, None)
        if by_torch:  # most prompts have none: entering a stream takes the host some microseconds for each layer
            stage = self._on_device.stage(layer, key)
            assert stage is not None
            with torch.cuda.stream(self._streams.copy):
                self._copy_pieces(layer, form, mine, by_torch, stage, slow)

    def _copy_pieces(
        self,
        layer: int,
        form: RowFormat,
        mine: HeadBytes | None,
        sources: Sequence[tuple[Source, int]],
        stage: Tensor,
        slow: Iterator[Tensor],
    ) -> None:
        """Queue the copies of rows that are read as tensors, each source's to its address in the staging memory, on the current stream."""
        targets, pieces = [], []
        for source, address in sources:
            reader = source.reader
            piece = reader.read(layer, source.rows) if reader.in_memory else next(slow)
            if self._copies is not None and mine is not None and piece.is_pinned():
                self._copies.collect_rows([(address, piece.data_ptr(), source.rows)], form, mine)
                self._kept[-1].append(piece)
            else:
                pieces.append(piece)
                at = address - stage.data_ptr()
                targets.append(stage[at : at + form.size(source.rows)])
        if pieces:
            copy_all(targets, pieces, non_blocking=True)

    def gather(self, layers: range, narrowed: Mapping[tuple[str, str], Narrowed | None]) -> None:
        """Queue the copies of the rows of each group that are seen first into its staging memory."""
        some = slice(layers.start, layers.stop)
        with torch.cuda.stream(self._streams.copy):
            for key, parts in narrowed.items():
                if parts is not None:
                    self._kernels.gather(
                        layers,
                        key,
                        self._forms(key)[layers.start],
                        hosts=parts.hosts[some],
                        bases=self._on_device.prepare(key).bases[some],
                        where=parts.where,
                        count=parts.split,
                    )

    def queue(self) -> None:
        """Queue the copies by address that were collected."""
        if self._copies is not None:
            self._copies.queue(self._streams.copy.cuda_stream)

    def size(self, layer: int, key: tuple[str, str], rows: int) -> int:
        """How many bytes of some rows of a chunk in host memory are copied."""
        return copied_bytes(self._forms(key)[layer], self._kernels.own_bytes(layer, key), rows)
