"""Tables of the results: how many of full prefill's right answers each setting keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fidelity.forms import FORMS, PLAIN
from fidelity.measures import Estimate, mean
from fidelity.rows import Row
from fidelity.settings import Setting

from cachetune_rag.reuse.config import AUTO

from .doubt import BOUNDS, measured, read_again, told_apart
from .kinds import KINDS
from .prompts import Cell
from .settings import FULL, title
from .statistics import Paired, paired

LEAST = 0.40
"""A cell in which full prefill answers less than this share right is left out: what a model can't do, reuse can't spoil."""
TARGETS = {0.15: (0.98, 0.93), 0.05: (0.96, 0.88)}
"""What the default selector is to keep at a ratio: over all prompts that count, and on every kind."""


@dataclass(frozen=True)
class Answered:
    """One prompt's rows: that of full prefill, and those of the settings that were measured."""

    full: Row
    others: dict[Setting, Row]

    @property
    def cell(self) -> Cell:
        """What the prompt is counted with."""
        return Cell(self.full["set"], self.full["length"], self.full["near_duplicates"], self.full.get("form", PLAIN))


def answered(rows: Iterable[Row]) -> list[Answered]:
    """Rows by prompt. Prompts whose full prefill was not measured are left out."""
    prompts: dict[tuple[str, str], dict[Setting, Row]] = {}
    for row in rows:
        setting = Setting(row["lead_in"], row["codec"], row["selector"], row["ratio"])
        prompts.setdefault((row["record"], row["digest"]), {})[setting] = row
    return [
        Answered(found[FULL], {s: r for s, r in found.items() if s != FULL})
        for _, found in sorted(prompts.items())
        if FULL in found
    ]


def split_cells(
    prompts: Sequence[Answered],
) -> tuple[list[Answered], dict[Cell, tuple[int, int]], dict[Cell, tuple[int, int]]]:
    """The prompts of the cells that full prefill does; and, for the cells that are kept and those that are left out, how many prompts
    each has and how many of them full prefill answers right.
    """
    counts: dict[Cell, tuple[int, int]] = {}
    for prompt in prompts:
        right, count = counts.get(prompt.cell, (0, 0))
        counts[prompt.cell] = (right + prompt.full["right"], count + 1)
    done = {cell: found for cell, found in counts.items() if found[0] >= LEAST * found[1]}
    return [p for p in prompts if p.cell in done], done, {c: found for c, found in counts.items() if c not in done}


def compare(prompts: Sequence[Answered], setting: Setting) -> Paired | None:
    """Full prefill and a setting on the prompts for which both were measured; None if there are none."""
    shared = [p for p in prompts if setting in p.others]
    if not shared:
        return None
    return paired([p.full["right"] for p in shared], [p.others[setting]["right"] for p in shared])


