"""What is aimed at beside vLLM (docs/performance-vllm.md), and tables of what was reached."""

from __future__ import annotations

from served.plan import SETTINGS, Cell
from served.values import Measured, label, ms, rows, value

_SETTINGS = ("frequency 0.05", "default 0.05", "default 0.15")
_WANTED = {
    ("alone", 4096): (5.5, 4, 3),
    ("alone", 16384): (10, 7.5, 4.2),
    ("alone", 32768): (12, 9, 4.8),
    ("saturated", 4096): (3.5, 3, 2.4),
    ("saturated", 16384): (6.5, 5, 3.5),
    ("saturated", 32768): (8, 6, 4),
}
TIMES = {place: dict(zip(_SETTINGS, wanted, strict=True)) for place, wanted in _WANTED.items()}
"""How many times sooner the first token is to come alone, and how many times as many requests are to be answered by a saturated server, by phase, context and
setting. They were set for Llama-3.1-8B's shape on an H100."""


def reached(measured: Measured) -> list[str]:
    """What was wanted and what was reached, times plain vLLM; what is met is bold."""
    names = {"alone": "first token alone", "saturated": "requests/s, saturated"}
    lines = []
    for (phase, context), wanted in TIMES.items():
        said = [_said(measured, phase, context, setting, aim) for setting, aim in wanted.items()]
        if any(said):
            lines.append((f"{names[phase]}, {context:,}", *said))
    return rows("Wanted: reached", ("wanted: reached", *_SETTINGS), lines)


def _said(measured: Measured, phase: str, context: int, setting: str, aim: float) -> str:
    base, found = measured.find("vllm", phase, context), measured.find("reuse", phase, context, setting)
    above, below = (base, found) if phase == "alone" else (found, base)
    path = ("ttft", "median") if phase == "alone" else ("requests_per_second",)
    over, under = value(above, *path), value(below, *path)
    if not over or not under:
        return ""
    got = f"{over / under:.2f}x"
    return f"{aim:g}x: " + (f"**{got}**" if over / under >= aim else got)


def of_a_request(measured: Measured) -> list[str]:
    """What a request takes of a saturated server (1 / requests/s), with what was wanted."""
    shown = [
        Cell("vllm", "saturated", 0),
        Cell("ceiling", "ceiling", 0),
        *(Cell("reuse", "saturated", 0, name) for name in SETTINGS),
    ]
    lines = []
    for context in sorted({cell.context for cell, _ in measured.of("saturated")}):
        base = value(measured.find("vllm", "saturated", context), "requests_per_second")
        line = [f"{context:,}"]
        for cell in shown:
            rate = value(measured.find(cell.variant, cell.phase, context, cell.setting), "requests_per_second")
            aim = TIMES.get(("saturated", context), {}).get(cell.setting)
            wanted = f" (wanted: {ms(1 / (aim * base))})" if aim and base else ""
            line.append(f"{ms(1 / rate)}{wanted}" if rate else "")
        lines.append(line)
    return rows("What a request takes of a saturated server, ms", ("context", *(label(cell) for cell in shown)), lines)
