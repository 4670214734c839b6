"""Questions on single passages, from a file in the form of SQuAD 1.1 (Rajpurkar et al. 2016), that a reader is trained on."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

RUN = 8
"""So many words in a row that two texts have in common make them the same passage, whatever is around them."""


@dataclass(frozen=True)
class AskedPassage:
    """A passage, and the questions that it answers.

    Attributes:
        text: the passage.
        asked: questions, each with its answer as it stands in the passage.
        article: number of its article in the file.
    """

    text: str
    asked: tuple[tuple[str, str], ...]
    article: int = 0


class Barred:
    """Knows the texts that are measured on, and so mustn't be trained on.

    Args:
        texts: all of them.
    """

    def __init__(self, texts: Collection[str] = ()):
        self._texts = texts

    @cached_property
    def _barred(self) -> set[tuple[str, ...]]:
        """Their runs of words, made when a text is first compared with them."""
        return {run for text in self._texts for run in _runs(text)}

    def shares(self, text: str) -> bool:
        """Whether a text has eight words in a row in common with any of them."""
        return not self._barred.isdisjoint(_runs(text))


def read_squad(path: Path, barred: Barred) -> list[AskedPassage]:
    """The passages of a file that have questions, without those that share eight words in a row with a barred text.

    Args:
        path: JSON as SQuAD 1.1 and 2.0 have it, or the same compressed by gzip. Questions without an answer are left out.
        barred: texts that are measured on.

    Raises:
        ValueError: the file is no such JSON, or nothing of it is left.
    """
    found = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        try:
            for number, article in enumerate(json.load(file)["data"]):
                for paragraph in article["paragraphs"]:
                    asked = tuple(
                        (q["question"].strip(), q["answers"][0]["text"]) for q in paragraph["qas"] if q["answers"]
                    )
                    if asked and not barred.shares(paragraph["context"]):
                        found.append(AskedPassage(paragraph["context"], asked, number))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not in SQuAD's form ({type(error).__name__}: {error}): it needs data, a list of articles with paragraphs (context, qas)."
            ) from error
    if not found:
        raise ValueError(f"{path} has no question on a passage that isn't measured on.")
    return found


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of so many words, whatever their case, their accents and what stands between them: some sets of questions know no accents."""
    letters = (c for c in unicodedata.normalize("NFD", text.casefold()) if not unicodedata.combining(c))
    words = re.findall(r"\w+", "".join(letters))
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