def markdown(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """Everything as Markdown."""
    prompts = answered(rows)
    kept, done, left_out = split_cells(prompts)
    alone = sum(not p.others for p in kept)  # a run was cut off behind them
    kept = [p for p in kept if p.others]
    settings = sorted({s for p in prompts for s in p.others}, key=lambda s: (s.codec != "exact", s))
    environment = header.get("environment", {})
    where = environment.get("gpu") or environment.get("processor")
    parts = [
        f"Model {header.get('model')}, {header.get('dtype')}; {where}; torch {environment.get('torch')}, transformers "
        f"{environment.get('transformers')}; commit {header.get('commit')}; {environment.get('date')}.",
        f"{len(prompts)} prompts in {len(done) + len(left_out)} cells (kind, length, with or without near-duplicates). {_left_out(left_out)}",
    ]
    if alone:
        parts.append(f"Of {alone} more prompts only full prefill was measured: they count in the last table alone.")
    if kept:
        parts += [
            "## All kinds",
            "Kept: the share of full prefill's right answers that are right under the setting too. Lost, gained: prompts that only full "
            "prefill, or only the setting, answers right; p is McNemar's exact test of these two. Brackets are 95% bootstrap intervals "
            "over prompts.",
            _totals(kept, settings),
            _against_targets(kept, settings),
        ]
        groups: list[tuple[str, Callable[[Answered], Any]]] = [
            ("kind", lambda p: p.cell.kind),
            ("place of the facts", lambda p: p.full["place"]),
            ("tokens of a chunk", lambda p: p.full["chunk_size"]),
            ("tokens of a prompt", lambda p: p.cell.length),
            ("near-duplicates", lambda p: p.cell.near_duplicates),
        ]
        if any("chunks" in p.full for p in kept):  # rows of before there were forms don't have their number
            groups.append(("number of chunks", lambda p: _chunks(p.full)))
        if any(p.cell.form != PLAIN for p in kept):
            groups.append(("form", lambda p: p.cell.form))
        if any("sure" in row for p in kept for row in p.others.values()):
            groups.append(("how sure full prefill is of its answer's least likely token", _sureness))
        for name, group in groups:
            parts += [f"## Kept by {name}, %", _by(kept, settings, name, group)]
        if any(measured(row) for p in kept for row in p.others.values()):
            parts += ["## Read again where the model is not sure of a token", _AGAIN_WORDS, _again(kept, settings)]
        if any("kl" in row for p in prompts for row in p.others.values()):
            parts += ["## KL from full prefill, over the tokens of its answer", _KL_WORDS]
            names = ("tokens of a chunk", "number of chunks", "form")
            parts += [_kl_by(prompts, settings, *each) for each in groups if each[0] in names]
    parts += ["## Full prefill by cell", _cells({**done, **left_out}, left_out)]
    return "\n\n".join(parts) + "\n"


def _left_out(left_out: dict[Cell, tuple[int, int]]) -> str:
    if not left_out:
        return f"Full prefill answers at least {LEAST:.0%} right in all of them."
    named = "; ".join(
        f"{cell} ({right} of {count})" for cell, (right, count) in sorted(left_out.items(), key=_cell_order)
    )
    return f"Left out of all tables but the last, because full prefill answers less than {LEAST:.0%} right: {named}."


def _totals(prompts: Sequence[Answered], settings: Sequence[Setting]) -> str:
    head = ["setting", "n", "compute", "full prefill right", "right", "right, %", "kept, %", "lost", "gained", "p"]
    lines = [_line(head), _line(["---"] * len(head))]
    for setting in settings:
        found = compare(prompts, setting)
        if found is None:
            continue
        rows = [p.others[setting] for p in prompts if setting in p.others]
        compute = sum(row["compute"] for row in rows) / len(rows)
        cells = [title(setting), str(found.prompts), f"{compute:.3f}", str(found.full), str(found.right)]
        cells += [_percent(found.accuracy), _percent(found.kept), str(found.lost), str(found.gained), f"{found.p:.2g}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _against_targets(prompts: Sequence[Answered], settings: Sequence[Setting]) -> str:
    """What the default keeps, beside what it is to keep. A kind without a right answer of full prefill has no share."""
    lines = [_line(["default", "kept, %", "target", "on the kind that keeps least, %", "target"]), _line(["---"] * 5)]
    kinds = {p.cell.kind for p in prompts}
    for setting in settings:
        if setting != Setting("auto", "exact", AUTO.selector, setting.ratio) or setting.ratio not in TARGETS:
            continue
        whole = compare(prompts, setting)
        by_kind = {kind: compare([p for p in prompts if p.cell.kind == kind], setting) for kind in kinds}
        shares = {kind: found.kept for kind, found in by_kind.items() if found is not None and found.full}
        if whole is None or not shares:
            continue
        every, each = TARGETS[setting.ratio]
        least = min(shares, key=lambda kind: (shares[kind].value, _order(kind)))
        cells = [title(setting), _percent(whole.kept), f"{100 * every:.0f}"]
        lines.append(_line([*cells, f"{least}: {_percent(shares[least])}", f"{100 * each:.0f}"]))
    return "\n".join(lines) if len(lines) > 2 else "The default was not measured at the ratios that have a target."


def _by(prompts: Sequence[Answered], settings: Sequence[Setting], name: str, group: Callable[[Answered], Any]) -> str:
    """A table with a row for each setting, and a column for each group of prompts."""
    groups = sorted({group(p) for p in prompts}, key=_order)
    own = {g: [p for p in prompts if group(p) == g] for g in groups}
    titles = [f"{g:,}" if isinstance(g, int) else str(g) for g in groups]
    lines = [_line(["setting", *titles]), _line(["---"] * (len(groups) + 1))]
    counts = [f"{sum(p.full['right'] for p in own[g])} of {len(own[g])}" for g in groups]
    lines.append(_line(["full prefill right", *counts]))
    for setting in settings:
        found = [compare(own[g], setting) for g in groups]
        lines.append(_line([title(setting), *("" if f is None else _percent(f.kept) for f in found)]))
    return "\n".join(lines)


_SIZES = {"0": 0, "1-4": 4, "5-8": 8, "9-16": 16, "17-32": 32, "33 and more": 1 << 30}
"""Groups of numbers of chunks, and the most that each has."""
_SURE = {"not known": 2.0, "0.9 and more": 0.9, "0.5 to 0.9": 0.5, "below 0.5": 0.0}
"""Groups of probabilities, and the least that each has."""
_KL_WORDS = "The mean over all prompts, also those of cells that are left out above."

_AGAIN_WORDS = (
    "What it would bring to read a prompt again with full prefill at the first token of the answer of which the model's likeliest is less likely than the bound, "
    "and to go on from there. Kept: as above; answers that had parted from full prefill's before count as lost, and as right in *at most*. At random: what is "
    "kept if as many prompts are read with full prefill, drawn at random. Compute: the mean of both readings, as a share of full prefill's. Lost answers told apart: the area under the ROC curve of the least sure token, of full prefill's right answers."
)


def _kl_by(
    prompts: Sequence[Answered], settings: Sequence[Setting], name: str, group: Callable[[Answered], Any]
) -> str:
    """A table with a row for each setting, and a column of mean KL for each group of prompts."""
    groups = sorted({group(p) for p in prompts}, key=_order)
    lines = [
        _line([name, *(f"{g:,}" if isinstance(g, int) else str(g) for g in groups)]),
        _line(["---"] * (len(groups) + 1)),
    ]
    for setting in settings:
        cells = []
        for g in groups:
            found = [p.others[setting]["kl"] for p in prompts if group(p) == g and "kl" in p.others.get(setting, {})]
            kl = mean(found)
            cells.append(f"{kl.value:.3f} [{kl.low:.3f}, {kl.high:.3f}]" if found else "")
        lines.append(_line([title(setting), *cells]))
    return "\n".join(lines)


def _again(prompts: Sequence[Answered], settings: Sequence[Setting]) -> str:
    """A table with two rows for each setting and bound: that of a look at the first token alone, and at all."""
    head = ["setting", "tokens looked at", "lost answers told apart", "bound", "read again, %", "kept, %"]
    head += ["at most, %", "at random, %", "compute"]
    lines = [_line(head), _line(["---"] * len(head))]
    for setting in settings:
        pairs = [(p.full, p.others[setting]) for p in prompts if measured(p.others.get(setting, {}))]
        if not any(full["right"] for full, _ in pairs):
            continue
        for words, tokens in (("the first", 1), ("all", None)):
            area = told_apart(pairs, tokens)
            for bound in BOUNDS:
                found = read_again(pairs, bound, tokens)
                cells = [title(setting), words, "" if math.isnan(area) else f"{area:.2f}", f"{bound:g}"]
                cells += [f"{100 * found.again:.0f}", _percent(found.kept), f"{100 * found.most:.1f}"]
                lines.append(_line([*cells, f"{100 * found.chance:.1f}", f"{found.compute:.3f}"]))
    return "\n".join(lines)


def _sureness(prompt: Answered) -> str:
    """The probability that full prefill gives the least likely token of its answer, roughly. It stands in the rows of the settings."""
    sure = next((row["sure"] for row in prompt.others.values() if row.get("sure") is not None), None)
    return next(name for name, least in _SURE.items() if sure is None or sure >= least)


def _chunks(row: Row) -> str:
    """About how many chunks a prompt has."""
    return next(name for name, most in _SIZES.items() if row.get("chunks", 0) <= most)


def _cells(cells: dict[Cell, tuple[int, int]], left_out: dict[Cell, tuple[int, int]]) -> str:
    lines = [_line(["kind", "tokens", "near-duplicates", "form", "right", "n", "%", ""]), _line(["---"] * 8)]
    for cell, (right, count) in sorted(cells.items(), key=_cell_order):
        note = "left out" if cell in left_out else ""
        share = f"{100 * right / count:.0f}"
        lines.append(
            _line([cell.kind, f"{cell.length:,}", cell.near_duplicates, cell.form, str(right), str(count), share, note])
        )
    return "\n".join(lines)


def _order(group: Any) -> tuple[int, Any]:
    """Kinds in the order in which they are defined, everything else by itself."""
    for named in (KINDS, FORMS, _SIZES, _SURE):
        if group in named:
            return (list(named).index(group), "")
    return (len(KINDS), group)


def _cell_order(item: tuple[Cell, Any]) -> tuple[Any, ...]:
    cell = item[0]
    return (*_order(cell.kind), cell.length, cell.near_duplicates, _order(cell.form))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
