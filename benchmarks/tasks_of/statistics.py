"""Right answers of two settings on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from fidelity.measures import Estimate, mean, ratio_of_sums


@dataclass(frozen=True)
class Paired:
    """Full prefill and a setting on the same prompts.

    Attributes:
        prompts: how many.
        full, right: how many each answered right.
        lost: right with full prefill only.
        gained: right under the setting only.
        kept: the share of full prefill's right answers that are right under the setting too, with its interval.
        accuracy: the share of prompts that the setting answers right, with its interval.
        p: McNemar's exact test: how likely it is that `lost` and `gained` are at least this far apart, if each prompt on which the two differ
            were as likely to be the one as the other.
    """

    prompts: int
    full: int
    right: int
    lost: int
    gained: int
    kept: Estimate
    accuracy: Estimate
    p: float


def paired(full: Sequence[bool], setting: Sequence[bool]) -> Paired:
    """Compare the right answers of full prefill and of a setting, prompt by prompt."""
    if len(full) != len(setting):
        raise ValueError(
            f"{len(full)} answers of full prefill and {len(setting)} of the setting: give both for each prompt."
        )
    both = [a and b for a, b in zip(full, setting, strict=True)]
    lost, gained = sum(full) - sum(both), sum(setting) - sum(both)
    return Paired(
        len(full),
        sum(full),
        sum(setting),
        lost,
        gained,
        ratio_of_sums(both, full),
        mean(setting),
        mcnemar(lost, gained),
    )


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided p of McNemar's exact test (the binomial one, McNemar 1947): of what two settings differ on, each half is as likely."""
    count = lost + gained
    tail = sum(comb(count, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**count)
