"""Answers to questions, compared in pairs: with full prefill's of the same run, or with those of another run, of another model for instance."""

from __future__ import annotations

from collections.abc import Iterable

from .cells import line, number
from .forms import PLAIN
from .measures import mean
from .orders import mean_of_orders
from .report import form_of, in_order
from .rows import Row
from .settings import BASELINE, EVERYTHING, Setting

_EXACT = 1 - 1e-9
_HEAD = (
    "setting",
    "n",
    "F1",
    "exact, %",
    "F1 less full prefill's",
    "exact ones kept",
    "new exact ones",
    "full prefill's answer, %",
)
_WORDS = (
    "In pairs with full prefill of the same question. Exact: all words of a gold answer, no others, in SQuAD's normal form. Kept: how many of full prefill's "
    "exact answers are exact under the setting; new: how many are exact that full prefill's are not. Of a mean over orders, only a question that is exact in "
    "every order counts as exact there. Brackets are 95% bootstrap intervals over questions."
)

Answers = dict[tuple[str, Setting], dict[str, Row]]
"""Rows with answers by set and setting, and then by record."""


def by_answers(rows: Iterable[Row]) -> str:
    """A table for each set that was answered, as Markdown. Empty if none was."""
    answers = _answers(list(rows))
    parts = ["## Answers against full prefill's", _WORDS]
    for name in in_order({name for name, _ in answers}):
        full = next((found for (each, s), found in answers.items() if each == name and s.selector == EVERYTHING), {})
        settings = [setting for each, setting in answers if each == name and setting != BASELINE]
        lines = [line(_HEAD), line(["---"] * len(_HEAD))]
        lines += [line(_cells(s, answers[name, s], full)) for s in sorted(settings, key=_order)]
        parts += [f"### {name}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n" if answers else ""


def changes(before: Iterable[Row], after: Iterable[Row]) -> str:
    """F1 and exact answers of two runs over the same questions, by set and setting, as Markdown.

    Raises:
        ValueError: they have no answer to the same question under the same setting.
    """
    first, second = _answers(list(before)), _answers(list(after))
    head = (
        "set",
        "setting",
        "pairs",
        "F1 before",
        "F1 after",
        "change",
        "exact before, %",
        "exact after, %",
        "change, points",
    )
    lines = [line(head), line(["---"] * len(head))]
    for name in in_order({name for name, _ in first}):
        for setting in sorted((s for each, s in first if each == name), key=_order):
            own, other = first[name, setting], second.get((name, setting), {})
            # A record has the same name in every run; its digest tells whether it was the same text.
            shared = sorted(r for r in own if r in other and own[r]["digest"] == other[r]["digest"])
            if shared:
                f1 = [[found[r]["f1"] for r in shared] for found in (own, other)]
                em = [[100 * found[r]["em"] for r in shared] for found in (own, other)]
                cells = [name, _called(setting), str(len(shared))]
                for numbers, digits in ((f1, 3), (em, 0)):
                    cells += [number(mean(each), digits) for each in numbers]
                    cells.append(number(mean([b - a for a, b in zip(*numbers, strict=True)]), digits, "+"))
                lines.append(line(cells))
    if len(lines) == 2:
        raise ValueError(
            "the two runs have no answer to the same question under the same setting: measure the same ones, with --answers."
        )
    return "\n".join(lines) + "\n"


def _answers(rows: list[Row]) -> Answers:
    """Of plain chunks, at the ratio that is asked for."""
    found: Answers = {}
    for row in [*rows, *mean_of_orders(rows)]:
        if "f1" in row and row["budget"] == "ratio" and form_of(row) == PLAIN:
            setting = Setting(row["lead_in"], row["codec"], row["selector"], row["ratio"])
            found.setdefault((row["set"], setting), {})[row["record"]] = row
    return found


def _cells(setting: Setting, found: dict[str, Row], full: dict[str, Row]) -> list[str]:
    rows, shared = [found[record] for record in sorted(found)], sorted(found.keys() & full.keys())
    exact, right = ({r for r in shared if some[r]["em"] >= _EXACT} for some in (full, found))
    cells = [_called(setting), str(len(rows)), number(mean([row["f1"] for row in rows]), 3)]
    cells.append(number(mean([100 * row["em"] for row in rows]), 0))
    if setting.selector == EVERYTHING:
        return [*cells, "", "", "", ""]
    cells.append(number(mean([found[r]["f1"] - full[r]["f1"] for r in shared]), 3, "+"))
    cells += [f"{len(exact & right)} of {len(exact)}", str(len(right - exact))]
    return [*cells, number(mean([100 * found[r]["em_full"] for r in shared]), 0)]


def _called(setting: Setting) -> str:
    if setting.selector == EVERYTHING:
        return "full prefill"
    where = "" if (setting.lead_in, setting.codec) == ("auto", "exact") else f", {setting.lead_in}, {setting.codec}"
    return f"`{setting.selector}`" + (f" r {setting.ratio:g}" if setting.ratio else "") + where


def _order(setting: Setting) -> tuple[bool, Setting]:
    return setting.selector != EVERYTHING, setting
