"""What the thread that puts prompts together does while tokens are chosen and computed, request by request: which calls take its time, and whether it ran meanwhile.

vLLM loads `Watched` into its worker (`worker_extension_cls`). A thread that is slow because its core is slow has used as much of the processor's time as has passed; one
that waited (for the device, for the interpreter's lock, for a core) has used less.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

from served.host_steps import owner_of
from served.plan import WAYS
from served.targets import Reuse, Target

CHOSEN, COMPUTED = "tokens chosen", "computing queued"
SPANS = {
    CHOSEN: ("cachetune_rag.reuse.plan", "Planner.choose"),
    COMPUTED: ("cachetune_rag.reuse.prompt_forward", "PromptForward.planned"),
}
"""What is watched as a whole, by name: module and function."""
CALLS = {
    "a layer asked for": ("cachetune_rag.reuse.device_loader", "DeviceLoader._give"),
    "a layer's rows queued": ("cachetune_rag.reuse.device_loader", "DeviceLoader._queue"),
    "copies queued": ("cachetune_rag.reuse.host_copies", "HostCopies.queue"),
    "single rows queued": ("cachetune_rag.reuse.row_kernels", "RowKernels.gather"),
    "placing queued": ("cachetune_rag.reuse.row_kernels", "RowKernels.place"),
    "rows told apart": ("cachetune_rag.reuse.device_groups", "DeviceGroups.narrow"),
    "deviations queued": ("cachetune_rag.reuse.device_loader", "DeviceLoader.copy_deviations"),
    "rows listed": ("cachetune_rag.model.cuda.row_lists", "RowLists.write"),
    "a piece of a graph queued": ("torch.cuda", "CUDAGraph.replay"),
    "the model run without a graph": ("cachetune_rag.model.cuda.device_forward", "DeviceForward._eager"),
    "a graph captured": ("cachetune_rag.model.cuda.device_forward", "DeviceForward._capture"),
    "an event waited for": ("torch.cuda", "Event.synchronize"),
    "numbers sent": ("cachetune_rag.model.cuda.graphs", "Inputs.fill"),
    "sentences compared": ("cachetune_rag.selection.whole_sentences", "SentenceChoice.__init__"),
    "scores waited for": ("torch", "Tensor.cpu"),
    "pages written": ("cachetune_vllm.pages", "Pages.write"),
}
"""Calls inside of these. One may be inside another, and both count."""
MORE = 3
"""So many times the usual number of requests are watched, since it is the slow ones among them that count."""

_watch: _Watch | None = None
_usual = sys.getswitchinterval(), True
"""The switch interval, and whether the collector runs, outside of a watch."""


class _Watch:
    """Notes what one thread does inside of `SPANS`, from `start` to `stop`."""

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._thread = 0
        self._undo: list[Callable[[], None]] = []
        self._collecting = 0.0
        for name, place in SPANS.items():
            self._replace(place, functools.partial(self._span, name))
        for name, place in CALLS.items():
            self._replace(place, functools.partial(self._call, name))
        gc.callbacks.append(self._collected)

    def stop(self) -> list[dict[str, Any]]:
        """What was found: a dict for each span, in their order. Functions are as they were."""
        gc.callbacks.remove(self._collected)
        for undo in reversed(self._undo):
            undo()
        return self._found

    def _replace(self, place: tuple[str, str], made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        owner, last = owner_of(place)
        function = getattr(owner, last, None)
        if function is None:
            return
        own = last in vars(owner)
        setattr(owner, last, functools.wraps(function)(made(function)))
        self._undo.append(
            functools.partial(setattr, owner, last, function) if own else functools.partial(delattr, owner, last)
        )

    def _span(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spanned(*args: Any, **kwargs: Any) -> Any:
            self._thread = threading.get_ident()
            found: dict[str, Any] = {"span": name, "calls": {}, "collections": 0, "collecting": 0.0}
            before, used, started = _switches(), time.thread_time(), time.perf_counter()
            self._open = found
            try:
                return function(*args, **kwargs)
            finally:
                self._open = None
                found["seconds"], found["used"] = time.perf_counter() - started, time.thread_time() - used
                found |= {name: count - before[name] for name, count in _switches().items()}
                self._found.append(found)

        return spanned

    def _call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            found = self._open
            if found is None or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                entry = found["calls"].setdefault(name, [0, 0.0, 0.0])
                entry[0] += 1
                entry[1] += took
                entry[2] = max(entry[2], took)

        return called

    def _collected(self, phase: str, _info: Mapping[str, int]) -> None:
        found = self._open
        if phase == "start":
            self._collecting = time.perf_counter()
        elif found is not None:
            found["collections"] += 1
            found["collecting"] += time.perf_counter() - self._collecting


class Watched:
    """Added to vLLM's worker."""

    def begin_watch(self, switch: float | None = None, collect: bool = True) -> None:
        """Watch from now on.

        Args:
            switch: seconds of the interpreter's switch interval meanwhile; None: the usual.
            collect: whether Python's garbage collector may run meanwhile.
        """
        global _watch, _usual
        _usual = sys.getswitchinterval(), gc.isenabled()
        if switch is not None:
            sys.setswitchinterval(switch)
        if not collect:
            gc.disable()
        _watch = _Watch()

    def end_watch(self) -> list[dict[str, Any]]:
        """What was found since `begin_watch`; everything is as it was before."""
        global _watch
        watch, _watch = _watch, None
        interval, collected = _usual
        sys.setswitchinterval(interval)
        if collected:
            gc.enable()
        return [] if watch is None else watch.stop()


