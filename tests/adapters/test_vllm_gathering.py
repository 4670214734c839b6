"""What processes tell each other: here two threads, with a stand-in for the collective call."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from cachetune_vllm import gathering
from cachetune_vllm.gathering import ROOM, gathered

PROCESSES = 2


class Meeting:
    """Two threads, each of which is a process of the group: its calls are counted."""

    def __init__(self) -> None:
        self.calls = [0] * PROCESSES
        self._numbers = threading.local()
        self._there = threading.Barrier(PROCESSES, timeout=30)
        self._sent: list[Any] = [None] * PROCESSES

    def all_gather(self, told: list[Tensor], mine: Tensor, group: object) -> None:
        number = self._numbers.value
        self.calls[number] += 1
        self._sent[number] = mine
        self._there.wait()
        for into, sent in zip(told, self._sent, strict=True):
            into.copy_(sent)
        self._there.wait()

    def tell(self, number: int, value: Any) -> list[Any]:
        self._numbers.value = number
        return gathered(value, self)


@pytest.mark.parametrize(
    ("values", "calls"),
    [
        ([(None, 3), (None, 3)], 1),
        ([(None, 3), ("OSError", None)], 1),
        ([b"x" * 5 * ROOM] * 2, 1),  # the same on both: that is all there is to know
        ([b"x" * 5 * ROOM, b"y" * 5 * ROOM], 2),
        ([b"x" * 5 * ROOM, None], 2),
    ],
    ids=["the same", "short", "the same, long", "long", "one long"],
)
def test_everybody_hears_what_everybody_tells(values: list[Any], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting()
    world = SimpleNamespace(all_gather=meeting.all_gather, get_world_size=lambda _group: PROCESSES)
    monkeypatch.setattr(gathering, "dist", world)
    with ThreadPoolExecutor(PROCESSES) as pool:
        told = list(pool.map(meeting.tell, range(PROCESSES), values))
    assert told == [values, values]
    assert meeting.calls == [calls, calls]
