"""Tables of what `serving.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Content = Mapping[str, Any]


def table(content: Content) -> str:
    """One line a context and setting: time to first token alone, requests per second, and what that is beside vLLM's."""
    groups: Mapping[str, Any] = content["groups"]
    lines = [
        "| context | setting | TTFT ms | x | requests/s | x | between tokens p99 ms | gap p99 ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    places = {(int(context), setting) for _, context, setting in map(_place, groups) if context}
    for context, setting in sorted(places):
        variant = "reuse" if setting else "vllm"
        alone, rate, gaps = (
            groups.get(f"{variant}/{phase}/{context}" + (f"/{setting}" if setting else ""))
            for phase in ("alone", "saturated", "gaps")
        )
        if not (alone or rate or gaps):
            continue
        base, base_rate = (groups.get(f"vllm/{phase}/{context}") for phase in ("alone", "saturated"))
        rates = (f"{rate['requests_per_second']:.2f}", _ratio(rate, base_rate)) if rate else ("", "")
        cells = (
            f"{context:,}", setting or "vLLM, all read", _ms(alone, "ttft", "median"), _sooner(base, alone), *rates,
            _ms(rate, "between_tokens", "p99"), _ms(gaps, "gaps", "p99"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    others = [
        f"| {name} | {_ms(g, 'ttft', 'median') or _ms(g, 'ttft', 'p50')} | {_ms(g, 'ttft', 'p99')} "
        f"| {g.get('requests_per_second', g.get('rate', 0)):.2f} | {_ms(g, 'between_tokens', 'p99')} |"
        for name, g in groups.items()
        if _place(name)[0] not in ("alone", "saturated", "gaps")
    ]
    if others:
        lines += ["", "| cell | TTFT median ms | p99 ms | requests/s | between tokens p99 ms |"]
        lines += ["| --- | --- | --- | --- | --- |", *others]
    return "\n".join(lines)


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


def _ratio(group: Content, base: Content | None) -> str:
    return "" if base is None else f"{group['requests_per_second'] / base['requests_per_second']:.2f}x"
