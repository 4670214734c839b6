"""What a file of `serving.py` holds of one cell, as tables show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from served.load import percentiles
from served.plan import FROM_DISK, SETTINGS, Cell, setting_of

Content = Mapping[str, Any]
VLLM = "vLLM, all read"


@dataclass(frozen=True)
class Measured:
    """The cells of a file.

    Attributes:
        groups: what was measured, by the cells' names.
    """

    groups: Mapping[str, Content]

    def find(self, variant: str, phase: str, context: int, setting: str = "", detail: str = "") -> Content | None:
        """What was measured of one cell; None if it was not."""
        return self.groups.get(Cell(variant, phase, context, setting, detail).name)  # type: ignore[arg-type]

    def of(self, *phases: str) -> list[tuple[Cell, Content]]:
        """The cells of some phases: by context, in each plain vLLM first."""
        found = [
            (cell, each) for cell, each in ((Cell.of(n), g) for n, g in self.groups.items()) if cell.phase in phases
        ]
        return sorted(found, key=lambda pair: _place(pair[0]))

    def beside(self, cell: Cell) -> Content | None:
        """What plain vLLM did of a cell's prompts: the cell of the same phase, context and detail. Where vLLM has none because it reads stored chunks as it reads
        others, or because nothing of it is like a prefill for nothing, it is the saturated server."""
        if cell.phase == "ceiling" or cell.detail.startswith("stored"):
            return self.find("vllm", "saturated", cell.context)
        return self.find("vllm", cell.phase, cell.context, "", cell.detail)

    def memory(self, cell: Cell) -> tuple[str, str]:
        """GiB in use on the device, and how much more that is than in plain vLLM's cell of the same phase and context."""
        taken = value(self.groups[cell.name], "device_memory")
        base = self.beside(cell) or next(
            (g for c, g in self.of(cell.phase) if c.variant == "vllm" and c.context == cell.context), None
        )
        alone = value(base, "device_memory")
        more = f"{taken / alone - 1:+.1%}" if taken and alone and cell.variant != "vllm" else ""
        return f"{taken / 2**30:.1f}" if taken else "", more


def _place(cell: Cell) -> tuple[int, int, int]:
    order = ("", "auto", *(SETTINGS | FROM_DISK))
    return (
        cell.context,
        ("vllm", "reuse", "ceiling").index(cell.variant),
        order.index(cell.setting) if cell.setting in order else len(order),
    )


def label(cell: Cell) -> str:
    """A cell's server and setting in words."""
    if cell.variant == "vllm":
        return VLLM
    if cell.variant == "ceiling":
        return "prefill for nothing"
    setting = setting_of(cell.setting)
    if setting is not None and setting.codec != "exact":
        return f"{cell.setting.removesuffix(f' {setting.codec}')}, `{setting.codec}`"
    return {"auto": "as by default", "": "with the connector"}.get(cell.setting, cell.setting)


def first_token(found: Content | None) -> dict[str, float]:
    """Seconds to the first token: median, p95 and p99, as far as they are known. Of few samples, p95 and p99 are the slowest one."""
    times = {} if found is None else found.get("ttft", {})
    known = {"median": times.get("median", times.get("p50")), "p95": times.get("p95"), "p99": times.get("p99")}
    if times.get("samples"):
        known = {**percentiles(times["samples"]), "median": times["median"]}
    return {name: known[name] for name in ("median", "p95", "p99") if known[name] is not None}


def left_in(found: Content | None) -> str:
    """How many requests were left to vLLM, and why; nothing where none was."""
    return "" if found is None else ", ".join(f"{count} ({why})" for why, count in found.get("left", {}).items())


def ms(seconds: float | None) -> str:
    """Milliseconds; nothing where they are not known."""
    return "" if seconds is None else f"{1000 * seconds:,.1f}"


def times(above: float | None, below: float | None) -> str:
    """A ratio; nothing where a part of it is not known."""
    return f"{above / below:.2f}x" if above and below else ""


def number(given: float | None) -> str:
    """Two digits behind the point; nothing where it is not known."""
    return "" if given is None else f"{given:.2f}"


def value(found: Content | None, *path: str) -> float | None:
    """A number inside of what was measured; None where it is missing."""
    each: Any = found
    for part in path:
        each = None if each is None else each.get(part)
    return None if each is None else float(each)


def rows(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], *behind: str) -> list[str]:
    """A table with a title; nothing without rows. Columns in which no row has anything are left out."""
    if not lines:
        return []
    kept = [place for place in range(len(heads)) if any(line[place] for line in lines)]
    body = ["| " + " | ".join(line[place] for place in kept) + " |" for line in (heads, *lines)]
    return [
        "",
        f"**{title}**",
        "",
        body[0],
        "| " + " | ".join("---" for _ in kept) + " |",
        *body[1:],
        *(["", *behind] if behind else []),
    ]
