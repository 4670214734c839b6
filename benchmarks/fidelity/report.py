"""Tables of the results: figures over records, each with its 95% bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cells import line, number, percent
from .forms import PLAIN
from .measures import Estimate, mean, share_closed
from .rows import KEY, Row, read_rows, row_files
from .settings import BASELINE, EVERYTHING, NOTHING, Setting

QUESTIONS = "musique"
SETS = (QUESTIONS, "documents", "shuffled")


@dataclass(frozen=True)
class Point:
    """One setting on one set.

    Attributes:
        set: its name.
        setting: what was measured.
        budget: "ratio" if the ratio counts recomputed tokens only; "compute" if recomputing and choosing tokens together computed as much as
            recomputing this share of the tokens does.
        records: how many records were measured.
        compute: computed token-layers as a share of those of all chunk tokens, the mean over records.
        probed: whether `compute` includes choosing the tokens.
        kl, share, top1, top1_first, nll_difference: see `Distance` and `share_closed`.
        answers: F1 and exact match against the gold answers and against full prefill's answer, where they were measured.
    """

    set: str
    setting: Setting
    budget: str
    records: int
    compute: float
    probed: bool
    kl: Estimate
    share: Estimate
    top1: Estimate
    top1_first: Estimate
    nll_difference: Estimate
    answers: dict[str, Estimate] = field(default_factory=dict)


def load(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a folder, each row once.

    Raises:
        ValueError: there are no results.
    """
    header: dict[str, Any] | None = None
    rows: dict[tuple[Any, ...], Row] = {}
    for path in row_files(folder):
        first, found = read_rows(path)
        header = header or first
        rows.update((tuple(row[name] for name in KEY), row) for row in found)
    if header is None or not rows:
        raise ValueError(f"{folder} holds no results: run the benchmark with --out {folder} first.")
    return header, list(rows.values())


def form_of(row: Row) -> str:
    """The form of a row's chunks: plain where the row says nothing, because it was measured before there were forms."""
    form: str = row.get("form", PLAIN)
    return form


def summarise(rows: Iterable[Row]) -> list[Point]:
    """Points by set and setting, of plain chunks. Only records whose baseline was measured too count for shares."""
    cells: dict[tuple[str, Setting, str], dict[str, Row]] = {}
    for row in (row for row in rows if form_of(row) == PLAIN):
        setting = Setting(row["lead_in"], row["codec"], row["selector"], row["ratio"])
        cells.setdefault((row["set"], setting, row["budget"]), {})[row["record"]] = row
    points = []
    for (name, setting, budget), found in cells.items():
        nothing = cells.get((name, BASELINE, "ratio"), {})
        shared = [record for record in sorted(found) if record in nothing]
        ordered = [found[record] for record in sorted(found)]
        figures = {k: mean([r[k] for r in ordered]) for k in ("kl", "top1", "top1_first", "nll_difference")}
        asked = [k for k in ("f1", "em", "f1_full", "em_full") if all(k in r for r in ordered)]
        points.append(
            Point(
                name,
                setting,
                budget,
                len(ordered),
                sum(r["compute"] for r in ordered) / len(ordered),
                any(r["probed"] for r in ordered),
                share=share_closed([found[r]["kl"] for r in shared], [nothing[r]["kl"] for r in shared]),
                answers={k: mean([r[k] for r in ordered]) for k in asked},
                **figures,
            )
        )
    return points


def equal_compute(points: Sequence[Point]) -> list[Point]:
    """For each setting, the point that computes as much as its ratio says: that with the budget "compute" where choosing tokens computes
    something. A setting without such a point is left out.
    """
    return [p for p in points if p.budget == "compute" or not p.probed]


def markdown(header: dict[str, Any], points: Sequence[Point]) -> str:
    """Everything as Markdown."""
    environment = header.get("environment", {})
    where = environment.get("gpu") or environment.get("processor")
    parts = [
        f"Model {header.get('model')}, {header.get('dtype')}; {where}; torch {environment.get('torch')}, transformers "
        f"{environment.get('transformers')}; commit {header.get('commit')}; {environment.get('date')}."
    ]
    for name in in_order({p.set for p in points}):
        found = [p for p in points if p.set == name]
        parts += [
            f"## {name}",
            _baseline(found),
            "### Share of the KL gap closed at equal compute, %",
            _shares(found),
            "### All settings",
            _details(found),
        ]
    return "\n\n".join(parts) + "\n"


def _baseline(points: Sequence[Point]) -> str:
    base = next((p for p in points if p.setting == BASELINE), None)
    if base is None:
        return "The baseline (nothing recomputed, first-token lead-in) was not measured, so there are no shares."
    return (
        f"{base.records} records. KL(0), nothing recomputed behind the first token: {number(base.kl, 4)}; top-1 agreement "
        f"{number(base.top1, 4)}."
    )


def _shares(points: Sequence[Point]) -> str:
    """A table of selectors and ratios."""
    exact = [p for p in equal_compute(points) if p.setting.codec == BASELINE.codec and p.setting.selector != EVERYTHING]
    ratios = sorted({p.setting.ratio for p in exact})
    lines = [line(["lead-in", "selector", *(f"r {r:g}" for r in ratios)]), line(["---"] * (len(ratios) + 2))]
    for lead_in in dict.fromkeys(p.setting.lead_in for p in exact):
        cells = {(p.setting.selector, p.setting.ratio): p.share for p in exact if p.setting.lead_in == lead_in}
        nothing = cells.get((NOTHING, 0.0))
        for selector in sorted({s for s, _ in cells if s != NOTHING}):
            shares = [cells.get((selector, r), nothing if r == 0 else None) for r in ratios]
            lines.append(line([lead_in, f"`{selector}`", *(percent(s) for s in shares)]))
    return "\n".join(lines)


def _details(points: Sequence[Point]) -> str:
    names = [k for k in ("f1", "em", "f1_full", "em_full") if any(k in p.answers for p in points)]
    titles = {"f1": "F1", "em": "EM", "f1_full": "F1 to full", "em_full": "EM to full"}
    head = [
        "lead-in",
        "codec",
        "selector",
        "r",
        "budget",
        "n",
        "compute",
        "KL",
        "closed %",
        "top-1",
        "first",
        "NLL diff",
    ]
    lines = [line([*head, *(titles[k] for k in names)]), line(["---"] * (len(head) + len(names)))]
    for p in sorted(points, key=lambda p: (p.setting, p.budget)):
        s = p.setting
        cells = [s.lead_in, s.codec, f"`{s.selector}`", f"{s.ratio:g}", p.budget, str(p.records), f"{p.compute:.4f}"]
        cells += [number(p.kl, 4), percent(p.share), number(p.top1, 3), number(p.top1_first, 3)]
        cells += [number(p.nll_difference, 3), *(number(p.answers[k], 3) if k in p.answers else "" for k in names)]
        lines.append(line(cells))
    return "\n".join(lines)


def in_order(names: set[str]) -> list[str]:
    """Names of sets as tables have them."""
    return sorted(names, key=lambda n: (SETS.index(n) if n in SETS else len(SETS), n))
