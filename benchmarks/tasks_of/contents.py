"""What stands around facts instead of prose, and what a prompt's forms are made of."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from fidelity.forms import Material

from .layout import Planted
from .questions import Fact


def material_of(chunks: Sequence[str], planted: Sequence[Planted], system: Callable[[], str]) -> Material:
    """What the forms of a prompt with these facts take.

    The chunks with a fact that is needed are those that stand a second time, and nearly the same is a version of before the fact was added.
    """
    needed = sorted({number for p in planted if p.fact.needed for number in p.chunks})
    changed = []
    for number in needed:
        text = chunks[number]
        for p in planted:
            for part in (p.fact.text, p.fact.subject, p.fact.rest):
                text = text.replace(part, "") if number in p.chunks else text
        changed.append(" ".join(text.split()))
    return Material(needed, changed, system)


@cache
def code_lines() -> tuple[str, ...]:
    """Lines of sources of Python's standard library, each once, without comments and docstrings."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py")):
        try:
            source = ast.unparse(_bare(ast.parse(path.read_text(encoding="utf-8"))))
        except (OSError, SyntaxError, ValueError):
            continue
        found.update(dict.fromkeys(line for line in source.splitlines() if 20 <= len(line) <= 160))
    return tuple(found)


def _bare(tree: ast.Module) -> ast.Module:
    """A module without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def table_rows(count: int = 1500) -> list[str]:
    """Rows of an invented table, always the same."""
    rng = random.Random("table")
    things = ("bolt", "clamp", "hinge", "pipe", "screw", "valve", "washer", "wire")
    return [
        f"| {rng.choice(things)} {letter}-{number} | {rng.randrange(1, 900)} pieces | {rng.randrange(100, 9000) / 100:.2f} | row {rng.choice('ABCDEFGH')}{rng.randrange(1, 40)} |"
        for number in range(1, count + 1)
        for letter in rng.choice("KLMNPRST")
    ]


CONTENTS: dict[str, Callable[[], Sequence[str]]] = {"code": code_lines, "tables": table_rows}
"""What stands around facts instead of prose: its lines."""


def as_row(fact: Fact) -> Fact:
    """A fact as a row of a table."""
    return replace(fact, subject=f"| {fact.subject} |", rest=f"{fact.rest} |")
