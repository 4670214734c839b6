"""The forms in which users have chunks: what a prompt of prose in chunks without overlap is made into, with the same facts."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .layout import Planted
from .questions import Fact

PLAIN = "plain"
SYSTEM_TOKENS = 2000
TURNS = 3


@dataclass(frozen=True)
class Turn:
    """What was said behind the chunks before the question: a user's words and the answer."""

    asked: str
    answered: str


@dataclass(frozen=True)
class Laid:
    """A prompt's parts.

    Attributes:
        chunks: texts of the chunks, in prompt order.
        before: text that stands before everything else, a system prompt's.
        turns: what was said between the chunks and the question.
    """

    chunks: tuple[str, ...]
    before: str = ""
    turns: tuple[Turn, ...] = ()


def overlapping(laid: Laid, planted: Sequence[Planted], spare: Sequence[str]) -> Laid:
    """Windows: each chunk begins with the last third of the one before."""
    chunks = [laid.chunks[0]]
    for before, chunk in zip(laid.chunks, laid.chunks[1:], strict=False):
        words = before.split(" ")
        chunks.append(f"{' '.join(words[-(len(words) // 3) :])} {chunk}")
    return replace(laid, chunks=tuple(chunks))


def twice(laid: Laid, planted: Sequence[Planted], spare: Sequence[str]) -> Laid:
    """Each chunk with a fact that is needed stands a second time behind the others, as when two searches find it."""
    return replace(laid, chunks=(*laid.chunks, *(laid.chunks[i] for i in _needed(planted))))


def nearly_twice(laid: Laid, planted: Sequence[Planted], spare: Sequence[str]) -> Laid:
    """Behind the others stands, of each chunk with a fact that is needed, a version of before the fact was added."""
    copies = []
    for i in _needed(planted):
        text = laid.chunks[i]
        for p in planted:
            for part in (p.fact.text, p.fact.subject, p.fact.rest):
                text = text.replace(part, "") if i in p.chunks else text
        copies.append(" ".join(text.split()))
    return replace(laid, chunks=(*laid.chunks, *copies))


def system_prompt(laid: Laid, planted: Sequence[Planted], spare: Sequence[str]) -> Laid:
    """A system prompt of about 2,000 tokens, of prose that is nowhere else in the prompt."""
    return replace(laid, before=" ".join(spare))


def turns_after(laid: Laid, planted: Sequence[Planted], spare: Sequence[str]) -> Laid:
    """Three questions on the chunks and their answers stand before the question."""
    said = []
    for number in range(TURNS):
        at = number * len(laid.chunks) // TURNS
        first = laid.chunks[at].split(". ")[0].strip()
        said.append(Turn(f"How does passage {at + 1} begin?", f'It begins with: "{first[:120]}"'))
    return replace(laid, turns=tuple(said))


def _needed(planted: Sequence[Planted]) -> list[int]:
    return sorted({i for p in planted if p.fact.needed for i in p.chunks})


def _as_it_is(laid: Laid, planted: Sequence[Planted], spare: Sequence[str]) -> Laid:
    return laid


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        change: makes it of a prompt's parts, the facts in it, and prose that isn't used in it.
        content: what stands around the facts: prose, code or tables.
    """

    change: Callable[[Laid, Sequence[Planted], Sequence[str]], Laid] = _as_it_is
    content: str = "prose"


FORMS = {
    PLAIN: Form(),
    "overlapping": Form(overlapping),
    "twice": Form(twice),
    "nearly_twice": Form(nearly_twice),
    "system_prompt": Form(system_prompt),
    "turns_after": Form(turns_after),
    "code": Form(content="code"),
    "tables": Form(content="tables"),
}
"""Forms by name. Other languages are other prose: `--prose` of the benchmark."""


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
