"""Whole sentences are chosen beside single tokens, so that a fact is recomputed whole or not at all.

Single tokens by their scores are a fact's number without its name, or half of a name. What is left of the fact keeps its stored rows, and whoever reads the fact
mixes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.selection.base import SelectionContext, top_places
from cachetune_rag.selection.links import LEAST_EVIDENCE, Links, sentence_scores

LONG = 64
"""The most tokens of a sentence's beginning that is joined as a whole."""


class Chooser(Protocol):
    """Chooses tokens of one prompt, any number. Fewer are always among more."""

    def take(self, count: int) -> Tensor:
        """Places of so many tokens: int64, in any order. `count` is from 0 to the number of those that can be chosen."""


class SingleTokens:
    """Those with the largest scores.

    Args:
        scores: float32 [length], on the host.
        places: those that can be chosen, int64, ascending.
    """

    def __init__(self, scores: Tensor, places: Tensor):
        self._scores, self._places = scores, places

    def take(self, count: int) -> Tensor:
        """See `Chooser.take`."""
        return top_places(self._scores, self._places, count) if 0 < count < len(self._places) else self._places[:count]


class WholeSentences:
    """Two lists in turn, of which each has the best first: whole sentences by their scores, and single tokens by theirs. What stands in both is taken
    once. The last sentence may be taken in part: its tokens with the largest scores.

    Args:
        best: the numbers of the sentences that may be chosen whole, the best one first. Of others single tokens are chosen alone.
        sentences: the number of the sentence of each token that can be chosen, -1 for the others, int64 [length].
        scores: of tokens, float32 [length].
    """

    def __init__(self, best: NDArray[np.int64], sentences: NDArray[np.int64], scores: NDArray[np.float32]):
        self._best, self._sentences, self._scores = best, sentences, scores
        self._places = torch.from_numpy(np.flatnonzero(sentences >= 0))
        sizes = np.bincount(sentences[sentences >= 0])
        self._count = len(sizes)
        self._ends = np.cumsum(sizes[best])

    def take(self, count: int) -> Tensor:
        """See `Chooser.take`."""
        if not 0 < count < len(self._places):
            return self._places[:count]
        turn = np.full(len(self._sentences), len(self._sentences))
        for some in (self._by_sentences(count), self._by_scores(count)):
            turn[some] = np.minimum(turn[some], np.arange(len(some)))
        among = np.flatnonzero(turn < count)
        return torch.from_numpy(among[np.argsort(turn[among], kind="stable")[:count]])

    def _by_sentences(self, count: int) -> NDArray[np.int64]:
        """Places of at least so many tokens in the order of the sentences, or of all that these have."""
        first = self._best[: int(np.searchsorted(self._ends, count)) + 1]
        rank = np.full(self._count + 1, len(first))  # one more, for the tokens of no sentence
        rank[first] = np.arange(len(first))
        places = np.flatnonzero(rank[self._sentences] < len(first))
        return places[np.lexsort((-self._scores[places], rank[self._sentences[places]]))]

    def _by_scores(self, count: int) -> NDArray[np.int64]:
        """Places of so many tokens, in the order of their scores."""
        places = top_places(torch.from_numpy(self._scores), self._places, count).numpy()
        return places[np.argsort(-self._scores[places], kind="stable")]


class SentenceChoice:
    """Chooses whole sentences of one prompt, once its tokens have scores. What can be known before is known when it is made, while a GPU runs the probe.

    Args:
        context: the request.
        places: of tokens that can be chosen, int64, ascending.
    """

    def __init__(self, context: SelectionContext, places: Tensor):
        sentences = joined(context.sentences, context.continuations)
        inside = np.flatnonzero(sentences >= 0)
        behind = int(inside[-1]) + 1 if len(inside) else len(sentences)
        # What an earlier answer quotes is no question. But a question may ask on: "And who knows it?" names nothing.
        for asked in sorted({max(behind, context.asked_from), behind}, reverse=True):
            self._links = Links(context.ids, sentences, range(asked, len(sentences)))
            self._evident = self._links.evidence() >= LEAST_EVIDENCE
            if self._evident.any():
                break
        self._places = places
        self._sentences = np.full(len(sentences), -1, np.int64)
        self._sentences[places.numpy()] = sentences[places.numpy()]
        self._evident[self._sentences.max(initial=-1) + 1 :] = False  # nothing of these can be chosen

    def by(self, scores: Tensor) -> Chooser:
        """The choice by scores of the tokens, float32 [length], on the host.

        Single tokens where no sentence has to do with the query by its words, or where the prompt's token ids spell no text.
        """
        if not self._evident.any():
            return SingleTokens(scores, self._places)
        numbers = scores.numpy()
        found = sentence_scores(self._links, self._sentences, numbers)
        best = np.argsort(-found, kind="stable")
        return WholeSentences(best[self._evident[best]], self._sentences, numbers)


def joined(sentences: NDArray[np.int64], continuations: Sequence[tuple[range, range]]) -> NDArray[np.int64]:
    """The sentences, where the rest of one that the chunk before began has the number of its beginning.

    A colon or a line break may stand within a beginning, which belongs together all the same. Of a very long one, the rest is joined to the end.
    """
    if not continuations:
        return sentences
    sentences = sentences.copy()
    for begun, rest in continuations:
        known = sentences[begun.start : begun.stop]
        if (last := known.max(initial=-1)) >= 0:
            sentences[rest.start : rest.stop] = last
            if len(begun) <= LONG:
                known[known >= 0] = last
    return sentences
