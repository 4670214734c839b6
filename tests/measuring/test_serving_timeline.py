"""The benchmark of serving: what a trace says of a prompt that is put together beside running answers."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from served.plot import plot
from served.report import table
from served.targets import Answer
from served.timeline import Traced, lanes, timeline, timeline_table


def event(kind: str, name: str, begin: float, end: float, stream: int) -> dict[str, Any]:
    """Times in milliseconds."""
    return {
        "ph": "X", "cat": kind, "name": name, "ts": 1e3 * begin, "dur": 1e3 * (end - begin), "args": {"stream": stream},
    }  # fmt: skip


COPY = "Memcpy HtoD (Pinned -> Device)"
TRACE = [
    *(event("kernel", "gemm", at, at + 8, 7) for at in range(0, 600, 10)),  # vLLM's steps
    event("gpu_memcpy", COPY, 9, 10, 7),  # vLLM's own, too early to be of a prompt
    event("gpu_memcpy", COPY, 401, 415, 20),
    event("gpu_memcpy", COPY, 415.1, 420, 20),
    event("kernel", "_fetch", 420, 425, 20),
    event("kernel", "_attend", 410, 430, 13),
    event("kernel", "_place", 440, 441, 21),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 445, 446, 13),
    {"ph": "i", "cat": "kernel", "ts": 1},
]


def test_a_trace_tells_what_runs_beside_steps() -> None:
    found = lanes(TRACE)
    assert {name: round(1e3 * found[name], 3) for name in ("steps", "loading", "computing")} == {
        "steps": 7 + 3 * 8 + 1,  # from 401 to 441
        "loading": 14 + 4.9 + 5,
        "computing": 20 + 1,
    }
    assert found["loading_under_steps"] == pytest.approx((7 + 5 + 2.9 + 5) / 23.9)
    assert found["loading_under_computing"] == pytest.approx(14.9 / 23.9)
    assert found["computing_under_steps"] == pytest.approx((8 + 8 + 1) / 21)
    assert found["spans"]["loading"] == [(0.0, 0.024)], "small gaps are not kept"
    assert found["spans"]["computing"] == [(0.009, 0.029), (0.039, 0.04)]
    assert found["spans"]["steps"][:2] == [(0.0, 0.007), (0.009, 0.017)]


def test_without_a_device_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    worker = Traced()
    worker.begin_trace()
    found = worker.end_trace()
    assert found == lanes([])
    assert (found["loading"], found["spans"]["steps"]) == (0.0, [])


class Server:
    """Answers with a token every quarter of a second of a clock that each request moves on; traces nothing."""

    def __init__(self) -> None:
        self.engine, self.asked, self.called = self, list[tuple[list[int], int, Any]](), list[str]()
        self._clock = itertools.count(10)

    async def collective_rpc(self, name: str) -> list[Any]:
        self.called.append(name)
        return [lanes(TRACE)]

    async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
        self.asked.append((ids, tokens, reuse))
        return Answer(1.0, [0.25] * (tokens - 1), {"reused": 3}, 10.0 if tokens > 1 else next(self._clock))


def test_the_last_prompt_is_traced_beside_running_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("served.timeline.QUIET", 0.0)
    server: Any = Server()
    found = asyncio.run(timeline(server, [[1], [2]], [[3], [4]], {"ratio": 0.05}, 8))
    assert server.called == ["begin_trace", "end_trace"] * 2
    assert [asked for asked in server.asked if asked[1] == 1] == [([3], 1, {"ratio": 0.05}), ([4], 1, {"ratio": 0.05})]
    assert [asked for asked in server.asked if asked[1] == 8] == [([n], 8, {"reuse": False}) for n in (1, 2)]
    # The traced one was asked at 11 and answered at 12: each running answer had its tokens at 11, 11.25, 11.5, 11.75 and 12, the first of them before.
    assert found["tokens_meanwhile"] == 2 * 4
    assert (found["ttft"], found["last_report"]) == ({"median": 1.0}, {"reused": 3})


def test_traces_have_a_table_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "reuse/timeline/16384/default 0.05"
    cell = {"ttft": {"median": 0.1}, "tokens_meanwhile": 40, "lanes": lanes(TRACE)}
    content = {"groups": {name: cell}, "environment": {"gpu": "a GPU", "commit": "1234567"}}
    (row,) = timeline_table(content["groups"])[3:]
    assert row == "| 16,384 | default 0.05 | 100.0 | 23.9 | 83% | 62% | 21.0 | 81% | 40 |"
    assert row in table(content)
    assert timeline_table({"reuse/gaps/16384/default 0.05": {}}) == []
    (made,) = plot(content, tmp_path, "serving")
    assert made.name == "serving-timeline.svg"
    drawn = made.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("vLLM's steps", "16,384 tokens of chunks, default 0.05"))
