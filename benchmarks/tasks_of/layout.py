"""Chunks of prose, with facts where they are wanted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .haystack import Haystack, Strand
from .questions import Fact

PLACES = ("head", "middle", "tail", "split")
"""Where a needed fact stands in its chunk. One that is split begins at the end of a chunk and ends at the beginning of the next."""


@dataclass(frozen=True)
class Planted:
    """Where a fact stands: its place, and the numbers of its chunk or its two chunks."""

    fact: Fact
    place: str
    chunks: tuple[int, ...]


@dataclass(eq=False)
class _Slot:
    """A chunk that is still to be filled with prose."""

    head: list[str] = field(default_factory=list)
    middle: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    @property
    def planted(self) -> list[str]:
        return [*self.head, *self.middle, *self.tail]


def chunks_needed(facts: Sequence[Fact], place: str) -> int:
    """How many chunks needed facts take, since no two of them share one."""
    return sum(fact.needed for fact in facts) * (2 if place == "split" else 1)


def lay_out(
    facts: Sequence[Fact],
    place: str,
    count: int,
    chunk_tokens: int,
    haystack: Haystack,
    encode: Callable[[str], Sequence[int]],
    rng: random.Random,
    between: str = " ",
) -> tuple[tuple[str, ...], tuple[Planted, ...]]:
    """Chunks of real prose in any order, with the facts in them.

    Needed facts stand at `place`, each in a chunk of its own (or two, one behind the other, where they are split). The others stand at the
    head, in the middle or at the tail of other chunks, and in the middle of any where there are too few. No chunk has more than
    `chunk_tokens` tokens, and none breaks off within a sentence of the prose. Sentences and facts are joined with `between`.

    Raises:
        ValueError: the facts don't fit.
    """
    if chunks_needed(facts, place) > count:
        raise ValueError(f"{chunks_needed(facts, place)} chunks are needed for these facts, and there are {count}.")
    blocks: list[list[_Slot]] = []
    where: list[tuple[Fact, str, list[_Slot]]] = []
    for fact in (f for f in facts if f.needed):
        block = [_Slot(), _Slot()] if place == "split" else [_Slot()]
        if place == "split":
            block[0].tail.append(fact.subject)
            block[1].head.append(fact.rest)
        else:
            getattr(block[0], place).append(fact.text)
        blocks.append(block)
        where.append((fact, place, block))
    blocks += [[_Slot()] for _ in range(count - sum(map(len, blocks)))]
    rng.shuffle(blocks)
    slots = [slot for block in blocks for slot in block]
    where += _plant_others([f for f in facts if not f.needed], slots, rng)
    strand = haystack.strand(rng.randrange(len(haystack.sentences)))
    filled: dict[_Slot, str] = {}
    for slot in rng.sample(slots, len(slots)):  # so that chunks don't stand in the order in which the prose has them
        filled[slot] = _fill(slot, strand, chunk_tokens, encode, between)
    planted = (Planted(fact, at, tuple(slots.index(s) for s in block)) for fact, at, block in where)
    return tuple(filled[slot] for slot in slots), tuple(planted)


def _plant_others(
    facts: Sequence[Fact], slots: Sequence[_Slot], rng: random.Random
) -> list[tuple[Fact, str, list[_Slot]]]:
    """Put the facts that aren't needed where the fewest are so far: at any place of an empty chunk, or else in the middle, where they move
    nothing from a head or tail.
    """
    where = []
    for fact in facts:
        fewest = min(len(slot.planted) for slot in slots)
        slot = rng.choice([slot for slot in slots if len(slot.planted) == fewest])
        place = "middle" if slot.planted else rng.choice(PLACES[:3])
        getattr(slot, place).append(fact.text)
        where.append((fact, place, [slot]))
    return where


def _fill(slot: _Slot, strand: Strand, chunk_tokens: int, encode: Callable[[str], Sequence[int]], between: str) -> str:
    room = chunk_tokens - sum(len(encode(" " + text)) for text in slot.planted)
    while True:
        prose = strand.take(room)
        while True:
            half = len(prose) // 2
            text = between.join([*slot.head, *prose[:half], *slot.middle, *prose[half:], *slot.tail])
            over = len(encode(text)) - chunk_tokens
            if over <= 0:
                return text
            if len(prose) == 2:  # no side of a fact may be without prose
                break
            prose.pop()  # the tokens of a whole can be more than those of its parts
        room -= over  # so shorter sentences are looked for
