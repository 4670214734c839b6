"""Where the time to first token of one request alone goes, step by step: measures it, and makes the table."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from served.host_steps import BETWEEN, CORE, FROM_ENGINE, FRONT, TO_ENGINE, Notes, Span, waited_for
from served.targets import Reuse, Target

SCHEDULED = "step scheduled"
IDLE = 0.05
"""Seconds between two requests, after which the engine is idle again."""


async def host(target: Target, prompts: Sequence[list[int]], reuse: Reuse | None, warm: int = 3) -> dict[str, Any]:
    """One request at a time, one token each: medians of the seconds of each step. The first `warm` requests don't count."""
    front = note_front()
    absent = {name for names in await target.engine.collective_rpc("note_host_steps") for name in names}
    rows: list[dict[str, float]] = []
    steps, times = [], []
    report: dict[str, Any] = {}
    for ids in prompts:
        await asyncio.sleep(IDLE)
        await target.engine.collective_rpc("take_host_steps")
        front.take()
        start = time.perf_counter()
        answer = await target.ask(ids, 1, reuse)
        end, report = start + answer.ttft, answer.report
        (told,) = await target.engine.collective_rpc("take_host_steps")
        rows.append(waited_for([*front.take(), *(Span(*span) for span in told)], start, end))
        times.append(answer.ttft)
        steps.append(sum(name == SCHEDULED and begin < end for name, begin, _ in told))
    names = dict.fromkeys(name for row in rows[warm:] for name in row)
    return {
        "ttft": {"median": statistics.median(times[warm:])},
        "engine_steps": statistics.median(steps[warm:]),
        "host_steps": {name: statistics.median(row.get(name, 0.0) for row in rows[warm:]) for name in names},
        "absent": sorted(absent | set(front.absent)),
        "last_report": report,
    }


@cache
def note_front() -> Notes:
    """Note what is done in this process, which is the front end's. To be called before vLLM's engine is made, which keeps some functions as they are then."""
    return Notes(FRONT)


def host_table(groups: Mapping[str, Any]) -> list[str]:
    """A row a step, a column a prompt, in ms; nothing where this was not measured."""
    columns = {name: found for name, found in groups.items() if "host_steps" in found}
    if not columns:
        return []
    whose = {step.name: "ours" if step.ours else "vLLM's" for step in (*FRONT, *CORE)}
    order = [FRONT[0].name, TO_ENGINE, *(step.name for step in CORE), BETWEEN, FROM_ENGINE, FRONT[1].name]
    heads = [name.replace("/host/", " ").replace("/", " ") for name in columns]
    lines = [
        "",
        f"| step, ms of one request alone | whose | {' | '.join(heads)} |",
        "| --- " * (len(columns) + 2) + "|",
    ]

    def row(name: str, owner: str, seconds: Sequence[float]) -> None:
        if any(seconds):
            lines.append(f"| {name} | {owner} | {' | '.join(f'{1000 * each:.2f}' for each in seconds)} |")

    for name in order:
        row(name, whose.get(name, "vLLM's"), [found["host_steps"].get(name, 0.0) for found in columns.values()])
    for owner in ("ours", "vLLM's"):
        all_of_them = [
            sum(seconds for name, seconds in found["host_steps"].items() if whose.get(name, "vLLM's") == owner)
            for found in columns.values()
        ]
        row("all of these", owner, all_of_them)
    row("time to first token", "", [found["ttft"]["median"] for found in columns.values()])
    steps = " | ".join(f"{found['engine_steps']:.0f}" for found in columns.values())
    lines.append(f"| vLLM's steps | | {steps} |")
    absent = sorted({name for found in columns.values() for name in found["absent"]})
    return [*lines, *([f"This vLLM has no function of these names: {', '.join(absent)}."] if absent else [])]
