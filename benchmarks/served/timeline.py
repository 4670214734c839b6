"""What a GPU does while a prompt is put together beside running answers: torch's profiler in vLLM's worker, and what its trace says.

vLLM loads `Traced` into its worker (`worker_extension_cls`). The profiler is told to note what runs on the GPU alone, so it hardly slows the host down.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speed.timeline import Span, common, joined, total

from served.targets import Answer, Reuse, Target

QUIET = 0.2
"""Seconds at the beginning of a trace in which nothing but vLLM's own steps runs: the streams that are used then are vLLM's."""
FINE = 200.0
"""Microseconds. In what is kept for a plot, work that is less than this apart is one piece."""
FETCH = "_fetch"
"""In the name of the kernel that brings rows from the host's memory (`cachetune_rag/kernels/rows.py`)."""
LANES = {"steps": "vLLM's steps", "loading": "rows are loaded", "computing": "tokens are chosen and computed"}

_profiler: Any = None


class Traced:
    """Added to vLLM's worker."""

    def begin_trace(self) -> None:
        """Note from now on what runs on the GPU."""
        global _profiler
        if torch.cuda.is_available():
            _profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            _profiler.start()

    def end_trace(self) -> dict[str, Any]:
        """What ran on the GPU since `begin_trace`; see `lanes`. Without a GPU, that is nothing."""
        global _profiler
        profiler, _profiler = _profiler, None
        if profiler is None:
            return lanes([])
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return lanes(json.loads(path.read_text())["traceEvents"])


async def timeline(
    target: Target, running: Sequence[list[int]], arriving: Sequence[list[int]], reuse: Reuse, tokens: int
) -> dict[str, Any]:
    """Some requests are being answered; meanwhile prompts arrive, one behind the other. The last of them is traced.

    Returns: what `lanes` says; "ttft" of that prompt; "tokens_meanwhile": of the running answers, from its arrival to its first token.
    """
    for name in ("begin_trace", "end_trace"):  # a process' first trace takes long to begin
        await target.engine.collective_rpc(name)
    tasks = [asyncio.create_task(target.ask(ids, tokens, {"reuse": False})) for ids in running]
    *warm, traced = arriving
    for ids in warm:
        await target.ask(ids, 1, reuse)
    await target.engine.collective_rpc("begin_trace")
    await asyncio.sleep(2 * QUIET)
    answer = await target.ask(traced, 1, reuse)
    (found,) = await target.engine.collective_rpc("end_trace")
    meanwhile = sum(_between(each, answer.began, answer.began + answer.ttft) for each in await asyncio.gather(*tasks))
    return {
        "ttft": {"median": answer.ttft},
        "tokens_meanwhile": meanwhile,
        "lanes": found,
        "last_report": answer.report,
    }


def lanes(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a trace says of one prompt that is put together beside vLLM's steps. All of it is zero if nothing ran on a device, or where prompts are put together on vLLM's own
    stream (some quantised weights). Times are in seconds.

    Returns:
        steps, loading, computing: while vLLM's own streams were busy, rows were brought to the device, and another stream computed (or decoded and placed rows), between the first
            and the last moment of the two latter.
        loading_under_steps, loading_under_computing, computing_under_steps: the share of the first during which there was the second, too.
        spans: of each of the three, beginnings and ends from the first moment on; see `FINE`.
    """
    work = [
        (str(e.get("cat")), str(e.get("name", "")), e.get("args", {}).get("stream"), (float(e["ts"]), float(e["ts"]) + float(e["dur"])))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy") and "dur" in e
    ]  # fmt: skip
    begin = min((span[0] for *_, span in work), default=0.0)
    of_vllm = {stream for kind, _, stream, span in work if kind == "kernel" and span[0] < begin + 1e6 * QUIET}
    found: dict[str, list[Span]] = {name: [] for name in LANES}
    for kind, name, stream, span in work:
        if kind == "kernel":
            lane = "steps" if stream in of_vllm else "loading" if FETCH in name else "computing"
            found[lane].append(span)
        elif "HtoD" in name and stream not in of_vllm:
            found["loading"].append(span)
    ours = [*found["loading"], *found["computing"]]
    first, last = min((span[0] for span in ours), default=0.0), max((span[1] for span in ours), default=0.0)
    busy = {name: common(joined(spans), [(first, last)]) for name, spans in found.items()}

    def under(one: str, other: str) -> float:
        every = total(busy[one])
        return total(common(busy[one], busy[other])) / every if every else 0.0

    return {
        **{name: total(spans) / 1e6 for name, spans in busy.items()},
        "loading_under_steps": under("loading", "steps"),
        "loading_under_computing": under("loading", "computing"),
        "computing_under_steps": under("computing", "steps"),
        "spans": {name: [_from(first, span) for span in _coarse(spans)] for name, spans in busy.items()},
    }


def timeline_table(groups: Mapping[str, Any]) -> list[str]:
    """A row for each prompt that was traced; nothing where none was."""
    rows = []
    for name, found in groups.items():
        if "lanes" not in found:
            continue
        of, (_, _, context, setting) = found["lanes"], (*name.split("/"),)
        cells = (
            f"{int(context):,}", setting, f"{1e3 * found['ttft']['median']:.1f}", f"{1e3 * of['loading']:.1f}", f"{of['loading_under_steps']:.0%}",
            f"{of['loading_under_computing']:.0%}", f"{1e3 * of['computing']:.1f}", f"{of['computing_under_steps']:.0%}", str(found["tokens_meanwhile"]),
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    head = "| context | setting | first token ms | loading ms | beside vLLM's steps | beside computing | computing ms | beside vLLM's steps | tokens of running answers meanwhile |"
    return ["", head, "| --- " * 9 + "|", *rows] if rows else []


def _between(answer: Answer, begin: float, end: float) -> int:
    at, count = answer.began + answer.ttft, 0
    for gap in (0.0, *answer.gaps):
        at += gap
        count += begin < at <= end
    return count


def _coarse(spans: Sequence[Span]) -> list[Span]:
    found: list[Span] = []
    for begin, end in spans:
        if found and begin - found[-1][1] < FINE:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def _from(first: float, span: Span) -> tuple[float, float]:
    return round((span[0] - first) / 1e6, 6), round((span[1] - first) / 1e6, 6)
