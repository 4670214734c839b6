"""Split a SQuAD file by articles: what the reader is trained on, and questions with distractors to measure with; see docs/quality-reader.md.

    python benchmarks/reader/held_out.py --squad dev-v1.1.json --articles 12 --train TRAIN.json --questions QUESTIONS.jsonl

QUESTIONS.jsonl is for `--musique` of quality.py: each question stands behind its own passage and others of the same article. One article more is held
out, for the last questions, which quality.py doesn't measure: their passages give lead-ins.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from fidelity.musique import LEADS


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--squad", type=Path, required=True, metavar="FILE", help="in SQuAD's form, plain or gzipped")
    parser.add_argument("--articles", type=int, required=True, help="of the file, the first so many are held out")
    parser.add_argument("--passages", type=int, default=10, help="of each question")
    parser.add_argument("--each", type=int, default=12, help="questions of an article")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="gets the other articles")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="gets the questions")
    args = parser.parse_args(argv)
    for name in ("articles", "passages", "each"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: use 1 or more.")
    with gzip.open(args.squad, "rt") if args.squad.suffix == ".gz" else args.squad.open() as file:
        articles = json.load(file)["data"]
    if len(articles) < args.articles + 2:
        parser.error(
            f"--articles is {args.articles}, and {args.squad} has {len(articles)}: hold out at least two fewer."
        )
    made = [questions(article, args.passages, args.each) for article in articles[: args.articles]]
    # The articles take turns, so that any part of the questions is of many.
    asked = [question for turn in range(args.each) for few in made for question in few[turn : turn + 1]]
    count = len(asked)
    leads = questions(articles[args.articles], args.passages, LEADS)
    if len(leads) < LEADS:
        parser.error(
            f"article {args.articles + 1} has {len(leads)} passages with questions, and gives lead-ins with {LEADS}: use another --articles."
        )
    asked += leads
    held = {p["context"] for article in articles[: args.articles + 1] for p in article["paragraphs"]}
    left = [a for a in articles[args.articles + 1 :] if held.isdisjoint(p["context"] for p in a["paragraphs"])]
    if not left:
        parser.error(f"every article of {args.squad} has a passage that is held out: there is nothing to train on.")
    few = sum(len(question["passages"]) < args.passages for question in asked[:count])
    args.train.write_text(json.dumps({"data": left}))
    args.questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    print(
        f"{len(left)} articles to train on, {count} questions of {args.articles} others ({few} of them behind fewer passages): --musique-records {count}"
    )


def questions(article: dict[str, Any], passages: int, most: int) -> list[dict[str, Any]]:
    """Questions of an article, each on another passage, with the passage among others of the article in any order. Always the same."""
    rng = random.Random(article["title"])
    paragraphs = [p for p in article["paragraphs"] if any(True for _ in _answered(p))]
    made = []
    for number in rng.sample(range(len(paragraphs)), min(most, len(paragraphs))):
        own = paragraphs[number]
        question, answers = rng.choice(list(_answered(own)))
        others = [p["context"] for p in paragraphs if not any(a.casefold() in p["context"].casefold() for a in answers)]
        texts = [own["context"], *rng.sample(others, min(passages - 1, len(others)))]
        rng.shuffle(texts)
        made.append(
            {
                "id": f"{article['title']}-{number}",
                "question": question,
                "answers": answers,
                "passages": [{"title": "", "text": text} for text in texts],
            }
        )
    return made


def _answered(paragraph: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Questions of a paragraph, and the different answers that count as right."""
    for asked in paragraph["qas"]:
        answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
        if answers:
            yield asked["question"].strip(), answers


if __name__ == "__main__":
    main()
