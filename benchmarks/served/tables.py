"""Tables of the phases of `serving.py`, a function each."""

from __future__ import annotations

import itertools

from served.load import BOUND
from served.plan import PAUSES, Cell
from served.values import Content, Measured, first_token, label, left_in, ms, number, rows, times, value
from served.wanted import TIMES

_LAST = ("left to vLLM", "memory GiB", "over vLLM's")
"""The last columns of a table: how many requests were left to vLLM, and why; memory on the device."""
_PARTS = {
    "lookup": "lookup",
    "select": "tokens chosen",
    "load": "waited for rows",
    "compute": "computed",
    "launch": "launched",
}
_FIRST = ("TTFT median ms", "p95 ms", "p99 ms")
_UNDER_LOAD = (*_FIRST, "x of the p99", "between tokens p95 ms", "p99 ms", *_LAST)


def alone(measured: Measured) -> list[str]:
    """The first token of one request at a time."""
    lines = []
    for cell, found in measured.of("alone", "plain"):
        plain, base = cell.phase == "plain", measured.beside(cell)
        if plain and "alone" not in found:  # an older file
            continue
        if plain:
            found, base = {"ttft": found["alone"]}, None if base is None else {"ttft": base["alone"]}
        what = "none stored, for both" if plain else "all stored"
        lines.append(
            (
                f"{cell.context:,}",
                what,
                label(cell),
                *_first(found),
                _sooner(base, found),
                left_in(found),
                *measured.memory(cell),
            )
        )
    return rows("One request alone", ("context", "prompts", "setting", *_FIRST, "x", *_LAST), lines)


def where_it_went(measured: Measured) -> list[str]:
    """Where the time of one request alone went. "Least for that": vLLM's full prefill, times the share of the prompt's tokens that are computed."""
    heads = (
        "context",
        "setting",
        "first token, wanted ms",
        "first token ms",
        *_PARTS.values(),
        "least for that",
        "the engine, all",
        "around the engine",
        "of which requests",
    )
    lines = []
    for cell, found in measured.of("alone"):
        parts, took, of = found.get("timings"), value(found, "ttft", "median"), "all: medians"
        if parts is None:  # an older file
            parts = _of_the_last(found)
            if parts is None:
                continue
            took, of = found["ttft"]["samples"][-1], "the last"
        base = value(measured.beside(cell), "ttft", "median")
        report = found["last_report"]
        computed = 1 - report["reused"] / report["prompt_tokens"] if "prompt_tokens" in report else None
        wanted = TIMES.get(("alone", cell.context), {}).get(cell.setting)
        lines.append((
            f"{cell.context:,}", label(cell), ms(base / wanted if base and wanted else None), ms(took), *(ms(parts.get(name)) for name in _PARTS),
            ms(base * computed if base and computed else None), ms(parts["engine"]), ms(parts["around"]), of,
        ))  # fmt: skip
    return rows("Where the time of one request alone went, ms", heads, lines)


def paused(measured: Measured) -> list[str]:
    """The first token of a server that rested."""
    heads = (
        "context", "setting", "pause", *_FIRST, "later than without, ms", "x", *_PARTS.values(), "the engine, all", "around the engine", *_LAST,
    )  # fmt: skip
    lines = []
    cells = measured.of("paused")
    pauses = ["", *sorted(PAUSES, key=lambda name: PAUSES[name])]
    of_pauses = {(cell.variant, cell.context, cell.setting): cell for cell, _ in cells}
    for variant, context, setting in of_pauses:
        for pause in pauses:
            cell = Cell(variant, "paused" if pause else "alone", context, setting, pause)
            found = measured.groups.get(cell.name)
            if found is None:
                continue
            rested = measured.find(variant, "paused", context, setting, "no pause")
            base = rested or measured.find(variant, "alone", context, setting)
            here, there = (value(each, "ttft", "median") for each in (found, base))
            later = here - there if here is not None and there is not None and PAUSES.get(pause) else None
            parts = found.get("timings", {})
            lines.append((
                f"{context:,}", label(cell), pause or "`alone`", *_first(found), "" if later is None else f"{1000 * later:+.1f}",
                _sooner(measured.beside(cell), found), *(ms(parts.get(name)) for name in (*_PARTS, "engine", "around")), *_last(measured, cell),
            ))  # fmt: skip
    return rows("After a pause: medians, ms", heads, lines)


def short(measured: Measured) -> list[str]:
    """Prompts for which reuse is expected not to pay, with and without it."""
    heads = (
        "tokens of chunks", "vLLM median ms", "p95 ms", "p99 ms", "with the connector, median ms", "p95 ms", "p99 ms", "x",
        "there without reuse, median ms", "p95 ms", "p99 ms", "x", "what became of it", "load of the machine", *_LAST[1:],
    )  # fmt: skip
    lines = []
    for context in sorted({cell.context for cell, _ in measured.of("short")}):
        cell = Cell("reuse", "short", context, "auto")
        base, found = measured.find("vllm", "short", context), measured.groups.get(cell.name)
        without = None if found is None or "without_reuse" not in found else {"ttft": found["without_reuse"]}
        memory = measured.memory(cell) if found else ("", "")
        lines.append((
            f"{context:,}", *_first(base), *_first(found), _sooner(base, found), *_first(without), _sooner(without, found), _became(found), _loads(base, found), *memory,
        ))  # fmt: skip
    return rows(
        "Short prompts, as by default", heads, lines,
        "The first x: vLLM without the connector / with it. The second x: without reuse / with it, asked in turn in the server with the connector.",
    )  # fmt: skip


