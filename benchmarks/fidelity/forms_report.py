"""Tables by form of the chunks: how close reuse is in each, and what it differs by from the same records in plain chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cells import line, number, percent
from .forms import FORMS, PLAIN, of_documents
from .measures import Estimate, difference_of_shares, mean, share_closed
from .report import QUESTIONS, form_of, in_order
from .rows import Row
from .settings import BASELINE, EVERYTHING, Setting

_WORDS = (
    "KL(0): nothing recomputed behind the first token. KL, closed, top-1 and compute are those of the ratio as it is asked for; the last column is at equal "
    "compute. Against plain: the form's figure minus that of the same records in plain chunks, in pairs; empty where the records are other ones. Brackets are "
    "95% bootstrap intervals over records."
)
_HEAD = ("form", "n", "chunks", "prompt tokens", "KL(0)", "KL", "closed, %", "top-1", "compute", "pairs")
_AGAINST = ("KL against plain", "closed against plain, points", "closed at equal compute, %")

Cells = dict[tuple[str, str, Setting, str], dict[str, Row]]
"""Rows by set, form, setting and budget, and then by record."""


def by_form(rows: Iterable[Row]) -> str:
    """Everything as Markdown. Empty if all chunks are plain."""
    cells: Cells = {}
    for row in rows:
        setting = Setting(row["lead_in"], row["codec"], row["selector"], row["ratio"])
        cells.setdefault((row["set"], form_of(row), setting, row["budget"]), {})[row["record"]] = row
    if all(form == PLAIN for _, form, _, _ in cells):
        return ""
    parts = ["## By form of the chunks", _WORDS]
    for name in in_order({name for name, *_ in cells}):
        forms = sorted({form for each, form, _, _ in cells if each == name}, key=_order)
        settings = sorted({setting for each, _, setting, _ in cells if each == name})
        others = {form for _, form, _, _ in cells} - set(forms)
        if name == QUESTIONS and (only := sorted(filter(of_documents, others), key=_order)):
            parts.append(of_documents_only(name, only))
        if forms == [PLAIN]:
            continue
        for setting in settings:
            if setting == BASELINE or setting.selector == EVERYTHING:
                continue
            words = f"{name}, `{setting.selector}`" + (f" r {setting.ratio:g}" if setting.ratio else "")
            lines = [line((*_HEAD, *_AGAINST)), "| --- " * len((*_HEAD, *_AGAINST)) + "|"]
            lines += [_line(cells, name, form, setting) for form in forms if (name, form, setting, "ratio") in cells]
            parts += [f"### {words}, lead-in {setting.lead_in}, codec {setting.codec}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def of_documents_only(name: str, forms: Sequence[str]) -> str:
    """Says in which of the forms the questions of a set are not measured."""
    return (
        f"`{name}` is not measured in {', '.join(forms)}: passages that are given can't have what is made of documents."
    )


def _line(cells: Cells, name: str, form: str, setting: Setting) -> str:
    found = cells[name, form, setting, "ratio"]
    nothing = cells.get((name, form, BASELINE, "ratio"), {})
    # Where choosing costs nothing, the ratio is what is computed.
    probed = any(row["probed"] for row in found.values())
    equal = cells.get((name, form, setting, "compute"), {}) if probed else found
    rows = [found[record] for record in sorted(found)]
    sizes = sorted(row["chunks"] for row in rows if "chunks" in row)
    shown = [form, str(len(rows)), _range(sizes), f"{sum(row['prompt_tokens'] for row in rows) / len(rows):.0f}"]
    # A run that was cut off has a record of which only the first settings were measured.
    both = sorted(found.keys() & nothing.keys())
    shown += [number(mean(_kl(nothing, both)), 4), number(mean(_kl(found, sorted(found))), 4)]
    shown += [percent(_share(found, nothing)), number(mean([row["top1"] for row in rows]), 3)]
    shown += [f"{sum(row['compute'] for row in rows) / len(rows):.3f}", *_against_plain(cells, name, form, setting)]
    return line([*shown, percent(_share(equal, nothing))])


def _against_plain(cells: Cells, name: str, form: str, setting: Setting) -> list[str]:
    """How many pairs there are, and what they differ by."""
    own, own_nothing = (cells.get((name, form, each, "ratio"), {}) for each in (setting, BASELINE))
    plain, plain_nothing = (cells.get((name, PLAIN, each, "ratio"), {}) for each in (setting, BASELINE))
    shared = sorted(own.keys() & plain.keys()) if form != PLAIN else []
    if not shared:
        return ["", "", ""]
    change = mean([a - b for a, b in zip(_kl(own, shared), _kl(plain, shared), strict=True)])
    based = [record for record in shared if record in own_nothing and record in plain_nothing]
    points = difference_of_shares(*(_kl(each, based) for each in (own, own_nothing, plain, plain_nothing)))
    return [str(len(shared)), number(change, 4, "+"), percent(points, "+")]


def _kl(rows: dict[str, Row], records: Sequence[str]) -> list[float]:
    return [rows[record]["kl"] for record in records]


def _share(rows: dict[str, Row], nothing: dict[str, Row]) -> Estimate:
    shared = sorted(rows.keys() & nothing.keys())
    return share_closed(_kl(rows, shared), _kl(nothing, shared))


def _order(form: str) -> tuple[int, int, str]:
    """As they are defined, then sizes of chunks, then other languages."""
    if form in FORMS:
        return 0, list(FORMS).index(form), ""
    size = form.split("_")[0]
    return (1, int(size), "") if size.isdigit() else (2, 0, form)


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
