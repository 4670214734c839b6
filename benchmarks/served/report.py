"""Tables of what `serving.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from served.host_time import host_table
from served.load import BOUND
from served.timeline import timeline_table

Content = Mapping[str, Any]
_ALL, _STEADY = "requests_per_second", "steady_per_second"


def table(content: Content) -> str:
    """One line a context and setting: time to first token alone, requests per second, and what that is beside vLLM's."""
    groups: Mapping[str, Any] = content["groups"]
    lines = [
        "| context | setting | TTFT ms | x | requests/s | x | of the ceiling | steady requests/s | x | between tokens p99 ms | gap p99 ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    places = {(int(context), setting) for _, context, setting in map(_place, groups) if context}
    for context, setting in sorted(places):
        variant = "reuse" if setting else "vllm"
        alone, rate, gaps = (
            group(groups, variant, phase, context, setting) for phase in ("alone", "saturated", "gaps")
        )
        if not (alone or rate or gaps):
            continue
        base, base_rate = (group(groups, "vllm", phase, context) for phase in ("alone", "saturated"))
        ceiling = group(groups, "ceiling", "ceiling", context)
        rates = (
            _rate(rate), _ratio(rate, base_rate), _part(rate, ceiling), _rate(rate, _STEADY), _ratio(rate, base_rate, _STEADY)
        )  # fmt: skip
        cells = (
            f"{context:,}", setting or "vLLM, all read", _ms(alone, "ttft", "median"), _sooner(base, alone), *rates,
            _ms(rate, "between_tokens", "p99"), _ms(gaps, "gaps", "p99"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    others = [
        f"| {name} | {_ms(g, 'ttft', 'median') or _ms(g, 'ttft', 'p50')} | {_ms(g, 'ttft', 'p99')} "
        f"| {g.get('requests_per_second', g.get('rate', 0)):.2f} | {_ms(g, 'between_tokens', 'p99')} |"
        for name, g in _with_both_ways(groups).items()
        if _place(name)[0] not in ("alone", "saturated", "gaps", "within", "host", "timeline")
    ]
    lines += _within(groups)
    lines += _memory(groups)
    lines += host_table(groups)
    lines += timeline_table(groups)
    if others:
        lines += ["", "| cell | TTFT median ms | p99 ms | requests/s | between tokens p99 ms |"]
        lines += ["| --- | --- | --- | --- | --- |", *others]
    return "\n".join(lines)


def group(groups: Mapping[str, Any], variant: str, phase: str, context: int, setting: str = "") -> Any:
    """The result of one cell; None if it was not measured."""
    return groups.get(f"{variant}/{phase}/{context}" + (f"/{setting}" if setting else ""))


def _with_both_ways(groups: Mapping[str, Any]) -> dict[str, Any]:
    """The groups, and behind each that was measured without reuse as well, in the same server, what that gave."""
    found = {}
    for name, each in groups.items():
        found[name] = each
        if "without_reuse" in each:
            found[f"{name}, without reuse"] = {"ttft": each["without_reuse"]}
    return found


def contexts_of(groups: Mapping[str, Any], phase: str) -> list[int]:
    """The contexts for which a phase was measured with reuse."""
    named = (name for name in groups if name.startswith("reuse/"))
    return sorted({int(context) for found, context, _ in map(_place, named) if found == phase})


def _within(groups: Mapping[str, Any]) -> list[str]:
    """How many requests per second each server takes while 95% of the first tokens come within `BOUND`."""
    rows = []
    for name, found in groups.items():
        phase, context, setting = _place(name)
        if phase != "within":
            continue
        base = groups.get(f"vllm/within/{context}", {})
        times = f"{found['rate'] / base['rate']:.2f}x" if "rate" in found and "rate" in base else ""
        lowest = min(found["tries"], key=lambda tried: tried["rate"])
        most = f"{found['rate']:.2f}" if "rate" in found else f"below {lowest['rate']:.2f}"
        tries = ", ".join(f"{1000 * tried['p95']:.0f} at {tried['rate']:.2f}" for tried in found["tries"])
        rows.append(f"| {int(context):,} | {setting or 'vLLM, all read'} | {most} | {times} | {tries} |")
    if not rows:
        return []
    head = f"| context | setting | requests/s with p95 within {BOUND:g} s | x | p95 ms at the rates that were tried |"
    return ["", head, "| --- | --- | --- | --- | --- |", *rows]


def _memory(groups: Mapping[str, Any]) -> list[str]:
    """The most memory that was in use on the device, by server."""
    most: dict[str, int] = {}
    for name, found in groups.items():
        if found.get("device_memory"):
            server = name.split("/", 1)[0]
            most[server] = max(most.get(server, 0), found["device_memory"])
    if not most:
        return []
    said = ", ".join(f"{server} {taken / 2**30:.1f} GiB" for server, taken in most.items())
    return ["", f"Most memory in use on the device: {said}."]


def _place(name: str) -> tuple[str, str, str]:
    parts = [*name.split("/"), "", ""]
    return parts[1], parts[2], parts[3]


def _value(group: Content | None, *path: str) -> float | None:
    found: Any = group
    for part in path:
        found = None if found is None else found.get(part)
    return found


def _ms(group: Content | None, *path: str) -> str:
    value = _value(group, *path)
    return "" if value is None else f"{1000 * value:.1f}"


def _sooner(base: Content | None, group: Content | None) -> str:
    above, below = _value(base, "ttft", "median"), _value(group, "ttft", "median")
    return f"{above / below:.2f}x" if above and below else ""


def _rate(group: Content | None, name: str = _ALL) -> str:
    value = _value(group, name)
    return "" if value is None else f"{value:.2f}"


def _ratio(group: Content | None, base: Content | None, name: str = _ALL) -> str:
    above, below = _value(group, name), _value(base, name)
    return f"{above / below:.2f}x" if above and below else ""


def _part(group: Content | None, ceiling: Content | None) -> str:
    above, below = _value(group, _ALL), _value(ceiling, _ALL)
    return f"{above / below:.0%}" if above and below else ""