def loaded(measured: Measured) -> list[str]:
    """Servers with many requests at once, but for those at which they arrive at given times."""
    heads = (
        "context",
        "prompts",
        "setting",
        "requests/s",
        "x",
        *_UNDER_LOAD,
    )
    lines = []
    cells = measured.of("saturated", "ceiling", "shares", "plain", "prefix")
    for cell, found in sorted(cells, key=lambda pair: (pair[0].context, _prompts(pair[0]))):
        rate, more = value(found, "requests_per_second"), _more(found, measured.beside(cell))
        lines.append(
            (f"{cell.context:,}", _prompts(cell), label(cell), number(rate), more, *_under_load(measured, cell, found))
        )
    return rows("Many requests at once", heads, lines)


def arrivals(measured: Measured) -> list[str]:
    """Requests that arrive independently of each other."""
    heads = (
        "context",
        "times vLLM's most",
        "setting",
        "requests/s that came",
        *_UNDER_LOAD,
    )
    cells = sorted(measured.of("arrivals"), key=lambda pair: (pair[0].context, float(pair[0].detail)))
    lines = [
        (
            f"{cell.context:,}",
            cell.detail,
            label(cell),
            number(value(found, "rate")),
            *_under_load(measured, cell, found),
        )
        for cell, found in cells
    ]
    return rows("Requests that arrive independently of each other", heads, lines, *_same_times(cells))


def _same_times(cells: list[tuple[Cell, Content]]) -> list[str]:
    """Whether the requests of compared cells came at the same times."""
    said = []
    for (context, detail), some in itertools.groupby(cells, key=lambda pair: (pair[0].context, pair[0].detail)):
        came = [found["arrived"] for _, found in some if found.get("arrived")]
        if len(came) > 1:
            apart = max(max(each) - min(each) for each in zip(*came, strict=True))
            same = (
                f"at the same times, at most {1000 * apart:.0f} ms apart"
                if apart < 0.1
                else f"at other times in each row, up to {apart:.1f} s apart"
            )
            said.append(f"{context:,} tokens, {detail} times vLLM's most: requests came {same}.")
    return said


def within(measured: Measured) -> list[str]:
    """How many requests per second each server takes while 95% of the first tokens come within `BOUND`."""
    heads = (
        "context", "setting", f"requests/s with p95 within {BOUND:g} s", "x", "over all that vLLM takes", "p95 ms at the rates that were tried", *_LAST,
    )  # fmt: skip
    lines = []
    for cell, found in measured.of("within"):
        most, lowest = value(found, "rate"), min(found["tries"], key=lambda tried: tried["rate"])
        tries = ", ".join(f"{1000 * tried['p95']:,.0f} at {tried['rate']:.2f}" for tried in found["tries"])
        lines.append((
            f"{cell.context:,}", label(cell), number(most) or f"below {lowest['rate']:.2f}", times(most, value(measured.beside(cell), "rate")),
            times(most, value(measured.find("vllm", "saturated", cell.context), "requests_per_second")), tries, *_last(measured, cell),
        ))  # fmt: skip
    return rows(f"While 95% of the first tokens come within {BOUND:g} s", heads, lines)


def _prompts(cell: Cell) -> str:
    """What prompts show, in words."""
    if cell.phase == "prefix":
        return f"begin alike, order {cell.detail}"
    if cell.phase == "plain":
        return "none stored, for both"
    if cell.phase == "shares" and cell.detail.startswith("stored"):
        return f"{float(cell.detail.removeprefix('stored')):.0%} stored"
    return "lengths vary (log-normal)" if cell.phase == "shares" else "all stored"


def _first(found: Content | None) -> tuple[str, str, str]:
    known = first_token(found)
    return ms(known.get("median")), ms(known.get("p95")), ms(known.get("p99"))


def _under_load(measured: Measured, cell: Cell, found: Content) -> tuple[str, ...]:
    """The columns `_UNDER_LOAD`."""
    sooner = times(first_token(measured.beside(cell)).get("p99"), first_token(found).get("p99"))
    between = (ms(value(found, "between_tokens", name)) for name in ("p95", "p99"))
    return *_first(found), sooner, *between, *_last(measured, cell)


def _sooner(base: Content | None, found: Content | None) -> str:
    return times(first_token(base).get("median"), first_token(found).get("median"))


def _more(found: Content, base: Content | None) -> str:
    return times(value(found, "requests_per_second"), value(base, "requests_per_second"))


def _last(measured: Measured, cell: Cell) -> tuple[str, str, str]:
    return left_in(measured.groups[cell.name]), *measured.memory(cell)


def _became(found: Content | None) -> str:
    """How many requests were reused, and why the others were left to vLLM."""
    if found is None or "left" not in found:
        return ""
    left = [f"{left_in(found)} left to vLLM"] if found["left"] else []
    reused = len(found["ttft"].get("samples", [])) - sum(found["left"].values())
    ratio = found["last_report"].get("ratio")
    return ", ".join([*([f"{reused} reused" + (f" at r {ratio:g}" if ratio else "")] if reused else []), *left])


def _loads(*of: Content | None) -> str:
    """How many processes wanted to run, vLLM's cell first."""
    return "; ".join(f"{found['load']:g}" for found in of if found is not None and "load" in found)


def _of_the_last(found: Content) -> dict[str, float] | None:
    """Where the time of a cell's last request went."""
    report, samples = found.get("last_report", {}), found["ttft"].get("samples")
    if not report.get("timings") or not samples:
        return None
    return {**report["timings"], "engine": report["ttft"], "around": samples[-1] - report["ttft"]}
