"""Chunks that are read from disk, beside the same prompts without reuse in the same server: measures them, and makes the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from common import spread

from cachetune_vllm.measured import TRIED
from served.load import Ids, first_tokens, in_turn
from served.plan import FROM_DISK
from served.targets import Answer, Reuse, Target
from served.values import Content, Measured, label, left_in, ms, rows, times, value

SLOWER = 3
"""Such a disk takes so many times as long for the rows of a prompt as vLLM takes for the prompt."""
SLOWED_PROMPTS = TRIED + 1
"""Of so many prompts, the first is read from a slow disk, because it isn't known yet to be slow, and one more: every so many are tried all the same."""
WANTED = 2.4
"""How many times sooner than vLLM's the first token was to come with chunks on disk, at 16,384 and 32,768 tokens."""


async def from_disk(target: Target, prompts: Sequence[Ids], reuse: Reuse, warm: int = 1) -> dict[str, Any]:
    """One request at a time, one token each, with and without reuse in turn; before each, vLLM's prefix cache is emptied, and all chunks leave the host's memory.

    The connector decides by itself whether it reads the chunks of a prompt, as in any server. The first `warm` prompts don't count.

    Returns: medians of all prompts, of those that reused their chunks ("reused") and of those that were left to vLLM ("left_to_vllm"), each with
        "without_reuse" of the same prompts; "of_each" in order, with the seconds in the worker and their parts; "disk_speed": what the store has measured by then, bytes a second.
    """
    asked = await _asked(target, prompts, reuse)
    return _told(asked, warm) | {"disk_speed": await _speed(target)}


async def from_slowed_disk(target: Target, prompts: Sequence[Ids], reuse: Reuse) -> dict[str, Any]:
    """As `from_disk`, but the disk is made so slow that its rows take `SLOWER` times as long as vLLM takes for a prompt. The connector isn't told, and has to find it
    out. Such a disk is only imitated (`served/on_disk.py`); "slowed_to" has its bytes a second.

    Args:
        target: the server.
        prompts: the last `SLOWED_PROMPTS` are measured; those before are asked at the disk's true speed until two of them were read from it. `TRIED` will do.
        reuse: how they reuse.

    Raises:
        ValueError: none of the first prompts was read from disk, so it isn't known how slow it has to be.
    """
    warm, measured = prompts[:-SLOWED_PROMPTS], prompts[-SLOWED_PROMPTS:]
    read: list[int] = []
    plain: list[float] = []
    last: Answer | None = None
    for ids in warm:
        (last,), (without,) = await _asked(target, [ids], reuse)
        plain.append(without.ttft)
        if _read(last):
            read.append(_read(last))
        if len(read) == 2:
            break
    if not read:
        raise ValueError(
            f"none of {len(warm)} prompts read chunks from disk, so nothing can be said of a slower one (of the last one: {last and last.report})."
        )
    # The first prompts of a size take longer, because vLLM sets things up.
    rate = float(f"{read[-1] / (SLOWER * min(plain)):.2g}")
    await target.engine.collective_rpc("slow_disk", args=(rate,))
    try:
        asked = await _asked(target, measured, reuse)
        speed = await _speed(target)
    finally:
        await target.engine.collective_rpc("slow_disk", args=(None,))
    return _told(asked, 0) | {"slowed_to": rate, "disk_speed": speed}


async def _asked(target: Target, prompts: Sequence[Ids], reuse: Reuse) -> list[list[Answer]]:
    """The answers with reuse, and those without."""

    async def nothing_there() -> None:
        await target.engine.collective_rpc("leave_memory")
        await target.forget()

    return await in_turn(target, prompts, [reuse, {"reuse": False}], nothing_there)


async def _speed(target: Target) -> float | None:
    """The slowest worker's, by which all of them decide; None where one of them has not measured it."""
    told = await target.engine.collective_rpc("disk_speed")
    return None if None in told else min(told)


def _read(answer: Answer) -> int:
    """Bytes that a prompt's chunks were read from disk."""
    return int(answer.report.get("bytes_read", {}).get("disk", 0))


def _in_memory(answer: Answer) -> int:
    """Bytes of its chunks that were in memory all the same."""
    return sum(answer.report.get("bytes_read", {}).values()) - _read(answer)


