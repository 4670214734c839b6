"""A bound for a request, on a tiny random model: the least ratio that is predicted to keep it, exact full prefill where none is, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibration import CHUNKS, SAMPLES, fresh

from cachetune_rag import CacheTune, ConfigError
from cachetune_rag.reuse.config import AUTO
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.choice import unsureness

MORE = [{"query": f"Which ship is number {n}?", "chunks": CHUNKS[n % 3 :] + CHUNKS[: n % 3]} for n in range(10)]
LADDER = (0.1, 0.2, 0.3, 0.5, 0.7)
REQUEST = SAMPLES[0]


def calibrated() -> CacheTune:
    engine = fresh()
    found = engine.calibrate(MORE, ratios=(0.0, *LADDER, 1.0), tokens=1, bound=100)
    assert found.predictor is not None
    assert found.predictor.ratios == LADDER
    return engine


@pytest.fixture(scope="module")
def engine() -> Iterator[CacheTune]:
    with calibrated() as made:
        yield made


def test_the_least_ratio_that_is_predicted_to_keep_the_bound_is_taken(engine: CacheTune) -> None:
    ladder = engine.prefill(**REQUEST, max_kl=0).report.prediction.ladder  # type: ignore[union-attr]
    assert [each.ratio for each in ladder] == list(LADDER)
    assert all(a.sign > b.sign and a.kl >= b.kl for a, b in itertools.pairwise(ladder))
    for each in ladder:
        least = next(r.ratio for r in ladder if r.kl <= each.kl)
        report = engine.prefill(**REQUEST, max_kl=each.kl).report
        assert report.ratio == report.prediction.ratio == least  # type: ignore[union-attr]
        least = next(r.ratio for r in ladder if r.top1 >= each.top1)
        assert engine.prefill(**REQUEST, min_top1=each.top1).report.ratio == least


def test_a_request_with_a_bound_is_read_as_with_the_ratio_that_it_takes(engine: CacheTune) -> None:
    bounded = engine.prefill(**REQUEST, max_kl=1e6)
    plain = engine.prefill(**REQUEST, ratio=LADDER[0])
    assert torch.equal(bounded.logits, plain.logits)
    assert bounded.report.recomputed == plain.report.recomputed > 0
    # One token more goes through all layers, for the sign.
    assert bounded.report.probed == plain.report.probed + engine.adapter.num_layers
    assert bounded.report.error_left == pytest.approx(plain.report.error_left, rel=1e-5)
    assert bounded.report.sign == bounded.report.prediction.taken.sign  # type: ignore[union-attr]
    assert plain.report.sign is None
    assert plain.report.prediction is None


def test_where_no_ratio_keeps_the_bound_the_logits_are_those_of_full_prefill(engine: CacheTune) -> None:
    state = engine.prefill(**REQUEST, max_kl=0)
    assert torch.equal(state.logits, engine.full_prefill(**REQUEST).logits)
    report = state.report
    assert (report.ratio, report.reused, report.full) == (1.0, 0, False)
    assert report.prediction is not None
    assert report.prediction.taken is None
    assert "full prefill, because even at r=0.7" in str(report)
    assert report.as_dict()["prediction"]["why"] == report.prediction.why


def test_answers_keep_a_bound_too(engine: CacheTune) -> None:
    exact = engine.generate(**REQUEST, reuse=False, max_new_tokens=3)
    answer = engine.generate(**REQUEST, max_kl=0, max_new_tokens=3)
    assert answer.token_ids == exact.token_ids
    assert answer.report.ratio == 1.0
    many = list(engine.generate_many([dict(REQUEST), {**REQUEST, "max_kl": 1e6}], max_kl=0, max_new_tokens=1))
    assert [each.report.ratio for each in many] == [1.0, LADDER[0]]
    assert engine.generate(**REQUEST, max_new_tokens=1).report.prediction is None


def test_later_engines_on_the_store_find_the_prediction(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine:
        engine.calibrate(MORE, ratios=LADDER[:2], tokens=1)
        found = engine.runtime.calibrations.predictor("auto")
    with fresh(tmp_path) as later:
        assert later.runtime.calibrations.predictor("auto") == found
        assert later.prefill(**REQUEST, max_kl=1e6).report.ratio == LADDER[0]
    with fresh(tmp_path, codec="int8") as other, pytest.raises(ConfigError, match="none was calibrated"):
        other.prefill(**REQUEST, max_kl=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_kl": -1}, "max_kl is -1: use nats, at least 0"),
        ({"max_kl": "0.1"}, "max_kl is '0.1'"),
        ({"max_kl": float("nan")}, "max_kl is nan"),
        ({"max_kl": True}, "max_kl is True"),
        ({"min_top1": 1.5}, "min_top1 is 1.5: use a probability from 0 to 1"),
        ({"min_top1": "most"}, "min_top1 is 'most'"),
        ({"max_kl": 1, "ratio": 0.3}, "ratio is 0.3, and max_kl finds the ratio itself"),
        ({"max_kl": 1, "min_top1": 1, "ratio": 0.3}, "max_kl and min_top1 finds"),
        ({"max_kl": 1, "selector": "frequency"}, "selector 'frequency' says nothing about the request"),
        ({"max_kl": 1, "selector": "nope"}, "unknown selector 'nope'"),
        ({"max_kl": 1, "selector": "probe"}, "none was calibrated for selector 'probe'"),
    ],
)
def test_a_bound_that_cannot_be_kept_is_refused(engine: CacheTune, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.prefill(**REQUEST, **arguments)
    with pytest.raises(ConfigError, match=message):
        engine.generate(**REQUEST, **arguments)


def test_a_store_without_calibration_names_the_command() -> None:
    with fresh() as engine, pytest.raises(ConfigError, match="cachetune calibrate PROMPTS --model MODEL --store STORE"):
        engine.generate(**REQUEST, min_top1=0.9)


def test_full_prefill_that_is_asked_for_needs_no_calibration() -> None:
    with fresh() as engine:
        assert engine.generate(**REQUEST, reuse=False, max_kl=0.01, max_new_tokens=1).report.full
        with pytest.raises(ConfigError, match="max_kl is -1"):
            engine.generate(**REQUEST, reuse=False, max_kl=-1)


def test_too_few_prompts_predict_nothing() -> None:
    with fresh() as engine:
        assert engine.calibrate(MORE[:9], ratios=[0.5], tokens=1).predictor is None
        with pytest.raises(ConfigError, match="with 10 prompts of your own or more"):
            engine.prefill(**REQUEST, max_kl=1)


def test_a_damaged_prediction_is_left_out(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    key = engine.runtime.calibrations.key("probe")
    engine.profiles.save("calibration", key, {"ratio": 0.2, "predictor": {"ratios": [0.1], "signs": "x"}})
    with pytest.raises(ConfigError, match="none was calibrated"):
        engine.prefill(**REQUEST, selector="probe", max_kl=1)
    assert "Calibrate again" in caplog.text
    assert engine.prefill(**REQUEST, selector="probe").report.ratio == 0.2


def test_a_prediction_of_another_revision_of_the_selector_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with calibrated() as engine:
        key = engine.runtime.calibrations.key(AUTO.selector)
        content = engine.profiles.load("calibration", key)
        assert content is not None
        now = content.pop("selector_revision")
        assert now == get_selector(AUTO.selector).revision > 1
        content["ratio"] = 0.2
        for other in ({}, {"selector_revision": now + 1}, {"selector_revision": "x"}):
            engine.profiles.save("calibration", key, content | other)
            with pytest.raises(ConfigError, match="none was calibrated for selector 'expected_error' as it is now"):
                engine.prefill(**REQUEST, max_kl=1e6)
            assert engine.prefill(**REQUEST).report.ratio == engine.calibrated_ratio() == 0.2
        told = [each.getMessage() for each in caplog.records if "revision" in each.getMessage()]
        assert len(told) == 1
        assert "Calibrate again" in told[0]
        engine.profiles.save("calibration", key, content | {"selector_revision": now})
        assert engine.prefill(**REQUEST, max_kl=1e6).report.ratio == LADDER[0]


def test_every_request_says_what_error_it_leaves(engine: CacheTune) -> None:
    left = [engine.prefill(**REQUEST, ratio=ratio).report.error_left for ratio in LADDER]
    assert all(a > b > 0 for a, b in itertools.pairwise(left))  # type: ignore[operator]
    assert engine.prefill(**REQUEST, ratio=1).report.error_left is None
    assert engine.prefill(**REQUEST, selector="frequency", ratio=0.3).report.error_left is None
    assert AUTO.selector != "frequency"


def test_the_sign_is_the_error_left_times_the_entropy_with_nothing_recomputed(engine: CacheTune) -> None:
    report = engine.prefill(**REQUEST, max_kl=1e6).report
    unsure = unsureness(engine.prefill(**REQUEST, ratio=0).logits[0])
    assert report.sign == pytest.approx(report.error_left * unsure, rel=1e-4)  # type: ignore[operator]
    ladder = report.prediction.ladder  # type: ignore[union-attr]
    left = [engine.prefill(**REQUEST, ratio=ratio).report.error_left for ratio in LADDER]
    assert [each.sign for each in ladder] == pytest.approx([error * unsure for error in left], rel=1e-3)  # type: ignore[operator]


def test_a_shallow_probe_gives_the_same_entropy() -> None:
    names = ("expected_error", "expected_error_early")
    with fresh() as engine:
        signs = {}
        for name in names:
            engine.calibrate(MORE, ratios=[0.5], tokens=1, selector=name)
            report = engine.prefill(**REQUEST, selector=name, max_kl=1e6).report
            signs[name] = report.sign / report.error_left  # type: ignore[operator]
        assert signs[names[0]] == pytest.approx(signs[names[1]], rel=1e-4)