async def choosing(
    target: Target, prompts: Sequence[list[int]], reuse: Reuse | None, way: str, warm: int = 2
) -> dict[str, Any]:
    """One request at a time, one token each, as in the phase `alone`. The first `warm` of them don't count.

    Returns: "ttft", and "each": of every request its seconds to the first token ("ttft"), and of each of `SPANS` the seconds that passed ("seconds"), those in which the thread ran ("used"), how often
        it waited ("waits") and was taken off its core ("taken_away"; neither where
        the system does not count that), how often and for how long Python's collector ran meanwhile, and its calls: [how many, seconds, the longest].
    """
    await target.engine.collective_rpc("begin_watch", kwargs=dict(WAYS[way]))
    rows = []
    try:
        answers = [await target.ask(ids, 1, reuse) for ids in prompts]
    finally:
        found, *_ = await target.engine.collective_rpc("end_watch")
    by_name = {name: [each for each in found if each["span"] == name] for name in SPANS}
    for number, answer in enumerate(answers):
        spans = {name: each[number] for name, each in by_name.items() if len(each) == len(answers)}
        rows.append({"ttft": answer.ttft, **spans})
    counted = rows[warm:]
    return {
        "ttft": {"median": statistics.median(row["ttft"] for row in counted), "samples": [round(row["ttft"], 5) for row in counted]},
        "each": [_short(row) for row in counted],
        "last_report": answers[-1].report,
    }  # fmt: skip


def choosing_table(groups: Mapping[str, Any]) -> list[str]:
    """Of each cell, what the faster half of its requests did and what the slower half did; nothing of cells in which this was not asked for."""
    lines: list[str] = []
    for name, found in groups.items():
        rows = [row for row in found.get("each", ()) if CHOSEN in row]
        if not rows:
            if "each" in found:
                lines += [
                    "",
                    f"{name}: nothing is told, since not each of its requests was put together once: {found['last_report']}",
                ]
            continue
        rows.sort(key=lambda row: row[CHOSEN]["seconds"])
        halves = rows[: len(rows) // 2 or 1], rows[len(rows) // 2 :]
        lines += [
            "",
            f"{name}, ms in the median of the half of its {len(rows)} requests in which choosing took less, and of the other half",
            "| | chosen: less | more | computing queued: less | more |",
            "| --- | --- | --- | --- | --- |",
        ]
        cells = [[row[of] for row in half if of in row] for of in SPANS for half in halves]
        for label in ("seconds", "used", "collecting"):
            lines.append(_line(label, [[span[label] for span in spans] for spans in cells]))
        for label in ("waits", "taken_away"):  # how often, and not for how long
            counts = [[span[label] for span in spans if label in span] for spans in cells]
            lines.append(_line(label, counts, times=1))
        for call in CALLS:
            seconds = [[span["calls"].get(call, (0, 0.0, 0.0))[1] for span in spans] for spans in cells]
            if any(map(any, seconds)):
                lines.append(_line(call, seconds))
    return lines


def _line(label: str, cells: Sequence[Sequence[float]], times: float = 1e3) -> str:
    return f"| {label} | {' | '.join(f'{times * statistics.median(each):.2f}' if each else '' for each in cells)} |"


def _short(value: Any) -> Any:
    """The same with numbers that are not longer than they are exact."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, list) else value


def _switches() -> dict[str, int]:
    """How often this thread has waited so far, and how often it was taken off its core. Nothing where the system doesn't count that."""
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return {}
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return {"waits": usage.ru_nvcsw, "taken_away": usage.ru_nivcsw}
