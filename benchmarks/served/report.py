"""Tables of what `serving.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from served import tables
from served.choosing import choosing_table
from served.disk import disk_table
from served.host_time import host_table
from served.timeline import timeline_table
from served.values import Content, Measured, label, left_in, ms, number, rows, times, value
from served.wanted import of_a_request, reached

_ALL, _STEADY = "requests_per_second", "steady_per_second"


def table(content: Content) -> str:
    """All tables of a file, in Markdown."""
    measured = Measured(content["groups"])
    every = (
        _ran(content), _overview(measured), reached(measured), tables.alone(measured), tables.where_it_went(measured), tables.paused(measured),
        of_a_request(measured), tables.loaded(measured), tables.arrivals(measured), tables.within(measured), tables.short(measured),
        disk_table(content), _memory(measured), _notes(content), choosing_table(measured.groups), host_table(measured.groups),
        timeline_table(measured.groups),
    )  # fmt: skip
    return "\n".join(line for lines in every for line in lines)


def group(groups: Mapping[str, Any], variant: str, phase: str, context: int, setting: str = "") -> Any:
    """The result of one cell; None if it was not measured."""
    return Measured(groups).find(variant, phase, context, setting)


def contexts_of(groups: Mapping[str, Any], phase: str) -> list[int]:
    """The contexts for which a phase was measured with reuse."""
    return sorted({cell.context for cell, _ in Measured(groups).of(phase) if cell.variant == "reuse"})


def _ran(content: Content) -> list[str]:
    """What was measured on which machine."""
    env, settings = content["environment"], content.get("settings", {})
    machine = env.get("gpu") or env.get("processor") or "unknown machine"
    named = ", ".join(
        f"{name} {env[key]}"
        for name, key in (
            ("driver", "driver"),
            ("vLLM", "vllm"),
            ("torch", "torch"),
            ("transformers", "transformers"),
            ("commit", "commit"),
        )
        if env.get(key)
    )
    amounts = (
        f" {settings['shape']}; {settings['rounds']} requests alone, {settings['requests']} requests with {settings['at_once']} clients."
        if "shape" in settings
        else ""
    )
    return [f"{machine}, {named}{', ' + env['date'] if env.get('date') else ''}.{amounts}"]


def _overview(measured: Measured) -> list[str]:
    """One line a context and setting: time to first token alone, requests per second, and what that is beside vLLM's."""
    heads = (
        "context", "setting", "TTFT ms", "x", "requests/s", "x", "of the ceiling", "steady requests/s", "x",
        "between tokens, saturated, p99 ms", "between tokens of four, p99 ms", "left to vLLM",
    )  # fmt: skip
    places = {(c.variant, c.context, c.setting): c for c, _ in measured.of("alone", "saturated", "gaps")}
    lines = []
    for (variant, context, setting), cell in places.items():
        one, rate, gaps = (measured.find(variant, phase, context, setting) for phase in ("alone", "saturated", "gaps"))
        base, base_rate = (measured.find("vllm", phase, context) for phase in ("alone", "saturated"))
        ceiling, every = value(measured.find("ceiling", "ceiling", context), _ALL), value(rate, _ALL)
        lines.append((
            f"{context:,}", label(cell), ms(value(one, "ttft", "median")), times(value(base, "ttft", "median"), value(one, "ttft", "median")),
            number(every), times(every, value(base_rate, _ALL)), f"{every / ceiling:.0%}" if every and ceiling else "",
            number(value(rate, _STEADY)), times(value(rate, _STEADY), value(base_rate, _STEADY)), ms(value(rate, "between_tokens", "p99")),
            ms(value(gaps, "gaps", "p99")), _left(one, rate, None if gaps is None else gaps["arriving"]),
        ))  # fmt: skip
    return rows("Beside vLLM", heads, lines)


def _left(*of: Content | None) -> str:
    said = zip(("alone", "saturated", "beside four"), map(left_in, of), strict=True)
    return "; ".join(f"{name}: {left}" for name, left in said if left)


def _memory(measured: Measured) -> list[str]:
    """The most memory that was in use on the device, by server."""
    most: dict[str, int] = {}
    for name, found in measured.groups.items():
        if found.get("device_memory"):
            server = name.split("/", 1)[0]
            most[server] = max(most.get(server, 0), found["device_memory"])
    if not most:
        return []
    said = ", ".join(f"{server} {taken / 2**30:.1f} GiB" for server, taken in most.items())
    return [
        "",
        f"Most memory in use on the device: {said}. PyTorch keeps what an earlier cell of a server took, so order matters.",
    ]


def _notes(content: Content) -> list[str]:
    """What has to be known to read the tables."""
    settings = content.get("settings", {})
    rounds, requests = settings.get("rounds", 0), settings.get("requests", 0)
    few = f"Of {rounds} requests alone, p95 and p99 are the slowest one. " if 0 < rounds <= 20 else ""
    few += f"Of {requests} requests at once, p99 is the slowest one. " if 0 < requests <= 100 else ""
    return [
        "",
        f"{few}x: times vLLM's in the same phase and context, at the same pause or rate; memory over vLLM's likewise.",
    ]
