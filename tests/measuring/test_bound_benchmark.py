"""The study of bounds: its rank correlation, what requests with a bound are held against, and one record measured with a tiny model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import llama, tokenizer

from cachetune_rag.selection import get_selector
from cachetune_rag.selection.probing import ProbingSelector
from cachetune_rag.selection.registry import _SELECTORS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from fidelity import bounds
from fidelity.bounds import SIGN, Request, kept, misses_at, rank_correlation, requests_of
from fidelity.evaluate import Engines
from fidelity.records import Dataset, Record
from fidelity.signs import NotingSelector, SignStudy

RATIOS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)


def made(noise: float, count: int = 120, spread: float = 2.0) -> list[Request]:
    """Requests whose KL is the square of their sign, but for noise."""
    rng = np.random.default_rng(0)
    found = []
    for hard, luck in zip(rng.normal(0, spread, count), rng.normal(0, noise, count), strict=True):
        signs = tuple(float(np.exp(hard / 2) * (1 - ratio) / ratio**0.5) for ratio in RATIOS)
        kl = tuple(float(0.001 * sign**2 * np.exp(luck)) for sign in signs)
        found.append(
            Request(RATIOS, kl, kl, tuple(each < 0.1 for each in kl), {SIGN: signs, "none": tuple(signs[::-1])})
        )
    return found


@pytest.fixture(autouse=True)
def few_divisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DIVISIONS", 2)


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    # 1 - 6 * sum of d^2 / (n (n^2 - 1)), which holds without equal values
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_a_sign_that_says_all_beats_a_fixed_ratio_and_one_that_says_little_does_not() -> None:
    sure, unsure = kept(made(0.05), max_kl=0.02), kept(made(2.0, spread=0.1), max_kl=0.02)
    assert sure.over < 0.1
    assert sure.against is not None
    assert sure.against.value < 0.5
    assert sure.needed > sure.ratio
    assert unsure.over > 0.5 * unsure.fixed


def test_a_bound_that_nothing_keeps_spends_everything() -> None:
    found = kept(made(0.5), max_kl=0)
    assert (found.over, found.ratio, found.full) == pytest.approx((0, 1, 1))


def test_ratios_between_measured_ones_are_interpolated() -> None:
    request = replace(
        made(0.0, 1)[0], kl=(0.08, 0.04, 0.02, 0.01, 0.005, 0.001), same=(False, True, True, True, True, True)
    )
    assert misses_at(request, 0.05, 0.03) == 1  # as measured
    assert misses_at(request, 0.1, 0.03) == 0
    assert misses_at(request, 0.07, 0.03) == misses_at(request, 0.072, 0.0278) == 0
    assert misses_at(request, 0.07, 0.028) == 1
    assert misses_at(request, 1, 0.0001) == 0
    assert 0 < misses_at(request, 0.03, None) < 1


def test_a_records_rows_make_a_request_with_the_sign_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    noting = NotingSelector(_probing("expected_error"))
    monkeypatch.setitem(_SELECTORS, noting.name, noting)
    lead = "The ships came by in winter, and the lamp was lit at four. " * 40
    record = Record("r", "made", ("The lighthouse was built in 1871.", "Its lamp burned oil."), "Who built it?", ())
    dataset = Dataset("made", (record,), (lead,) * 4, "Read.")
    engines = Engines(llama(max_positions=8192), tokenizer())
    try:
        study = SignStudy(engines, dataset, noting, "expected_error", [0.2, 0.5])
        rows = list(study.run(record, {}))
        assert [row["ratio"] for row in rows] == [0.0, 0.2, 0.5]
        (request,) = requests_of(rows)["made"]
        assert request.ratios == (0.2, 0.5)
        assert request.sign[0] > request.sign[1] > 0
        engine = engines.get(dataset, "auto", "exact")
        engine.precompute(record.chunks)
        # The sign is that of a request with a bound.
        engine.calibrate([{"query": f"{n}?", "chunks": record.chunks} for n in range(12)], ratios=[0.2, 0.5], tokens=1)
        prompt = dataset.prompt(engine.prompts, record)
        ladder = engine.prefill(prompt=prompt, max_kl=1e9).report.prediction.ladder  # type: ignore[union-attr]
        assert request.sign == pytest.approx([each.sign for each in ladder], rel=1e-3)
    finally:
        engines.close()


def _probing(name: str) -> ProbingSelector:
    selector = get_selector(name)
    assert isinstance(selector, ProbingSelector)
    return selector
