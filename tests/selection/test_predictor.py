"""What predicts a request's divergence: monotone, conservative, the same after JSON; and the least ratio that it lets a request take."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from cachetune_rag.report import Prediction
from cachetune_rag.selection.bound import Bound, SignOnly
from cachetune_rag.selection.choice import unsureness
from cachetune_rag.selection.predictor import FEWEST_PROMPTS, Observation, Predictor

RATIOS = (0.05, 0.15, 0.5)


def observed(count: int = 400, seed: int = 0) -> list[Observation]:
    """KL grows with the square of the sign, but for noise; the first token is ever less often the same."""
    rng = np.random.default_rng(seed)
    signs = rng.uniform(0.1, 4, count)
    noise = np.exp(rng.normal(0, 0.7, count))
    same = rng.uniform(0, 1, count) > 0.1 * signs
    return [
        Observation(i // 4, float(x), float(0.01 * x * x * n), bool(each))
        for i, (x, n, each) in enumerate(zip(signs, noise, same, strict=True))
    ]


def fitted() -> Predictor:
    made = Predictor.fit(RATIOS, observed())
    assert made is not None
    return made


def line(kl: tuple[float, ...], top1: tuple[float, ...] = (1.0, 0.8)) -> Predictor:
    """KL and agreement that change evenly from a sign of 0 to one of 1."""
    return Predictor(RATIOS, (0.0, 1.0), kl, top1)


def test_a_larger_sign_never_means_less_kl_nor_more_agreement() -> None:
    predictor = fitted()
    found = [predictor.predict([sign] * 3)[0] for sign in np.linspace(0, 12, 200)]
    assert all(a.kl <= b.kl and a.top1 >= b.top1 for a, b in itertools.pairwise(found))
    assert found[0].kl < found[100].kl < found[-1].kl
    assert found[0].top1 > found[-1].top1 >= 0


def test_most_new_requests_keep_what_was_predicted() -> None:
    predictor = fitted()
    new = observed(2000, seed=1)
    found = [predictor.predict([each.sign] * 3)[0] for each in new]
    kept = np.mean([each.kl <= said.kl for each, said in zip(new, found, strict=True)])
    assert 0.86 <= kept <= 0.96
    for least in (0.6, 0.7, 0.8):
        agreed = [each.same for each, said in zip(new, found, strict=True) if said.top1 >= least]
        assert len(agreed) > 100
        assert np.mean(agreed) >= least


def test_beyond_what_was_seen_kl_grows_with_the_square() -> None:
    said = line((0.0, 0.1)).predict([1.0, 2.0, 10.0])
    assert [each.kl for each in said] == pytest.approx([0.1, 0.4, 10.0])
    assert [each.top1 for each in said] == pytest.approx([0.8, 0.6, 0.0])


def test_too_few_prompts_predict_nothing() -> None:
    assert Predictor.fit(RATIOS, observed(4 * FEWEST_PROMPTS - 4)) is None  # four observations of each
    assert Predictor.fit((), observed(4 * FEWEST_PROMPTS)) is None
    assert Predictor.fit(RATIOS, observed(4 * FEWEST_PROMPTS)) is not None
    assert Predictor.fit([0.3], [Observation(n, n, 1.0, True) for n in range(FEWEST_PROMPTS)]) is not None


def test_below_the_smallest_sign_that_was_seen_nothing_is_made_up() -> None:
    wrong = [Observation(n, 0.001 * (n + 1), 3.0, False) for n in range(40)]
    predictor = Predictor.fit(RATIOS, wrong)
    assert predictor is not None
    (none, *_) = predictor.predict([0.0] * 3)
    assert (none.kl, none.top1) == (3.0, pytest.approx(0))
    assert Bound(0, None, predictor).find([0.0] * 3)[0] == Bound(None, 1.0, predictor).find([0.0] * 3)[0] == 1.0


def test_no_more_agreement_is_granted_than_so_many_prompts_can_show() -> None:
    right = [Observation(n // 6, 0.01 * n, 0.0, True) for n in range(120)]  # 20 prompts at 6 ratios
    predictor = Predictor.fit(RATIOS, right)
    assert predictor is not None
    most = max(predictor.predict([sign] * 3)[0].top1 for sign in (0.0, 0.1, 0.5, 1.2))
    assert 5 / 6 <= most <= 6 / 7  # a figure is taken of 30 observations, of 5 or 6 prompts
    assert Bound(None, 0.9, predictor).find([0.0] * 3)[0] == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.002, 0.02])
def test_what_is_taken_for_a_bound_keeps_it_whatever_the_bound(floor: float) -> None:
    """Also strict ones, and where some KL is left that the sign says nothing of."""

    def drawn(seed: int, count: int) -> list[Observation]:
        rng = np.random.default_rng(seed)
        signs, noise = rng.uniform(0, 4, count), np.exp(rng.normal(0, 0.7, count))
        return [
            Observation(i, float(x), float((floor + 0.02 * x * x) * n), True)
            for i, (x, n) in enumerate(zip(signs, noise, strict=True))
        ]

    predictor = Predictor.fit([0.5], drawn(0, 400))
    assert predictor is not None
    for max_kl in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        bound = Bound(max_kl, None, predictor)
        taken = [each.kl for each in drawn(1, 1000) if bound.find([each.sign])[0] < 1]
        assert not taken or np.mean(np.array(taken) <= max_kl) >= 0.85


def test_it_is_the_same_after_json() -> None:
    predictor = fitted()
    assert Predictor.from_dict(json.loads(json.dumps(predictor.as_dict()))) == predictor


@pytest.mark.parametrize(
    "change",
    [
        {"kl": [0.2, 0.1]}, {"top1": [0.5, 0.9]}, {"signs": [1.0, 0.0]}, {"kl": [0.1]}, {"ratios": []}, {"kl": ["a", "b"]},
        {"kl": [0.1, float("nan")]}, {"signs": [], "kl": [], "top1": []}, {"kl": None},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    saved = {**line((0.0, 0.1)).as_dict(), **change}
    with pytest.raises((TypeError, ValueError)):
        Predictor.from_dict(saved)


@pytest.mark.parametrize(
    ("max_kl", "min_top1", "ratio"),
    [
        (0.5, None, 0.05),  # even the least ratio keeps it
        (0.05, None, 0.15),
        (0.02, None, 0.5),
        (0.01, None, 1.0),  # none does
        (None, 0.85, 0.05),
        (None, 0.95, 0.5),
        (None, 0.99, 1.0),
        (0.05, 0.95, 0.5),  # both have to be kept
        (0.02, 0.85, 0.5),
    ],
)
def test_the_least_ratio_that_keeps_the_bound_is_taken(
    max_kl: float | None, min_top1: float | None, ratio: float
) -> None:
    bound = Bound(max_kl, min_top1, line((0.0, 0.1)))
    taken, found = bound.find([0.7, 0.4, 0.15])  # KL 0.07, 0.04, 0.015; agreement 0.86, 0.92, 0.97
    assert taken == found.ratio == ratio
    assert [each.ratio for each in found.ladder] == list(RATIOS)
    assert (found.taken is None) == (ratio == 1)
    assert ("full prefill" in found.why) == (ratio == 1)


def test_the_reason_names_what_was_predicted_and_what_was_asked_for() -> None:
    found: Prediction = Bound(0.05, 0.9, line((0.0, 0.1))).find([0.7, 0.4, 0.15])[1]
    assert (
        found.why
        == "predicted KL 0.04, top-1 agreement 0.92; least ratio for KL at most 0.05 and top-1 agreement at least 0.9"
    )


def test_a_given_ratio_is_taken_whatever_the_sign() -> None:
    assert SignOnly().find([17.0]) == (None, None)
    assert not SignOnly().ratios


def test_unsureness_is_the_entropy_of_the_next_token() -> None:
    assert unsureness(torch.zeros(8)) == pytest.approx(math.log(8))
    assert unsureness(torch.tensor([100.0, 0.0, 0.0])) == pytest.approx(0, abs=1e-6)
    assert unsureness(torch.tensor([1.0, 1.0, float("-inf")])) == pytest.approx(math.log(2))
