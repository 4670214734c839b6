"""The kinds of tasks by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import chain

from .counting import WORDS, common_word
from .names import Names, all_names
from .people import GIVEN, TRADES, people
from .questions import Question
from .retrieval import SITES, one_needle, several_keys, several_queries, several_values
from .tracking import tracking

KINDS: dict[str, Callable[[random.Random, Names, bool], Question]] = {
    "one_needle": one_needle,
    "several_keys": several_keys,
    "several_values": several_values,
    "several_queries": several_queries,
    "tracking_2": partial(tracking, 2),
    "tracking_3": partial(tracking, 3),
    "tracking_4": partial(tracking, 4),
    "common_word": common_word,
    "people": people,
}
"""Each makes a question: what its names are drawn with, names that are not taken yet, and whether there are near-duplicates."""


def planted_words() -> frozenset[str]:
    """Every name and every word that is a value or is told apart from another one, in lower case."""
    words = chain(all_names(), SITES, TRADES, *WORDS, *GIVEN)
    return frozenset(word.casefold() for word in words)
