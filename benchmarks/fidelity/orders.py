"""Questions asked with their passages in several orders: what a question gives is then the mean over them, so that less of it is chance."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace

from .records import Dataset
from .report import QUESTIONS
from .rows import Row

ALL_ORDERS = f"{QUESTIONS}, mean over orders"
"""The set of the means over orders."""
_ORDER = re.compile(rf"{QUESTIONS}_order_(\d+)")
_NUMBERS = ("compute", "kl", "top1", "top1_first", "nll", "nll_difference", "f1", "em", "f1_full", "em_full")


def in_orders(questions: Dataset, orders: int, seed: int = 0) -> list[Dataset]:
    """One set for each order of the passages: the first has the questions as they are, the others have their passages in an order that is drawn."""
    return [questions, *(_reordered(questions, number, seed) for number in range(2, orders + 1))]


def set_of(name: str) -> str:
    """The set of which this one has the questions in another order; the set itself if it is not such a set."""
    return QUESTIONS if _ORDER.fullmatch(name) else name


def mean_of_orders(rows: Iterable[Row]) -> list[Row]:
    """The mean over orders for every question, form and setting that was measured in all orders. Empty if there is one order alone."""
    found: dict[tuple[object, ...], dict[str, Row]] = {}
    names = set()
    for row in rows:
        if set_of(row["set"]) == QUESTIONS:
            names.add(row["set"])
            key = ("record", "form", "lead_in", "codec", "selector", "ratio", "budget")
            found.setdefault(tuple(row.get(name) for name in key), {})[row["set"]] = row
    if len(names) < 2:
        return []
    return [_mean(list(each.values())) for each in found.values() if each.keys() == names]


def _reordered(questions: Dataset, number: int, seed: int) -> Dataset:
    name, records = f"{QUESTIONS}_order_{number}", []
    for record in questions.records:
        chunks = list(record.chunks)
        random.Random(f"{seed} {number} {record.name}").shuffle(chunks)
        records.append(replace(record, chunks=tuple(chunks)))
    return replace(questions, name=name, records=tuple(records))


def _mean(rows: list[Row]) -> Row:
    means = {name: sum(row[name] for row in rows) / len(rows) for name in _NUMBERS if all(name in row for row in rows)}
    return rows[0] | means | {"set": ALL_ORDERS, "probed": max(row["probed"] for row in rows)}
