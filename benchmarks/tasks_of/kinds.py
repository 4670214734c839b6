"""The kinds of tasks by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from .counting import common_word
from .names import Names
from .people import people
from .questions import Question
from .retrieval import one_needle, several_keys, several_queries, several_values
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
