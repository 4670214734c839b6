"""Which tokens are chosen by whole sentences and single scores, once more without NumPy: sets, dicts and sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence


def chosen(
    ids: Sequence[int], sentences: Sequence[int], scores: Sequence[float], can: set[int], count: int
) -> list[int]:
    """Places of `count` of the tokens `can`, ascending.

    Args:
        ids, sentences: of the prompt; -1 is no sentence.
        scores: of each token.
        can: places that can be chosen.
        count: how many.
    """
    numbers = range(max(sentences) + 1)
    behind = max(j for j, n in enumerate(sentences) if n >= 0) + 1
    asked = set(zip(ids[behind:], ids[behind + 1 :], strict=False))
    pairs: dict[int, set[tuple[int, int]]] = {n: set() for n in numbers}
    for j in range(1, behind):
        if sentences[j] == sentences[j - 1] >= 0:
            pairs[sentences[j]].add((ids[j - 1], ids[j]))
    holders: dict[tuple[int, int], list[int]] = {}
    for n in numbers:
        for pair in pairs[n]:
            holders.setdefault(pair, []).append(n)
    weight = {pair: math.log(len(numbers) / len(those)) for pair, those in holders.items()}

    def to_one(values: list[float]) -> list[float]:
        most = max(values)
        return [v / most for v in values] if most > 0 else values

    named = to_one([sum(weight[p] for p in pairs[n] & asked) for n in numbers])
    attended = []
    for n in numbers:
        own = [scores[j] for j in can if sentences[j] == n]
        attended.append(sum(own) / math.sqrt(len(own)) if own else 0.0)
    found = to_one([0.7 * a + 0.3 * b for a, b in zip(named, to_one(attended), strict=True)])
    linked = to_one(
        [sum(weight[p] * max((found[o] for o in holders[p] if o != n), default=0.0) for p in pairs[n]) for n in numbers]
    )
    final = [max(a, 0.7 * b) for a, b in zip(found, linked, strict=True)]
    enough = 3 * math.log(max(2, len(numbers)))
    sure = [min(1.0, sum(weight[p] for p in pairs[n] & asked) / enough) for n in numbers]
    by_others = [
        sum(weight[p] * max((sure[o] for o in holders[p] if o != n), default=0.0) for p in pairs[n]) for n in numbers
    ]
    evident = {n for n in numbers if sure[n] >= 0.65 or 0.7 * min(1.0, by_others[n] / enough) >= 0.65}
    by_sentence = sorted(
        (j for j in can if sentences[j] in evident), key=lambda j: (-final[sentences[j]], sentences[j], -scores[j], j)
    )
    by_score = sorted(can, key=lambda j: (-scores[j], j))
    turn = {j: min([by_score.index(j), *([by_sentence.index(j)] if j in by_sentence else [])]) for j in can}
    return sorted(sorted(can, key=lambda j: (turn[j], j))[:count])
