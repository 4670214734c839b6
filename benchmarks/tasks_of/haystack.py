"""Real prose that facts are planted in: the sentences of Python's language reference, which comes with every Python."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LEADS = 8
"""From how many places of the prose lead-ins are taken. These sentences are in no prompt."""
LEAD_TOKENS = 300
_LONGEST = 300
"""Characters of the longest sentence that is taken. Longer ones are mostly lists and tables."""
_LOOKED_AT = 5
"""How many sentences in a row may be too long for what room is left, before a chunk is taken to be full."""
_NO_PROSE = re.compile(r"::=|\*\*\*|===|---|>>>|\.\.\. |[{}|\\]")


def reference_sentences() -> list[str]:
    """The sentences of all topics in alphabetical order, each once. Code, grammar, tables and titles are left out."""
    found: dict[str, None] = {}
    for name in sorted(pydoc_data.topics.topics):
        for paragraph in re.split(r"\n\s*\n", pydoc_data.topics.topics[name]):
            indented = len(paragraph) - len(paragraph.lstrip(" "))
            text = " ".join(paragraph.split())
            if indented <= 3 and re.match(r"[A-Z]\w* ", text) and text.endswith(".") and not _NO_PROSE.search(text):
                found.update(dict.fromkeys(re.split(r"(?<=[.!?]) (?=[A-Z])", text)))
    return [sentence for sentence in found if 20 <= len(sentence) <= _LONGEST]


def file_sentences(paths: Sequence[Path]) -> list[str]:
    """The sentences of text files of any language, each once, in the order of the files."""
    found: dict[str, None] = {}
    for path in paths:
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            found.update(dict.fromkeys(re.split(r"(?<=[.!?]) (?=\S)|(?<=[。！？])", " ".join(paragraph.split()))))
    return [sentence for sentence in found if 20 <= len(sentence) <= _LONGEST]


@dataclass(frozen=True)
class Sentence:
    """A sentence, and how many tokens it has behind another one."""

    text: str
    tokens: int


class Haystack:
    """Sentences for prompts, and texts of the same prose for lead-ins, which are in no prompt.

    Args:
        sentences: the prose, in order.
        encode: gives the token ids of a text.
    """

    def __init__(self, sentences: Sequence[str], encode: Callable[[str], Sequence[int]]):
        counted = [Sentence(text, len(encode(" " + text))) for text in sentences]
        self.leads, self.sentences = _without_leads(counted)
        self.words = frozenset(re.findall(r"\w+", " ".join(sentences).casefold()))
        """All words of the prose in lower case. Nothing that is planted has a name among them."""

    @property
    def digest(self) -> str:
        """A digest of the prose, which differs between versions of Python."""
        text = repr((self.leads, [s.text for s in self.sentences]))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def strand(self, start: int) -> Strand:
        """The prose from a sentence on, and then from the beginning up to it."""
        start %= len(self.sentences)
        return Strand([*self.sentences[start:], *self.sentences[:start]])


class Strand:
    """Prose for one prompt, of which each sentence is given once."""

    def __init__(self, sentences: Sequence[Sentence]):
        self._left = list(reversed(sentences))

    def take(self, room: int) -> list[str]:
        """The next sentences that have at most `room` tokens together, two at least. One that is too long is passed over.

        Raises:
            ValueError: no prose is left that fits.
        """
        taken: list[str] = []
        passed = 0
        while passed < _LOOKED_AT or len(taken) < 2:
            if not self._left:
                raise ValueError(
                    f"the prose has too few sentences that fit into the {room} tokens that a chunk has beside its facts: use smaller "
                    "--lengths or larger --chunk-tokens."
                )
            sentence = self._left.pop()
            if sentence.tokens > (room if taken else room // 2):  # the first one leaves room for another
                passed += 1
                continue
            taken.append(sentence.text)
            room -= sentence.tokens
        return taken


def _without_leads(sentences: Sequence[Sentence]) -> tuple[tuple[str, ...], tuple[Sentence, ...]]:
    """Texts for lead-ins from all parts of the prose, and the sentences that are left."""
    leads: list[str] = []
    left: list[Sentence] = []
    for number in range(LEADS):
        part = sentences[number * len(sentences) // LEADS : (number + 1) * len(sentences) // LEADS]
        tokens = end = 0
        while end < len(part) // 2 and tokens < LEAD_TOKENS:
            tokens += part[end].tokens
            end += 1
        leads.append(" ".join(s.text for s in part[:end]))
        left += part[end:]
    return tuple(leads), tuple(left)
