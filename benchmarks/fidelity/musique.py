"""Questions over passages, from a MuSiQue file (Trivedi et al., TACL 2022).

Each line of the file is a JSON object. These names are read: `question`; `answers`, or `answer` and `answer_aliases`; `passages` (each with
`title` and `text`), or `paragraphs` (each with `title` and `paragraph_text`); and, if given, `id`, `answerable`, and `steps`, what a question goes
through before its answer, or `question_decomposition`, each with the `answer` of a step.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cachetune_rag.text.prompts.prompt import PromptBuilder

from .records import Dataset, Record, slice_of

PREFIX = "Answer the question after reading several passages. Answer within 5 words."
LEADS = 5
"""How many records at the end of the file are never evaluated. Lead-ins are taken from their passages."""


class Question(NamedTuple):
    """A line of a file.

    Attributes:
        question: what is asked.
        answers: what is accepted.
        passages: what it is asked about.
        name: the line's, empty if it has none.
        steps: what the question goes through before its answer, as far as the file says.
    """

    question: str
    answers: list[str]
    passages: list[str]
    name: str
    steps: list[str]


def read_musique(
    path: Path, tokenizer: Any, first: int = 0, count: int = 40, passages: int | None = None, query: str = "{}"
) -> Dataset:
    """Records `first` to `first + count` of a MuSiQue file, plain or gzipped. Their target is the first gold answer and the end token.

    Args:
        path: the file.
        tokenizer: the model's.
        first, count: which records. Those at the end of the file are kept for lead-ins.
        passages: how many passages of each question are taken, the first ones; None for all.
        query: what stands behind the passages, {} for the question.

    Raises:
        ValueError: a line that can't be read, or too few of them.
    """
    prompts = PromptBuilder(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    records = []
    whole: list[list[str]] = []
    for number, (question, answers, texts, name, _) in enumerate(read_questions(path)):
        target = (*prompts.encode(answers[0]), *end)
        whole.append(texts)
        records.append(
            Record(
                name or f"line-{number}",
                "musique",
                tuple(texts[:passages]),
                query.replace("{}", question),
                target,
                tuple(answers),
            )
        )
    chosen = slice_of(records, first, count, LEADS, str(path))
    # In the order of records: an engine takes lead-ins from everywhere in the text, so they belong to different questions.
    # Questions share passages.
    used = {chunk for record in chosen for chunk in record.chunks}
    leads: dict[str, None] = {}
    for record in records[-LEADS:]:
        leads.update(dict.fromkeys([c for c in record.chunks if c not in used and c not in leads][:2]))
    others = dict.fromkeys(c for texts in whole[-LEADS:] for c in texts if c not in used and c not in leads)
    return Dataset("musique", chosen, tuple(leads), PREFIX, spare=tuple(others))


def read_questions(path: Path) -> Iterator[Question]:
    """The question of each line of a file.

    Raises:
        ValueError: a line that can't be read.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not record.get("answerable", True):
                    continue
                answers = record["answers"] if "answers" in record else [record["answer"], *record["answer_aliases"]]
                if "passages" in record:
                    found = [(p["title"], p["text"]) for p in record["passages"]]
                else:
                    found = [(p["title"], p["paragraph_text"]) for p in record["paragraphs"]]
                passages = [f"{title}\n{text}" if title else text for title, text in found]
                steps = record["steps"] if "steps" in record else _steps(record.get("question_decomposition", []))
                yield Question(record["question"], list(answers), passages, str(record.get("id", "")), list(steps))
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no MuSiQue record ({type(error).__name__}: {error}): it needs question; answers, "
                    "or answer and answer_aliases; passages (title, text), or paragraphs (title, paragraph_text)."
                ) from error


def _steps(decomposition: list[dict[str, Any]]) -> list[str]:
    """The answers of all steps but the last one, whose answer is the question's."""
    return [step["answer"] for step in decomposition[:-1]]
