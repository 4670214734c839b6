"""How far reuse is from full prefill on a continuation, and how certain a mean over records is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Numbers = NDArray[np.float64]
DRAWS = 10_000
"""How many bootstrap samples are drawn."""
_DRAWN_AT_ONCE = 1 << 20
"""How many records are drawn at once, over several samples: thousands of records would take gigabytes otherwise."""


@dataclass(frozen=True)
class Distance:
    """How far the distributions under reuse are from those of full prefill, over the tokens of a target.

    Attributes:
        kl: mean over target tokens of KL(full || reuse), in nats.
        top1: share of target tokens at which both find the same token the likeliest.
        top1_first: the same at the first target token: 0 or 1.
        nll: mean negative log-likelihood of the target under reuse, in nats.
        nll_difference: `nll` minus that of full prefill.
    """

    kl: float
    top1: float
    top1_first: int
    nll: float
    nll_difference: float


def distance(full: Tensor, reuse: Tensor, target: Sequence[int]) -> Distance:
    """Compare logits [target tokens, vocab], of which row i predicts token i of the target. Calculated in float64."""
    if full.shape != reuse.shape or full.shape[0] != len(target):
        raise ValueError(f"logits {tuple(full.shape)} and {tuple(reuse.shape)} don't fit {len(target)} target tokens.")
    p, q = (logits.double().log_softmax(-1) for logits in (full, reuse))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    same = p.argmax(-1) == q.argmax(-1)
    ids = torch.tensor(list(target), device=full.device)[:, None]
    nll, reference = (-logs.gather(1, ids).mean().item() for logs in (q, p))
    return Distance(kl.item(), same.double().mean().item(), int(same[0]), nll, nll - reference)


# -- answers ----------------------------------------------------------------------------------------------------------


def normalise(answer: str) -> str:
    """An answer in SQuAD's normal form (Rajpurkar et al. 2016): lower case, without punctuation, articles and extra spaces."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def behind(answer: str, mark: str | None) -> str:
    """What an answer says behind its last such mark: where steps are told before it, the answer alone. Without a mark, all of it."""
    return answer.rpartition(mark)[2].strip() if mark else answer


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones, in normal form."""
    return float(any(normalise(answer) == normalise(a) for a in accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The largest F1 of words with one of the accepted answers, in normal form."""
    return max((_f1(normalise(answer).split(), normalise(a).split()) for a in accepted), default=0.0)


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


# -- means over records -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure over records, and its 95% bootstrap interval. NaN where it isn't defined."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean over records."""
    return ratio_of_sums(values, np.ones(len(values)), seed)


def share_closed(kl: Sequence[float], kl_nothing: Sequence[float], seed: int = 0) -> Estimate:
    """The share of the KL gap that is closed: 1 - sum of KL(r) / sum of KL(0) over records."""
    ratio = ratio_of_sums(kl, kl_nothing, seed)
    return Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low)


def ratio_of_sums(above: ArrayLike, below: ArrayLike, seed: int = 0) -> Estimate:
    """sum(above) / sum(below). For the interval, records are drawn with replacement, with both of their numbers."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    if len(above) == 0 or below.sum() == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    sums = _drawn_sums(np.stack((above, below), axis=1), seed)
    return _with_interval(float(above.sum() / below.sum()), _ratio(sums[:, 0], sums[:, 1]))


def difference_of_shares(
    kl: Sequence[float],
    kl_nothing: Sequence[float],
    other: Sequence[float],
    other_nothing: Sequence[float],
    seed: int = 0,
) -> Estimate:
    """The share that is closed (`share_closed`) minus another one of the same records. For the interval, they are drawn with all their numbers."""
    numbers = np.stack([np.asarray(each, float) for each in (kl, kl_nothing, other, other_nothing)], axis=1)
    whole = numbers.sum(0)
    if len(numbers) == 0 or whole[1] == 0 or whole[3] == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    sums = _drawn_sums(numbers, seed)
    drawn = _ratio(sums[:, 2], sums[:, 3]) - _ratio(sums[:, 0], sums[:, 1])
    return _with_interval(float(whole[2] / whole[3] - whole[0] / whole[1]), drawn)


def _drawn_sums(numbers: Numbers, seed: int) -> Numbers:
    """Sums over the records [records, figures] of each bootstrap sample: [samples, figures]."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // len(numbers))
    samples = []
    for start in range(0, DRAWS, at_once):
        drawn = rng.integers(0, len(numbers), (min(at_once, DRAWS - start), len(numbers)))
        samples.append(numbers[drawn].sum(1))
    return np.concatenate(samples)


def _ratio(above: Numbers, below: Numbers) -> Numbers:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Numbers = above / below
    return ratio


def _with_interval(value: float, samples: Numbers) -> Estimate:
    low, high = np.nanpercentile(samples, (2.5, 97.5))
    return Estimate(value, float(low), float(high))