def _told(asked: list[list[Answer]], warm: int) -> dict[str, Any]:
    """What the file says of prompts that were asked with reuse and without."""
    pairs = list(zip(*asked, strict=True))
    counted = pairs[warm:]
    reused = [pair for pair in counted if "left" not in pair[0].report]
    left = [pair for pair in counted if "left" in pair[0].report]
    found = first_tokens([with_reuse for with_reuse, _ in counted]) | _beside(counted)
    found |= {name: _beside(some) for name, some in (("reused", reused), ("left_to_vllm", left)) if some}
    if reused:
        found["bytes_read"] = statistics.median(_read(with_reuse) for with_reuse, _ in reused)
        found["bytes_in_memory"] = max(_in_memory(with_reuse) for with_reuse, _ in reused)
    return found | {"of_each": [_of_one(*pair, counts=place >= warm) for place, pair in enumerate(pairs)]}


def _beside(pairs: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    return {
        "ttft": spread([with_reuse.ttft for with_reuse, _ in pairs]),
        "without_reuse": spread([without.ttft for _, without in pairs]),
    }


def _of_one(with_reuse: Answer, without: Answer, *, counts: bool) -> dict[str, Any]:
    report = with_reuse.report
    return {
        "ttft": round(with_reuse.ttft, 5),
        "without_reuse": round(without.ttft, 5),
        "counts": counts,
        "bytes_read": report.get("bytes_read", {}),
        **{name: report[name] for name in ("left", "why", "left_on_disk") if name in report},
        # Also of those that don't count: what the first prompt of a setting waited for.
        **({"in_worker": report["ttft"], "timings": report["timings"]} if "timings" in report else {}),
    }


def disk_table(content: Content) -> list[str]:
    """A row a cell: what came of the prompts that were read from disk, and of those that were left to vLLM."""
    measured = Measured(content["groups"])
    heads = (
        "context", "setting", "disk, GB/s", "as the store measured it", "read, GB",
        "reused", "their TTFT ms", "vLLM's, in turn ms", "x", "x of the server without the connector",
        "left to vLLM", "their TTFT ms", "vLLM's, in turn ms", "x",
    )  # fmt: skip
    machine = content.get("machine", {})
    order = list(FROM_DISK)
    lines = []
    for cell, found in sorted(
        measured.of("disk"), key=lambda pair: (pair[0].context, pair[0].detail, order.index(pair[0].setting))
    ):
        speed, reused, left = found.get("slowed_to"), found.get("reused"), found.get("left_to_vllm")
        disk = f"{_gb(speed)}, imitated" if speed else _gb(machine.get("disk_bytes_per_second"))
        read, there = _gb(found.get("bytes_read")), found.get("bytes_in_memory")
        alone = value(measured.find("vllm", "alone", cell.context), "ttft", "median")
        lines.append((
            f"{cell.context:,}", label(cell), disk, _gb(found.get("disk_speed")), f"{read}, up to {_gb(there)} more in memory" if there else read,
            _count(reused), *_compared(reused), times(alone, value(reused, "ttft", "median")), left_in(found), *_compared(left),
        ))  # fmt: skip
    how = "past the page cache" if machine.get("disk_direct") else "from the page cache, so at the speed of memory"
    return rows(
        "Chunks on disk, nothing in host memory", heads, lines,
        f"Chunks are read {how}. The disk's speed is that of large reads, measured before; an imitated one gives what it has read only after so long that the rows of a prompt take {SLOWER} times as long as vLLM takes for the prompt.",
        f"x: without reuse / with it, asked in turn in the server with the connector; {WANTED:g}x was wanted at 16,384 and 32,768 tokens of what is reused. The connector decides what is left to vLLM.",
    )  # fmt: skip


def _gb(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}" if count >= 1e7 else f"{count / 1e9:.2g}"


def _count(found: Content | None) -> str:
    return "" if found is None else str(len(found["ttft"]["samples"]))


def _compared(found: Content | None) -> tuple[str, str, str]:
    """Medians with reuse and without, and their ratio."""
    with_reuse, without = value(found, "ttft", "median"), value(found, "without_reuse", "median")
    return ms(with_reuse), ms(without), times(without, with_reuse)
