"""The kernels that move rows, in plain torch: they read and write by addresses, as the kernels do, so what the loader gives them is tried without Triton."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cachetune_rag.model.family.rope import turn_half_split
from cachetune_store import LayerSpec, get_codec

Use = Callable[[int, int, bool], None]
"""Is told of memory that is used: its address, bytes, and whether it is written to."""


def _unnoticed(address: int, count: int, writes: bool) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch, use: Use = _unnoticed) -> list[tuple[str, int]]:
    """Have them called in place of the kernels. Returns the list of calls, to which each is added: its name, and how many layers it has."""
    calls: list[tuple[str, int]] = []

    def gather(hosts: Tensor, bases: Tensor, where: Tensor, count: Tensor, **form: Any) -> None:
        calls.append(("gather", len(hosts)))
        stretches = [(0, form["row_bytes"])] if form["wanted"] is None else form["wanted"].row
        assert form["group_bytes"] == 0
        assert hosts.shape == bases.shape
        for layer in range(len(hosts)):
            for each in where[: int(count)].tolist():
                source, number = each >> 32, each & 0x7FFFFFFF
                if (host := int(hosts[layer, source])) == 0:
                    continue
                for start, size in stretches:
                    at = number * form["row_bytes"] + start
                    use(int(bases[layer, source]) + at, size, True)
                    ctypes.memmove(int(bases[layer, source]) + at, host + at, size)

    def place(
        bases: Tensor,
        where: Tensor,
        places: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        keys: Tensor,
        values: Tensor,
        *,
        steps: tuple[int, int],
        split: Tensor | None,
        rest: bool,
        **form: Any,
    ) -> None:
        calls.append(("place", len(bases)))
        assert form["group_bytes"] == 0
        at = slice(None) if split is None else slice(int(split), None) if rest else slice(0, int(split))
        own = slice(form["first_head"], form["first_head"] + keys.shape[1])
        for layer in range(len(bases)):
            for each, to in zip(where[at].tolist(), places[at].tolist(), strict=True):
                address = int(bases[layer, each >> 32]) + (each & 0x7FFFFFFF) * form["row_bytes"]
                use(address, form["row_bytes"], False)
                row = torch.frombuffer(bytearray(ctypes.string_at(address, form["row_bytes"])), dtype=torch.uint8)
                spec = LayerSpec(form["stored_heads"], keys.shape[2], values.shape[2])
                k, v = (part[:, own].contiguous() for part in get_codec(form["codec"]).decode(row, spec, keys.dtype))
                if cos is not None and sin is not None:
                    k = turn_half_split(k, cos[to : to + 1], sin[to : to + 1]).contiguous()
                for rows, made, step in ((keys, k, steps[0]), (values, v, steps[1])):
                    size = rows.dtype.itemsize
                    ctypes.memmove(
                        rows.data_ptr() + (layer * step + to * rows.stride(0)) * size, made.data_ptr(), made.nbytes
                    )

    fetch = lambda host, out: out.copy_(host)  # noqa: E731
    monkeypatch.setitem(
        sys.modules, "cachetune_rag.kernels.rows", SimpleNamespace(gather=gather, place=place, fetch=fetch)
    )
    return calls
