"""Training text: passages with facts in them, and several questions on them, each with its answer."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .prose import RealQuestion, Strand
from .real import RealText
from .squad import AskedPassage
from .templates import CHAINS, LABELS, LOOKUPS, PREFIXES, Lookup
from .turns import STEP, TOKENS_PER_CHARACTER, Context, Turn, spoken
from .vocabulary import ITEMS, Vocabulary
from .worlds import World

_CHUNK_TOKENS = (64, 128, 128, 256, 256, 512)
_NOUNS = (
    "chapel",
    "clinic",
    "farm",
    "ferry",
    "garage",
    "hostel",
    "laundry",
    "orchard",
    "pavilion",
    "quarry",
    "studio",
    "vineyard",
)


@dataclass(frozen=True)
class Planted:
    """Facts for one context, and what is asked about them.

    Attributes:
        facts: sentences, each for one place.
        labels: sentences of which each stands in a chunk of its own.
        turns: the questions.
    """

    facts: tuple[str, ...]
    turns: tuple[Turn, ...]
    labels: tuple[str, ...] = ()


class ContextMaker:
    """Makes training text. What a number gives depends on the seed and the number alone.

    Args:
        sentences: prose around the facts.
        questions: real questions, which every now and then are asked instead.
        avoid: words that no invented name is, in lower case.
        real: share of contexts with real questions.
        passages: passages with questions of their own.
        read: share of contexts with those.
        seed: all that is drawn depends on it.
        aloud: whether answers say what a question goes through where it takes several steps.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        questions: Sequence[RealQuestion] = (),
        avoid: Set[str] = frozenset(),
        real: float = 0.04,
        passages: Sequence[AskedPassage] = (),
        read: float = 0.0,
        seed: int = 0,
        aloud: bool = False,
    ):
        self._sentences, self._asked = list(sentences), RealText(questions, passages, aloud)
        self._avoid, self._real, self._read, self._seed, self._aloud = avoid, real, read, seed, aloud

    def context(self, number: int, tokens: int) -> Context:
        """The text of a number, of about so many tokens."""
        rng = random.Random(f"reader {self._seed} {number} {tokens}")
        if self._asked.has_questions and rng.random() < self._real:
            real = self._asked.with_questions(rng, tokens)
            if real is not None:
                return real
        if self._asked.has_passages and rng.random() < self._read:
            return self._asked.with_passages(rng, tokens)
        draw = _Draw(rng, Vocabulary(rng, self._avoid), self._aloud)
        characters = int(tokens / TOKENS_PER_CHARACTER)
        size = min(int(rng.choice(_CHUNK_TOKENS) / TOKENS_PER_CHARACTER), max(1, characters // 2))
        kinds = _KINDS if rng.random() < 0.6 else _WORLDS
        planted = [rng.choice(kinds)(draw) for _ in range(rng.choice((1, 2, 2, 3)))]
        turns = [turn for p in planted for turn in p.turns]
        facts = [fact for p in planted for fact in p.facts]
        while sum(map(len, facts)) > characters * 0.7 and len(planted) > 1:
            planted.pop()
            turns, facts = [t for p in planted for t in p.turns], [f for p in planted for f in p.facts]
        labels = [label for p in planted for label in p.labels]
        chunks = self._fill(draw.rng, facts, labels, characters, size)
        rng.shuffle(turns)
        if kinds is _WORLDS and rng.random() < 0.5:  # as sets of questions are that know lower case only
            chunks = [chunk.lower() for chunk in chunks]
        return Context(rng.choice(PREFIXES), tuple(chunks), tuple(turns[:8]))

    def _fill(
        self, rng: random.Random, facts: Sequence[str], labels: Sequence[str], characters: int, size: int
    ) -> list[str]:
        """Chunks of prose with the facts anywhere in them. Some facts end one chunk and begin the next."""
        count = max(2, len(labels), round(characters / size))
        slots: list[list[str]] = [[] for _ in range(count)]
        heads: list[list[str]] = [[] for _ in range(count)]
        tails: list[list[str]] = [[] for _ in range(count)]
        for slot, label in zip(rng.sample(range(count), len(labels)), labels, strict=False):
            (heads if rng.random() < 0.5 else slots)[slot].append(label)
        cut_behind: set[int] = (
            set()
        )  # one fact at most is cut between two chunks, so that nothing stands between its halves
        for fact in facts:
            slot, place = rng.randrange(count), rng.random()
            words = fact.split(" ")
            if place < 0.15 and slot + 1 < count and slot not in cut_behind and len(words) > 3:
                cut = rng.randrange(1, len(words))
                cut_behind.add(slot)
                tails[slot].append(" ".join(words[:cut]))
                heads[slot + 1].insert(0, " ".join(words[cut:]))
            elif place < 0.3:
                heads[slot].append(fact)
            elif place < 0.45:
                tails[slot].insert(0, fact)
            else:
                slots[slot].append(fact)
        strand, chunks = Strand(self._sentences, rng), []
        for head, middle, tail in zip(heads, slots, tails, strict=True):
            room = size - sum(len(s) + 1 for s in [*head, *middle, *tail])
            while room > 0:
                sentence = strand.next()
                if len(sentence) > room and middle:
                    break
                middle.insert(rng.randint(0, len(middle)), sentence)
                room -= len(sentence) + 1
            chunks.append(" ".join([*head, *middle, *tail]))
        return chunks


class _Draw:
    """What the makers of facts draw with."""

    def __init__(self, rng: random.Random, vocabulary: Vocabulary, aloud: bool):
        self.rng, self.vocabulary, self.aloud = rng, vocabulary, aloud

    @cached_property
    def naming(self) -> Callable[[], str]:
        """How all things of one context are named."""
        style = self.rng.choice(("word", "word", "noun", "person", "code"))
        if style == "noun":
            return lambda: f"the {self.vocabulary.name()} {self.rng.choice(_NOUNS)}"
        if style == "person":
            return self.vocabulary.person
        return (
            self.vocabulary.name
            if style == "word"
            else lambda: self.vocabulary.name().lower() + self.rng.choice("_.-") + self.rng.choice("abxyz")
        )

    def things(self, count: int) -> list[str]:
        """So many names, of which some are nearly the same."""
        made = [self.naming() for _ in range(count)]
        if self.rng.random() < 0.4:
            words = re.findall(r"[A-Z]\w+", made[0])
            if words:
                made.append(made[0].replace(words[-1], self.vocabulary.like(words[-1])))
        return made


def _told(draw: _Draw, lookup: Lookup, thing: str, value: str) -> str:
    told = draw.rng.choice(lookup.told).format(e=thing, v=value)
    return told[0].upper() + told[1:] if thing in told[: len(thing)] and thing.startswith("the ") else told


def one_each(draw: _Draw) -> Planted:
    """Several things with a value each; one is asked for, or two at once, in the order of the question."""
    lookup = draw.rng.choice(LOOKUPS)
    things = draw.things(draw.rng.randint(1, 8))
    values = {thing: draw.vocabulary.value(lookup.sort) for thing in things}
    facts = [_told(draw, lookup, thing, value) for thing, value in values.items()]
    asked = draw.rng.sample(things, min(4, len(things)))
    turns = [Turn(draw.rng.choice(lookup.asked).format(e=thing), values[thing]) for thing in asked]
    if len(things) > 1 and draw.rng.random() < 0.5:
        first, second = draw.rng.sample(things, 2)
        questions = [draw.rng.choice(lookup.asked).format(e=thing) for thing in (first, second)]
        both = f"{questions[0][:-1]}, and {questions[1][0].lower()}{questions[1][1:]}"
        turns.append(Turn(both, f"{values[first]} and {values[second]}"))
    return Planted(tuple(facts), tuple(turns))


def several_each(draw: _Draw) -> Planted:
    """Things with two to four values; all of one's are asked for."""
    lookup = draw.rng.choice([lookup for lookup in LOOKUPS if lookup.sort != "name"])
    facts, turns = [], []
    for thing in draw.things(draw.rng.randint(1, 3)):
        values = [draw.vocabulary.value(lookup.sort) for _ in range(draw.rng.randint(2, 4))]
        facts += [_told(draw, lookup, thing, value) for value in values]
        count = ("two", "three", "four")[len(values) - 2]
        asked = draw.rng.choice(
            (
                f"What are the {count} {lookup.several}?",
                f"Name all {lookup.several}.",
                f"List the {count} {lookup.several}.",
            )
        )
        turns.append(Turn(asked.format(e=thing), f"{', '.join(values[:-1])} and {values[-1]}"))
    return Planted(tuple(facts), tuple(turns))


def chains(draw: _Draw) -> Planted:
    """Chains of one to five facts. The answer goes back through the chain, and then says the value."""
    chain = draw.rng.choice(CHAINS)
    facts, turns = [], []
    for _ in range(draw.rng.choice((2, 2, 3))):
        things = draw.things(draw.rng.choice((1, 2, 2, 3, 3, 4, 5)))
        value = draw.vocabulary.value(chain.sort)
        facts.append(draw.rng.choice(chain.root).format(e=things[0], v=value))
        facts += [draw.rng.choice(chain.link).format(e=e, b=b) for b, e in pairwise(things)]
        at = draw.rng.randrange(len(things)) if draw.rng.random() < 0.5 else len(things) - 1
        back = [thing.removeprefix("the ") for thing in reversed(things[:at])]
        between = STEP if draw.aloud else ", "
        turns.append(Turn(draw.rng.choice(chain.asked).format(e=things[at]), between.join([*back, value])))
    return Planted(tuple(facts), tuple(turns))


def counting(draw: _Draw) -> Planted:
    """Chunks with labels, one of which stands on most of them."""
    told, asked = draw.rng.choice(LABELS)
    most, *others = draw.rng.sample(ITEMS, draw.rng.randint(2, 4))
    times = draw.rng.randint(3, 6)
    named = [most] * times + [other for other in others for _ in range(draw.rng.randint(1, times - 2))]
    return Planted((), (Turn(asked, most),), tuple(told.format(v=item) for item in named))


def quoting(draw: _Draw) -> Planted:
    """Sentences of invented words, of which the rest is asked for by their beginning."""
    facts, turns = [], []
    for _ in range(draw.rng.randint(1, 3)):
        words = [draw.vocabulary.name().lower() for _ in range(draw.rng.randint(6, 9))]
        facts.append(f"{' '.join(words).capitalize()}.")
        turns.append(
            Turn(f'How does the sentence go on that begins "{" ".join(words[:3]).capitalize()}"?', " ".join(words[3:6]))
        )
    return Planted(tuple(facts), tuple(turns))


def world(draw: _Draw) -> Planted:
    """A small world and questions of one to three steps through it."""
    made = World(draw.rng, draw.vocabulary)
    paths = made.grow(draw.rng.randint(2, 4))
    turns = [Turn(path.question, spoken(path.steps, path.answer, draw.aloud)) for path in paths]
    return Planted(tuple(made.passages()), tuple(turns))


_KINDS: tuple[Callable[[_Draw], Planted], ...] = (
    one_each,
    one_each,
    several_each,
    chains,
    chains,
    chains,
    counting,
    quoting,
)
_WORLDS: tuple[Callable[[_Draw], Planted], ...] = (world,)
