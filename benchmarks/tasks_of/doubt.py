"""What it would bring to read a prompt again with full prefill as soon as the model is not sure of a token of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

from fidelity.measures import Estimate, ratio_of_sums
from fidelity.rows import Row

BOUNDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Least probabilities of the likeliest token that are compared."""


@dataclass(frozen=True)
class ReadAgain:
    """Reuse with a bound for how sure the model is of its tokens.

    Attributes:
        prompts: how many.
        again: the share of prompts that are read again.
        kept: the share of full prefill's right answers that are right then, with its interval. An answer that had parted from full prefill's before the
            model was unsure counts as lost, since what follows then was not measured.
        most: the same share if all of these were right.
        chance: the same share if as many prompts, drawn at random, were read with full prefill, whatever the model is sure of.
        compute: the mean share of full prefill's compute that a prompt takes, with both readings.
    """

    prompts: int
    again: float
    kept: Estimate
    most: float
    chance: float
    compute: float


def measured(row: Row) -> bool:
    """Whether a row has what is needed. Rows of earlier runs don't."""
    return "sure_by_token" in row


def first_unsure(row: Row, bound: float, tokens: int | None = None) -> int | None:
    """The number of the answer's first token that the model is less sure of than a bound; None if there is none.

    Args:
        row: of a setting.
        bound: the least probability of the likeliest token.
        tokens: how many of the first tokens are looked at; None: all.
    """
    return next((number for number, sure in enumerate(row["sure_by_token"][:tokens]) if sure < bound), None)


def read_again(pairs: Sequence[tuple[Row, Row]], bound: float, tokens: int | None = None) -> ReadAgain:
    """What is kept and spent with a bound, by rows of full prefill and of a setting on the same prompts; see `first_unsure`."""
    least, most, again, compute = [], [], 0, 0.0
    for full, row in pairs:
        unsure = first_unsure(row, bound, tokens)
        again += unsure is not None
        compute += row["compute"] + (unsure is not None)
        # Up to there the two said the same, so full prefill goes on with its own answer.
        its_own = unsure is not None and unsure <= row["same_tokens"]
        parted = unsure is not None and not its_own
        least.append(full["right"] and (its_own or (row["right"] and not parted)))
        most.append(full["right"] and (its_own or parted or row["right"]))
    right = [full["right"] for full, _ in pairs]
    plain = [full["right"] and row["right"] for full, row in pairs]
    best, without = (sum(kept) / sum(right) if any(right) else nan for kept in (most, plain))
    drawn = again / len(pairs)
    chance = without + (1 - without) * drawn
    return ReadAgain(len(pairs), drawn, ratio_of_sums(least, right), best, chance, compute / len(pairs))


def told_apart(pairs: Sequence[tuple[Row, Row]], tokens: int | None = None) -> float:
    """How well the least sure token tells answers that are lost from those that are kept: the share of pairs of a lost and a kept one of which
    the lost one's is the smaller (the area under the ROC curve). NaN if there are no lost or no kept ones.
    """
    least = [(min(row["sure_by_token"][:tokens]), row["right"]) for full, row in pairs if full["right"]]
    lost, kept = ([sure for sure, right in least if right == wanted] for wanted in (False, True))
    if not lost or not kept:
        return nan
    return sum((a < b) + (a == b) / 2 for a in lost for b in kept) / (len(lost) * len(kept))
