"""Questions of one and two steps on passages of an encyclopaedia, found by how its sentences are worded; see docs/quality-reader.md.

    python benchmarks/reader/two_steps.py --passages CORPUS.json --out QUESTIONS.jsonl

CORPUS.json is a list of passages, each with title and text. QUESTIONS.jsonl is for `--more` of train.py. A passage that names the title of another one as, for
instance, the director of its film leads to a question on this director, by way of the film.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Link:
    """How a passage says that another thing has to do with its own.

    Attributes:
        told: what stands before the other thing's name, a regular expression.
        phrases: the other thing, named by the first, {x}.
    """

    told: str
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """How a passage tells something of its thing.

    Attributes:
        told: a regular expression, whose group is the answer.
        asked: questions for it, {x} for the thing.
    """

    told: str
    asked: tuple[str, ...]


_DATE = r"(\d{1,2} [A-Z][a-z]+ \d{3,4}|[A-Z][a-z]+ \d{1,2}, \d{3,4}|\d{4})"
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_PLACE = rf"(?!{_MONTHS})([A-Z][\w’'-]+(?: [A-Z][\w’'-]+){{0,3}})"
_NAME = r"((?:[A-Z]\. )*[A-Z][\w’'-]+(?: (?:of|de|von|van|[A-Z]\.|[A-Z][\w’'-]+))*)"
_FEW = r"(?: [a-z-]+){0,3} "
_WORK = r"director|writer|actor|actress|singer|player|politician|composer|producer|musician|novelist|painter|poet|footballer|lawyer|officer"

LINKS = (
    Link("directed by ", ("the director of {x}", "the person who directed {x}")),
    Link("written by ", ("the author of {x}", "{x}'s author")),
    Link(r"(?:sung|performed|recorded|released) by ", ("the performer of {x}", "the {x} performer")),
    Link(rf"(?:song|album|single) by{_FEW}", ("the performer of {x}", "the {x} performer")),
    Link(rf"(?:novel|book|play|poem|story) by{_FEW}", ("the author of {x}", "{x}'s author")),
    Link("composed by ", ("the composer of {x}", "the person who composed {x}")),
    Link("produced by ", ("the producer of {x}",)),
    Link("starr(?:ing|ed) ", ("the star of {x}", "the cast member of {x}")),
    Link("founded by ", ("the founder of {x}",)),
    Link("created by ", ("the creator of {x}",)),
    Link(rf"(?:son|daughter|child) of{_FEW}", ("the parent of {x}", "{x}'s parent")),
    Link(rf"(?:husband of|wife of|married(?: to)?){_FEW}", ("the spouse of {x}", "{x}'s spouse")),
    Link(rf"(?:brother|sister) of{_FEW}", ("the sibling of {x}",)),
    Link(rf"father of{_FEW}", ("the child of {x}",)),
)  # fmt: skip
PERSON = (
    Fact(rf"^[^(]*\([^()]*?\bborn (?:on |in )?{_DATE}", ("When was {x} born?", "What is {x}'s date of birth?")),
    Fact(rf"^[^(]*\([^()]{{0,60}}?{_DATE}[^()–—-]{{0,40}}\s*[–—-]", ("When was {x} born?", "What is {x}'s date of birth?")),
    Fact(rf"^[^(]*\([^()–—]*[–—-]\s*[^()]{{0,30}}?{_DATE}[^()–—]{{0,40}}\)", ("When did {x} die?", "What is {x}'s date of death?")),
    Fact(rf"\bborn (?:on [^.]{{4,25}} )?(?:in|at) {_PLACE}", ("Where was {x} born?", "In which city was {x} born?", "What is the place of birth of {x}?")),
    Fact(rf"\bdied (?:on [^.]{{4,25}} )?(?:in|at) {_PLACE}", ("Where did {x} die?", "What is the place of death of {x}?")),
    Fact(r"\) (?:was|is) an? ([A-Z][a-z]+(?:-[A-Z][a-z]+)?) [a-z]", ("What nationality is {x}?", "From which country is {x}?")),
    Fact(rf"\) (?:was|is) an? [A-Z][\w-]+ ((?:[a-z][a-z -]*? )?(?:{_WORK}))\b", ("What does {x} do for a living?", "What is the occupation of {x}?")),
    Fact(r"\b(?:educated at|graduated from|studied at|attended) (?:the )?([A-Z][\w’'-]+(?: (?:of|and|[A-Z][\w’'-]+))*)", ("Where was {x} educated?", "Where did {x} study?", "Which school did {x} go to?")),
    Fact(rf"\bson of{_FEW}{_NAME}", ("Who is the father of {x}?", "Who is a parent of {x}?")),
    Fact(rf"\bmarried(?: to)?{_FEW}{_NAME}", ("Who is the spouse of {x}?", "Who did {x} marry?")),
)  # fmt: skip
WORK = (
    Fact(r"^.{0,200}?\b(?:is|was) an? (\d{4}) (?:[\w-]+ ){0,4}?(?:film|album|song|novel|play|single)", ("When did {x} come out?", "In what year was {x} released?")),
    Fact(rf"directed by {_NAME}", ("Who directed {x}?", "Who is the director of {x}?")),
    Fact(rf"written by {_NAME}", ("Who wrote {x}?", "Who is the author of {x}?")),
    Fact(rf"(?:performed|sung|recorded) by {_NAME}", ("Who performed {x}?", "Who is the performer of {x}?")),
    Fact(rf"composed by {_NAME}", ("Who composed {x}?", "Who is the composer of {x}?")),
    Fact(rf"founded by {_NAME}", ("Who founded {x}?", "Who is the founder of {x}?")),
)  # fmt: skip
_LONGEST = 60
"""Characters of an answer."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the questions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--passages", type=Path, nargs="+", required=True, metavar="FILE", help="lists of title, text")
    parser.add_argument("--others", type=int, default=10, help="passages of a question beside its own two")
    parser.add_argument("--single", type=int, default=3, help="most questions of one step on a pair (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the questions")
    args = parser.parse_args(argv)
    for name in ("others", "single"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} is {getattr(args, name)}: use 0 or more.")
    corpus: dict[str, str] = {}
    for file in args.passages:
        try:
            for passage in json.loads(file.read_text()):
                corpus.setdefault(passage["title"], passage["text"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            parser.error(f"{file} is no list of passages with title and text ({type(error).__name__}: {error}).")
    made = list(questions(corpus, args.others, random.Random(args.seed), args.single))
    if not made:
        parser.error(f"no passage of {', '.join(map(str, args.passages))} leads to another one: give more.")
    args.out.write_text("".join(json.dumps(question) + "\n" for question in made))
    print(f"{len(made)} questions on {len({q['id'].split('/')[0] for q in made})} pairs of {len(corpus)} passages")


def questions(corpus: dict[str, str], others: int, rng: random.Random, most: int = 3) -> Iterator[dict[str, Any]]:
    """For each pair of passages of which one leads to the other: up to two questions by way of the first, and at most so many of one step, which ask for the
    link and for something of each of the two.
    """
    known, titles = {title: facts(text) for title, text in corpus.items()}, list(corpus)
    for number, (first, second, link) in enumerate(pairs(corpus)):
        name, other = thing(first), thing(second)
        asked: dict[str, tuple[str, list[str]]] = {}
        for fact, answer in rng.sample(known[second], min(2, len(known[second]))):
            phrase = rng.choice(link.phrases).format(x=name)
            asked[rng.choice(fact.asked).format(x=phrase)] = answer, [other]
        asked[f"Who is {link.phrases[0].format(x=name)}?"] = other, []
        for title, called in ((first, name), (second, other)):
            if known[title]:
                fact, answer = rng.choice(known[title])
                asked[rng.choice(fact.asked).format(x=called)] = answer, []
        single = [question for question, (_, steps) in asked.items() if not steps]
        for question in rng.sample(single, max(0, len(single) - most)):
            del asked[question]
        own = [first, second]
        own += [title for title in rng.sample(titles, min(others, len(titles))) if title not in own]
        rng.shuffle(own)
        passages = [{"title": "", "text": corpus[title]} for title in own]
        for step, (question, (answer, steps)) in enumerate(asked.items()):
            yield {
                "id": f"{number}/{step}",
                "question": question[0].upper() + question[1:],
                "answers": [answer],
                "steps": steps,
                "passages": passages,
            }


def pairs(corpus: dict[str, str]) -> Iterator[tuple[str, str, Link]]:
    """Titles of passages of which the first names the second one in a way that is known, each pair once."""
    titles = {thing(t): t for t in corpus if " " in thing(t) and not re.search(r"\d", t)}
    for title, text in corpus.items():
        seen = {title}
        for link in LINKS:
            for found in re.finditer(link.told, text):
                words = text[found.end() : found.end() + 60].split(" ")
                names = (" ".join(words[:n]).rstrip(".,;)").removesuffix("'s") for n in (5, 4, 3, 2))
                other = next((titles[name] for name in names if name in titles), title)
                if other not in seen and facts(corpus[other]):
                    seen.add(other)
                    yield title, other, link


def facts(text: str) -> list[tuple[Fact, str]]:
    """What a passage tells of its thing, with the answer as it stands there. A thing that was born is a person."""
    person = any(re.search(fact.told, text) for fact in PERSON[:2])
    found = [(fact, re.search(fact.told, text)) for fact in (PERSON if person else WORK)]
    answers = [(fact, match.group(1).rstrip(".")) for fact, match in found if match]
    once = {fact.asked: (fact, answer) for fact, answer in reversed(answers)}
    return [(fact, answer) for fact, answer in once.values() if answer and len(answer) <= _LONGEST]


def thing(title: str) -> str:
    """What a title names, without what tells it apart."""
    return re.sub(r" \(.*\)$", "", title)


if __name__ == "__main__":
    main()
