"""Small invented worlds, told in the manner of an encyclopaedia, and questions that take one to three steps through them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from .vocabulary import COLOURS, JOBS, Vocabulary


@dataclass(frozen=True)
class Relation:
    """What one thing has to do with another one.

    Attributes:
        target: sort of the other one: a key of `RELATIONS`, or year, job or colour.
        told: sentences, {x} for the first and {y} for the other.
        phrase: the other one, named by the first.
        asked: questions for the other one.
    """

    target: str
    told: tuple[str, ...]
    phrase: tuple[str, ...]
    asked: tuple[str, ...]


RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation("city", ("{x} was born in {y}.", "{x} ( born in {y} ) grew up there.", "{x}, a native of {y}, soon moved away."), ("the birthplace of {x}", "{x}'s birthplace", "the city where {x} was born"), ("Where was {x} born?", "In which city was {x} born?", "What is {x}'s place of birth?")),
        Relation("city", ("{x} died in {y}.", "{x} spent the last years in {y} and died there."), ("the city where {x} died",), ("Where did {x} die?", "In what city did {x} die?")),
        Relation("person", ("{x} was married to {y}.", "{x} is the spouse of {y}.", "In those years {x} married {y}."), ("the spouse of {x}", "{x}'s spouse"), ("Who is the spouse of {x}?", "Who was {x} married to?")),
        Relation("person", ("{x} is the child of {y}.", "{x} was raised by the parent {y}.", "{y} is the parent of {x}."), ("the parent of {x}",), ("Who is the parent of {x}?", "Whose child is {x}?")),
        Relation("school", ("{x} was educated at {y}.", "{x} graduated from {y}.", "After studies at {y}, {x} travelled widely."), ("the school that {x} went to", "{x}'s alma mater"), ("Where was {x} educated at?", "Where did {x} study?")),
        Relation("company", ("{x} worked for {y}.", "{x} was employed by {y} for many years."), ("the employer of {x}", "{x}'s employer"), ("Who employed {x}?", "Which company did {x} work for?")),
        Relation("job", ("{x} was a noted {y}.", "{x} made a living as a {y}."), (), ("What did {x} do for a living?", "What work was {x} known for?")),
    ),
    "work": (
        Relation("person", ("{x} is a novel by {y}.", "{x} was written by {y}.", "{y} is the author of {x}."), ("the author of {x}", "the writer of {x}"), ("Who wrote {x}?", "Who is the author of {x}?")),
        Relation("person", ("{x} was performed by {y}.", "{y} first sang {x} on stage."), ("the performer of {x}",), ("Who performed {x}?", "Who is the performer of {x}?")),
        Relation("company", ("{x} was published by {y}.", "{y} published {x}.", "{x} came out with the publisher {y}."), ("the publisher of {x}", "the company that published {x}"), ("Who published {x}?", "Who is the publisher of {x}?")),
        Relation("year", ("{x} appeared in {y}.", "{x} was first shown in {y}."), (), ("When did {x} appear?", "In what year was {x} first shown?")),
    ),
    "company": (
        Relation("person", ("{x} was founded by {y}.", "{y} founded {x}."), ("the founder of {x}",), ("Who founded {x}?", "Who is the founder of {x}?")),
        Relation("city", ("{x} has its headquarters in {y}.", "{x} is based in {y}."), ("the city where {x} is based", "the headquarters location of {x}"), ("Where are the headquarters of {x}?", "In which city is {x} based?")),
        Relation("year", ("{x} was established in {y}.", "{x} opened for business in {y}."), (), ("When was {x} established?", "When was {x} formed?")),
    ),
    "school": (
        Relation("city", ("{x} is a school in {y}.", "{x} stands in the centre of {y}."), ("the city where {x} is",), ("In which city is {x}?", "Where is {x} located?")),
        Relation("year", ("{x} took its first students in {y}.", "{x} began teaching in {y}."), (), ("When did {x} take its first students?", "In which year did {x} begin teaching?")),
        Relation("colour", ("Students of {x} wear {y}.", "{x} has {y} as its colour."), (), ("Which colour do students of {x} wear?",)),
    ),
    "city": (
        Relation("county", ("{x} is a town in {y}.", "{x} lies in {y}.", "{x} belongs to {y}."), ("the county of {x}", "the county where {x} is located"), ("In which county is {x} located?", "Which county does {x} belong to?", "What county is {x} in?")),
        Relation("person", ("{y} was elected mayor of {x}.", "The mayor of {x} is {y}."), ("the mayor of {x}",), ("Who is the mayor of {x}?", "Who was elected mayor of {x}?")),
        Relation("river", ("{x} stands on the river {y}.", "The {y} flows through {x}."), ("the river through {x}",), ("Which river flows through {x}?", "On which river is {x}?")),
    ),
    "county": (
        Relation("city", ("The county seat of {x} is {y}.", "{x} is governed from {y}."), ("the county seat of {x}",), ("What is the county seat of {x}?", "From where is {x} governed?")),
    ),
    "river": (
        Relation("river", ("The {x} flows into the {y}.", "The {x} ends in the {y}."), ("the river that the {x} flows into",), ("What does the {x} flow into?", "Where does the {x} end?")),
    ),
}  # fmt: skip
"""What a thing of each sort has to do with others."""

_STARTS = ("person", "work", "work", "company", "school", "city")
_MOST_STEPS = 3


@dataclass(frozen=True)
class Path:
    """A way through a world.

    Attributes:
        question: asks for what is at its end, by way of what is at its beginning.
        answer: what is at its end.
        steps: the things between.
    """

    question: str
    answer: str
    steps: tuple[str, ...]


@dataclass
class World:
    """Things, what they have to do with each other, and the passages that tell it.

    Args:
        rng: what everything is drawn with.
        vocabulary: gives the names.
    """

    rng: random.Random
    vocabulary: Vocabulary
    _told: dict[str, list[tuple[Relation, str]]] = field(default_factory=dict)
    _sorts: dict[str, str] = field(default_factory=dict)

    def grow(self, starts: int) -> list[Path]:
        """Make paths through new things."""
        return [self._path() for _ in range(starts)]

    def passages(self) -> list[str]:
        """A passage for each thing, in any order."""
        made = []
        for name, facts in ((n, f) for n, f in self._told.items() if f):
            sentences = [self.rng.choice(relation.told).format(x=name, y=other) for relation, other in facts]
            self.rng.shuffle(sentences)
            made.append(" ".join(sentences))
        self.rng.shuffle(made)
        return made

    def _path(self) -> Path:
        name = phrase = self._thing(self.rng.choice(_STARTS))
        steps, between = self.rng.randint(1, _MOST_STEPS), list[str]()
        while True:
            steps -= 1
            # Only a thing of its own leads on, so the last step is the only one that may end at a year.
            relation, other = self._step(name, leads_on=steps > 0)
            if steps == 0 or not relation.phrase:
                question = self.rng.choice(relation.asked).format(x=phrase)
                return Path(question[0].upper() + question[1:], other, tuple(between))
            phrase, name = self.rng.choice(relation.phrase).format(x=phrase), other
            between.append(other)

    def _step(self, name: str, leads_on: bool) -> tuple[Relation, str]:
        """A relation of a thing and where it leads. The thing gets other relations beside it, which are there to be told apart from it."""
        relations = [r for r in RELATIONS[self._sorts[name]] if r.phrase or not leads_on]
        chosen = self.rng.choice(relations)
        for relation in RELATIONS[self._sorts[name]]:
            known = any(relation == r for r, _ in self._told[name])
            if not known and (relation == chosen or self.rng.random() < 0.5):
                self._told[name].append((relation, self._thing(relation.target)))
        return next((r, other) for r, other in self._told[name] if r == chosen)

    def _thing(self, sort: str) -> str:
        if sort == "year":
            return self.vocabulary.year()
        if sort in ("job", "colour"):
            return self.rng.choice(JOBS if sort == "job" else COLOURS)
        name = self.vocabulary.name()
        made = {
            "person": lambda: self.vocabulary.person(),
            "work": lambda: (
                f"{self.rng.choice(('The Last', 'A Day in', 'Songs of', 'Beyond', 'My', 'The House at'))} {name}"
            ),
            "company": lambda: f"{name} {self.rng.choice(('Press', 'Records', 'Works', 'and Sons', 'Pictures'))}",
            "school": lambda: f"{name} {self.rng.choice(('College', 'Academy', 'University', 'Institute'))}",
            "county": lambda: f"{name} County",
        }.get(sort, lambda: name)()
        self._sorts[made] = sort
        self._told.setdefault(made, [])
        return made
