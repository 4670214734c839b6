"""Finding stored chunks by the words of a question (Okapi BM25), so that `ask` works without a vector index."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from cachetune_rag.cli.words import asked, words

_K1, _B = 1.2, 0.75

_Key = TypeVar("_Key")


def rank(question: str, texts: Iterable[tuple[_Key, str]]) -> list[_Key]:
    """Keys of the texts that share a word with the question, best first; equal scores keep their order.

    `texts` is gone through once, and of each text only the counts of the question's words are kept.
    """
    wanted = asked(question)
    found: list[tuple[_Key, Counter[str], int]] = []
    holders: Counter[str] = Counter()
    total = length = 0
    for key, text in texts:
        every = words(text)
        total += 1
        length += len(every)
        counts = Counter(word for word in every if word in wanted)
        if counts:
            found.append((key, counts, len(every)))
            holders.update(counts.keys())
    weight = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in holders.items()}

    def score(counts: Counter[str], size: int) -> float:
        share = _K1 * (1 - _B + _B * size * total / length)
        return sum(weight[word] * n * (_K1 + 1) / (n + share) for word, n in sorted(counts.items()))

    ranked = sorted(
        ((score(counts, size), -i, key) for i, (key, counts, size) in enumerate(found)), key=lambda r: r[:2]
    )
    return [key for *_, key in reversed(ranked)]
