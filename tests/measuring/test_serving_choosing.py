"""What the benchmark of serving watches of the thread that puts prompts together."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from served import choosing as watching
from served.choosing import CALLS, CHOSEN, COMPUTED, SPANS, Watched, choosing, choosing_table
from served.host_steps import owner_of
from served.in_worker import InWorker
from served.plan import WAYS
from served.targets import Answer

PLACES = [place for place in (*SPANS.values(), *CALLS.values()) if not place[0].startswith("cachetune_vllm")]
"""What can be imported without vLLM; tests/vllm looks for the others."""


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_every_watched_function_is_there(place: tuple[str, str]) -> None:
    owner, name = owner_of(place)
    assert callable(getattr(owner, name, None))


class Parts:
    """Stands for what puts prompts together."""

    def choose(self) -> None:
        self.queue()
        self.queue()
        gc.collect()
        other = threading.Thread(target=self.queue)
        other.start()
        other.join()

    def queue(self) -> torch.Tensor:
        return torch.zeros(1).cpu()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    module = ModuleType("watched_here")
    module.Parts = Parts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        watching, "SPANS", {CHOSEN: ("watched_here", "Parts.choose"), COMPUTED: ("watched_here", "Parts.gone")}
    )
    calls = {"queued": ("watched_here", "Parts.queue"), "scores waited for": CALLS["scores waited for"]}
    monkeypatch.setattr(watching, "CALLS", calls)
    return Parts()


class Server:
    """A server whose requests call `Parts.choose`."""

    def __init__(self, parts: Parts):
        self.engine, self._parts, self._worker = self, parts, InWorker()
        self.seen: list[tuple[float, bool]] = []

    async def collective_rpc(self, name: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        return [getattr(self._worker, name)(**(kwargs or {}))]

    async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
        self._parts.queue()  # outside of what is watched
        self._parts.choose()
        self.seen.append((sys.getswitchinterval(), gc.isenabled()))
        return Answer(float(ids[0]), report={"reused": 1})


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_the_watched_thread_are_noted_and_everything_is_as_before(way: str, parts: Parts) -> None:
    before = Parts.choose, Parts.queue, torch.Tensor.cpu, sys.getswitchinterval(), gc.isenabled(), len(gc.callbacks)
    server = Server(parts)
    found = asyncio.run(choosing(server, [[number] for number in range(5)], {"ratio": 0.15}, way))  # type: ignore[arg-type]
    assert (
        Parts.choose,
        Parts.queue,
        torch.Tensor.cpu,
        sys.getswitchinterval(),
        gc.isenabled(),
        len(gc.callbacks),
    ) == before
    assert "cpu" not in vars(torch.Tensor)
    interval = WAYS[way].get("switch", sys.getswitchinterval())
    assert server.seen == [(pytest.approx(interval), WAYS[way].get("collect", True))] * 5
    assert found["ttft"] == {"median": 3.0, "samples": [2.0, 3.0, 4.0]}
    assert found["last_report"] == {"reused": 1}
    for row, ttft in zip(found["each"], (2.0, 3.0, 4.0), strict=True):
        assert row["ttft"] == ttft
        assert COMPUTED not in row
        span = row[CHOSEN]
        assert {name: count for name, (count, _, _) in span["calls"].items()} == {"queued": 2, "scores waited for": 2}
        assert all(0 <= longest <= seconds <= span["seconds"] for _, seconds, longest in span["calls"].values())
        assert span["collections"] >= 1
        assert 0 < span["collecting"] <= span["seconds"]
        assert span["used"] > 0


def test_where_the_system_counts_no_waits_none_are_told(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "resource", None)
    found = asyncio.run(choosing(Server(parts), [[number] for number in range(5)], {}, ""))  # type: ignore[arg-type]
    assert not any({"waits", "taken_away"} & set(row[CHOSEN]) for row in found["each"])
    lines = choosing_table({"reuse/choosing/256/default 0.15": found})
    assert [line for line in lines if "waits" in line or "taken" in line] == [
        "| waits |  |  |  |  |",
        "| taken_away |  |  |  |  |",
    ]


def test_a_worker_that_watches_nothing_has_found_nothing() -> None:
    assert Watched().end_watch() == []


def test_slow_requests_stand_beside_fast_ones() -> None:
    def row(seconds: float, queued: float) -> dict[str, Any]:
        span = {
            "seconds": seconds,
            "used": seconds / 2,
            "collecting": 0.0,
            "waits": 3,
            "taken_away": 1,
            "calls": {"copies queued": [2, queued, queued]},
        }
        return {"ttft": 1.0, CHOSEN: span}

    groups = {
        "reuse/alone/4096/default 0.15": {"ttft": {"median": 0.05}},
        "reuse/choosing/4096/default 0.15": {"each": [row(0.04, 0.02), row(0.01, 0.002), row(0.02, 0.004)]},
    }
    assert choosing_table(groups) == [
        "",
        "reuse/choosing/4096/default 0.15, ms in the median of the half of its 3 requests in which choosing took less, and of the other half",
        "| | chosen: less | more | computing queued: less | more |",
        "| --- | --- | --- | --- | --- |",
        "| seconds | 10.00 | 30.00 |  |  |",
        "| used | 5.00 | 15.00 |  |  |",
        "| collecting | 0.00 | 0.00 |  |  |",
        "| waits | 3.00 | 3.00 |  |  |",
        "| taken_away | 1.00 | 1.00 |  |  |",
        "| copies queued | 2.00 | 12.00 |  |  |",
    ]
    assert choosing_table({"reuse/alone/4096/default 0.15": groups["reuse/alone/4096/default 0.15"]}) == []
    left = {"each": [{"ttft": 1.0}], "last_report": {"left": "few"}}
    assert choosing_table({"reuse/choosing/256/default 0.15": left}) == [
        "",
        "reuse/choosing/256/default 0.15: nothing is told, since not each of its requests was put together once: {'left': 'few'}",
    ]
