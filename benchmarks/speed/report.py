"""Makes Markdown tables of a run's JSON, so that no number is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGETS = {
    (4096, 0.15): 4.5, (4096, 0.05): 8, (8192, 0.15): 5.5, (8192, 0.05): 10,
    (16384, 0.15): 5.8, (16384, 0.05): 13, (32768, 0.15): 5.8, (32768, 0.05): 15,
}  # fmt: skip
"""Speed-ups that were aimed at, with KV on the device or in host memory (Llama-3.1-8B's shape, one H100)."""
MARKS = ("<!-- speed: made by benchmarks/speed_report.py -->", "<!-- end of speed -->")
LEAST = 5
"""A median of fewer rounds than this is marked."""

Content = dict[str, Any]
Row = dict[str, Any]


def put_between(path: Path, text: str) -> None:
    """Replace what is between MARKS in a file.

    Raises:
        ValueError: the file has no such place.
    """
    before = path.read_text()
    start, end = (before.find(mark) for mark in MARKS)
    if start < 0 or end < start:
        raise ValueError(f"{path} has no lines {MARKS[0]!r} and {MARKS[1]!r} to write between.")
    path.write_text(before[: start + len(MARKS[0])] + "\n" + text.strip() + "\n" + before[end:])


def brief(content: Content) -> str:
    """A table with one line for each context and selector, for docs/speed.md."""
    rows = {_place(row): row for row in rows_of(content) if row["phase"] in ("target", "device")}
    ratios = sorted({place[4] for place in rows})
    tiers = [t for t in ("host", "device") if any(place[1] == t for place in rows)]
    head = ["context", "full prefill", "selector", *(f"r {ratio:g}, {tier}" for ratio in ratios for tier in tiers)]
    lines = []
    for context, selector in sorted({(place[0], place[3]) for place in rows}, key=_context_first):
        cells = [rows.get((context, tier, "exact", selector, ratio)) for ratio in ratios for tier in tiers]
        full = next(row["full"] for row in cells if row)
        lines.append([f"{context:,}", _ms(full), f"`{selector}`", *map(_cell, cells)])
    title = "On a GPU ([how it is measured, and everything else](performance.md))"
    return f"{title}: time to first token in ms and speed-up.\n{setting(content)}.\n\n{_table(head, lines)}"


def details(content: Content, times: bool = True) -> str:
    """What was measured, for docs/performance-results.md; with `times`, also where the time of each row goes."""
    parts = [f"### {setting(content)}", _machine(content)]
    rows = rows_of(content)
    for title, phases in (
        ("From host memory and from the device", ("target", "device")),
        ("Codecs", ("int8", "codecs")),
        ("From disk, at the tuned ratio", ("disk",)),
        ("From disk, at given ratios", ("reads",)),
        ("Other selectors", ("selectors",)),
    ):
        found = [row for row in rows if row["phase"] in phases and "floor" in row]
        if found:
            parts += [f"**{title}**", _reuse_table(found)]
    peers = [row for row in rows if row["phase"] in ("peers", "kvboost")]
    parts += ["**Peers**", _peers_table(peers)] if peers else []
    checks = [_full_table(content), _split_table(rows) if times else "", _timelines(content), _failed(content)]
    return "\n\n".join([*parts, *(text for text in checks if text)])


def rows_of(content: Content) -> list[Row]:
    """All rows, in the order they were measured."""
    return [row for group in content["groups"].values() for row in group.get("rows", [])]


def setting(content: Content) -> str:
    """One line that says what was measured, and on which machine."""
    env, settings = content["environment"], content["settings"]
    card = f"{env['gpu']} (driver {env['driver']})" if env.get("gpu") else env["processor"]
    return (
        f"{settings['shape']}, {card}, torch {env['torch']}, transformers {env['transformers']}, commit {env['commit']}, "
        f"{env['date']}"
    )


def _machine(content: Content) -> str:
    machine, settings = content["machine"], content["settings"]
    parts = [f"medians of {settings['rounds']} rounds, {settings['chunk_tokens']}-token chunks"]
    if machine.get("copy_bytes_per_second"):
        parts.append(f"host to device {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    if machine.get("disk_bytes_per_second"):
        how = "past the page cache" if machine.get("disk_direct") else "from the page cache"
        parts.append(f"disk {machine['disk_bytes_per_second'] / 1e9:.2f} GB/s ({how})")
    if machine.get("attention"):
        parts.append(f"attention of full prefill: {machine['attention']}")
    return "; ".join(parts) + "."


def _reuse_table(rows: Sequence[Row]) -> str:
    memory = any(row.get("memory_over") is not None for row in rows)
    head = [
        "context",
        "tier",
        "codec",
        "selector",
        "r",
        "computed",
        "full ms",
        "TTFT ms",
        "spread",
        "speed-up",
        "target",
    ]
    head += ["floor ms", "bound by", "share"] + (["memory"] if memory else [])
    lines = []
    for row in rows:
        target = TARGETS.get((row["context"], row["ratio"])) if row["tier"] != "disk" else None
        skipped = f" ({row['skipped']:.2f} unread)" if row["skipped"] else ""
        line = [
            f"{row['context']:,}", row["tier"], row["codec"], f"`{row['selector']}`", f"{row['ratio']:.3g}{skipped}",
            str(row["computed"]), _ms(row["full"]), _ms(row["ttft"]["median"]) + _few(row), _range(row),
            f"{row['speedup']:.1f}x", f"{target:g}x" if target else "", _ms(row["floor"]), row["bound"],
            f"{row['share_of_floor']:.0%}",
        ]  # fmt: skip
        over = row.get("memory_over")
        lines.append(line + ([f"{over:+.1%}" if over is not None else ""] if memory else []))
    return _table(head, lines)


def _peers_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        name = "reuse without recompute" if row.get("selector") == "none" else row["name"]
        reused = row.get("reused", row["prompt_tokens"] - row.get("computed", row["prompt_tokens"]))
        own = f"{_ms(row['own'])}" if "own" in row else ""
        lines.append(
            [f"{row['context']:,}", name, str(reused), _ms(row["full"]), _ms(row["ttft"]["median"]) + _few(row),
             f"{row['speedup']:.1f}x", own]
        )  # fmt: skip
    return _table(["context", "way", "reused tokens", "full ms", "TTFT ms", "speed-up", "its own figure ms"], lines)


def _full_table(content: Content) -> str:
    lines = []
    for group in content["groups"].values():
        if "engine_full" in group:
            own, bare = group["engine_full"]["median"], group["full"]["median"]
            lines.append([f"{group['context']:,}", _ms(bare), _ms(own), f"{own / bare - 1:+.1%}"])
    return (
        "**Full prefill**\n\n" + _table(["context", "transformers ms", "this engine ms", "apart"], lines)
        if lines
        else ""
    )


def _split_table(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row["phase"] in ("target", "device", "disk", "reads") and row.get("timings")]
    if not shown:
        return ""
    phases = list(dict.fromkeys(name for row in shown for name in row["timings"]))
    lines = [
        [f"{row['context']:,}", row["tier"], row["codec"], f"`{row['selector']}`", f"{row['ratio']:.3g}",
         *(_ms(row["timings"][p]) if p in row["timings"] else "" for p in phases)]
        for row in shown
    ]  # fmt: skip
    return "**Where the time goes**, ms\n\n" + _table(["context", "tier", "codec", "selector", "r", *phases], lines)


def _timelines(content: Content) -> str:
    lines = []
    for group in content["groups"].values():
        for found in group.get("timelines", ()):
            count, longest = found["gaps"]
            lines.append(
                [f"{group['context']:,}", f"`{found['selector']}`", f"{found['ratio']:g}", _ms(found["span"]),
                 _ms(found["copy"]), f"{found['copy_under_compute']:.0%}", _ms(found["compute"]), _ms(found["idle"]),
                 f"{count}, longest {longest * 1e3:.2f} ms"]
            )  # fmt: skip
    head = [
        "context",
        "selector",
        "r",
        "on the device ms",
        "copies ms",
        "under compute",
        "compute ms",
        "idle ms",
        "gaps",
    ]
    return "**Timeline**, under the profiler, host tier\n\n" + _table(head, lines) if lines else ""


def _failed(content: Content) -> str:
    lines = [f"- {name}: {group['error']}" for name, group in content["groups"].items() if "error" in group]
    lines += [
        f"- {name}: {group['captures_while_timed']} CUDA graphs were captured in rounds that count"
        for name, group in content["groups"].items()
        if group.get("captures_while_timed")
    ]
    return "\n".join(["**What went wrong**\n", *lines]) if lines else ""


def _place(row: Row) -> tuple[int, str, str, str, float]:
    return row["context"], row["tier"], row["codec"], row["selector"], row["ratio"]


def _context_first(place: tuple[int, str]) -> tuple[int, bool, str]:
    return place[0], place[1] != "expected_error", place[1]


def _cell(row: Row | None) -> str:
    return f"{_ms(row['ttft']['median'])} ms, **{row['speedup']:.1f}x**" if row else ""


def _few(row: Row) -> str:
    count = len(row["ttft"]["samples"])
    return "" if count >= LEAST else f" (of {count})"


def _range(row: Row) -> str:
    samples = row["ttft"]["samples"]
    return f"{min(samples) * 1e3:.1f} to {max(samples) * 1e3:.1f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])
