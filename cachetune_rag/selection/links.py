"""Scores of whole sentences: by what the query attends to, and by the rare words that they share with the query and with each other.

The query's attention finds what it names. Two things it finds late or not at all: the next fact of a chain, which only the fact before it names; and facts that are nearly
the one that is asked for, which the model has to tell apart. If one of two such facts is recomputed and the other keeps its stored rows, the model compares what can't be compared. Both have rare
names in common with what is found, and names are told by their tokens alone, without the model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORDS = 0.7
"""How much words in common with the query count; the rest is what the query attends to."""
DECAY = 0.7
"""How much less a sentence counts that is found by another sentence, instead of by the query."""
SURE = 3.0
"""A sentence that shares so many pairs with the query, none of which stands in another sentence, has full evidence. Further pairs add nothing."""
LEAST_EVIDENCE = 0.65
"""The least evidence of a sentence that is chosen whole: about two pairs that it alone has in common with the query, or three with a sentence of full evidence."""
_TINY = np.finfo(np.float64).tiny

Numbers = NDArray[np.float64]
_Ids = NDArray[np.int64]


class Links:
    """The pairs of neighbouring tokens that sentences have in common. A pair in few sentences counts more: the logarithm of one in how many has it.

    Args:
        ids: the prompt's token ids, int64 [length].
        sentences: the number of each token's sentence, int64 [length], -1 for tokens of none.
        query: places of the prompt's tokens behind the last chunk.

    Attributes:
        count: how many sentences there are.
    """

    def __init__(self, ids: _Ids, sentences: _Ids, query: range):
        self.count = int(sentences.max(initial=-1)) + 1
        pairs = (ids[:-1] << 32) | ids[1:]  # the pair that ends at the token behind
        inside = np.flatnonzero((sentences[1:] >= 0) & (sentences[1:] == sentences[:-1]))
        known, code = np.unique(pairs[inside], return_inverse=True)
        # Each pair once for a sentence. Sorting is faster here than `np.unique`, which hashes first.
        held = np.sort(sentences[1:][inside] * max(1, len(known)) + code)
        self._sentence, self._pair = np.divmod(held[np.diff(held, prepend=-1) > 0], max(1, len(known)))
        self._weights = np.log(self.count / np.maximum(1, np.bincount(self._pair, minlength=len(known))))
        asked = np.zeros(len(known))
        asked[_found(known, pairs[max(0, query.start) : max(0, query.stop - 1)])] = 1
        self._with_query = self._summed((self._weights * asked)[self._pair])

    def to_query(self) -> Numbers:
        """How much each sentence has in common with the query: [sentences], 1 for the one that has most."""
        return _largest_is_one(self._with_query)

    def to_others(self, scores: Numbers) -> Numbers:
        """How much each sentence has in common with other sentences that score high: [sentences], 1 for the one that has most."""
        return _largest_is_one(self._with_others(scores))

    def evidence(self) -> Numbers:
        """How sure it is that each sentence has to do with the query, by words alone: [sentences], from 0 to 1.

        The largest in a prompt may be small. What a text's end, as a query, has in common with the text before it by chance is no evidence, and neither is what many
        sentences have.
        """
        enough = SURE * np.log(max(2, self.count))
        asked = np.minimum(1, self._with_query / enough)
        return np.maximum(asked, DECAY * np.minimum(1, self._with_others(asked) / enough))

    def _with_others(self, scores: Numbers) -> Numbers:
        score = scores[self._sentence]
        best = np.zeros(len(self._weights))
        np.maximum.at(best, self._pair, score)
        # A sentence isn't found by itself: a pair for which it is the best one itself leads to it with what the second best has.
        whose = np.full(len(best), -1)
        mine = score == best[self._pair]
        whose[self._pair[mine][::-1]] = self._sentence[mine][::-1]
        second = np.zeros(len(best))
        others = self._sentence != whose[self._pair]
        np.maximum.at(second, self._pair[others], score[others])
        strength = np.where(whose[self._pair] == self._sentence, second[self._pair], best[self._pair])
        return self._summed(self._weights[self._pair] * strength)

    def _summed(self, numbers: Numbers) -> Numbers:
        return np.asarray(np.bincount(self._sentence, numbers, minlength=self.count), np.float64)


def sentence_scores(links: Links, sentences: _Ids, scores: NDArray[np.float32]) -> Numbers:
    """Scores of whole sentences: [sentences].

    Args:
        links: what they have in common.
        sentences: the number of each token's sentence, -1 for tokens that can't be chosen.
        scores: of each token.
    """
    inside = sentences >= 0
    total = np.bincount(sentences[inside], np.maximum(scores[inside], 0), minlength=links.count)
    tokens = np.bincount(sentences[inside], minlength=links.count)
    # Between the sum, which prefers long sentences, and the mean, which prefers short ones.
    attended = _largest_is_one(total / np.sqrt(np.maximum(1, tokens)))
    found = WORDS * links.to_query() + (1 - WORDS) * attended
    return np.maximum(found, DECAY * links.to_others(_largest_is_one(found)) * found.max(initial=0))


def _found(known: _Ids, wanted: _Ids) -> _Ids:
    """Where some numbers are in others, which ascend. Few of them are looked up faster than `np.isin` sorts all."""
    at = np.searchsorted(known, wanted)
    inside = at < len(known)
    at, wanted = at[inside], wanted[inside]
    return at[known[at] == wanted]


def _largest_is_one(numbers: NDArray[np.float64 | np.int64]) -> Numbers:
    return np.asarray(numbers / max(float(numbers.max(initial=0)), float(_TINY)), np.float64)
