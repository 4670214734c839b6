"""Calibration on a tiny random model: exact where it must be, within its bound, and found again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import family, model_of
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Calibration, ConfigError, PromptTooLongError
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.measuring.calibration.calibrator import RATIOS, CalibrationProgress
from cachetune_rag.measuring.calibration.result import RatioFigures, choose
from cachetune_rag.measuring.divergence import Divergence, kl_divergence
from cachetune_rag.measuring.teacher import rewind, teacher_forced
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.family.taps import StopForward
from cachetune_rag.reuse.config import AUTO

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
]
SAMPLES = [
    {"query": "How many steps are there?", "chunks": CHUNKS},
    {"query": "Who built it?", "chunks": CHUNKS[::-1]},
    {"query": "What burned?", "chunks": CHUNKS[1:], "prefix": "Answer."},
]
FEW = (0.0, 0.3, 1.0)


def fresh(store: Path | None = None, seed: int = 0, **options: Any) -> CacheTune:
    return CacheTune(llama(seed), tokenizer(), store, **options)


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with fresh() as made:
        yield made


def plain_kl(full: torch.Tensor, reuse: torch.Tensor) -> float:
    p, q = (np.float64(1) * logits.numpy()[0] for logits in (full, reuse))
    log_p, log_q = (x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


# -- the maths --------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    full, reuse = torch.randn(1, 50) * 3, torch.randn(1, 50) * 3
    assert float(kl_divergence(full, reuse)) == pytest.approx(plain_kl(full, reuse), rel=1e-5)
    assert kl_divergence(full, full).tolist() == [0.0]
    assert kl_divergence(full, full + 5).tolist() == pytest.approx([0.0], abs=1e-5)


def test_tokens_that_are_ruled_out_count_nothing() -> None:
    ruled_out = torch.tensor([[1.0, 2.0, float("-inf")]])
    assert float(kl_divergence(ruled_out, torch.tensor([[1.0, 2.0, -1e4]]))) == pytest.approx(0, abs=1e-6)


def test_divergence_over_blocks_is_that_over_all_tokens() -> None:
    torch.manual_seed(0)
    full, reuse = torch.randn(7, 9), torch.randn(7, 9)
    found = Divergence.of(full.split(3), reuse.split(3))
    assert found.kl == pytest.approx(kl_divergence(full, reuse).tolist())
    assert found.same == tuple((full.argmax(-1) == reuse.argmax(-1)).tolist())
    assert found.mean_kl == pytest.approx(sum(found.kl) / 7)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss", "phi"])
def test_teacher_forcing_gives_the_logits_of_decoding_step_by_step(name: str) -> None:
    adapter = ModelAdapter(model_of(name))
    ids = torch.arange(40) % 150 + 5
    target = [7, 50, 3, 99, 12, 60, 8, 21]
    logits, cache = adapter.full_forward(ids)
    steps = [logits, *(adapter.forward(torch.tensor([t]), cache) for t in target[:-1])]
    assert cache.get_seq_length() == 47
    rewind(cache, 40)
    forced = torch.cat(list(teacher_forced(adapter, logits, cache, target, block=3)))
    assert float((forced - torch.cat(steps)).abs().max()) <= max(family(name).tolerance, 1e-5)


def test_a_forward_gives_way_between_layers_and_its_cache_can_be_used_again() -> None:
    adapter = ModelAdapter(llama(layers=3))
    ids, target = torch.arange(20) + 5, [9, 8, 7, 6]
    logits, cache = adapter.full_forward(ids)
    expected = torch.cat(list(teacher_forced(adapter, logits, cache, target)))
    rewind(cache, 20)
    answers = iter([False, False, True])
    with pytest.raises(StopForward), adapter.interruptible(lambda: next(answers)):
        list(teacher_forced(adapter, logits, cache, target))
    assert [layer.get_seq_length() for layer in cache.layers] == [23, 23, 20]
    rewind(cache, 20)
    assert torch.equal(torch.cat(list(teacher_forced(adapter, logits, cache, target))), expected)


def figures(*within: bool) -> list[RatioFigures]:
    return [RatioFigures(i / 10, 0, 0, 1, 1, 0, ok) for i, ok in enumerate(within)]


@pytest.mark.parametrize(
    ("within", "chosen"),
    [
        ((False, False, True, True), 0.2),
        ((True, True, True), 0.0),
        ((False, True, False, True), 0.3),  # 0.1 is a lucky dip
        ((True, True, False), None),
        ((False,), None),
    ],
)
def test_the_choice_keeps_the_bound_with_every_larger_ratio(within: tuple[bool, ...], chosen: float | None) -> None:
    assert choose(figures(*within)) == chosen
    assert choose(figures(*within)[::-1]) == chosen


# -- what is measured -------------------------------------------------------------------------------------------------


def test_computing_everything_is_exact_and_less_is_not(engine: CacheTune) -> None:
    found = engine.calibrate(SAMPLES, ratios=FEW, tokens=8)
    nothing, some, everything = found.figures
    assert (everything.kl, everything.kl_worst, everything.top1, everything.top1_worst) == (0.0, 0.0, 1.0, 1.0)
    assert nothing.kl_worst >= nothing.kl > 1e-3
    assert some.kl > 1e-3
    assert [f.ratio for f in found.figures] == list(FEW)
    assert (found.samples, found.selector, found.measure, found.bound) == (3, AUTO.selector, "kl", 0.05)
    assert 3 <= found.target_tokens <= 24


def test_figures_are_those_of_plain_prefills(engine: CacheTune) -> None:
    found = engine.calibrate(SAMPLES, ratios=[0.3], tokens=1, selector="frequency").figures[0]
    kl, same = [], []
    for sample in SAMPLES:
        full = engine.full_prefill(**sample).logits
        reuse = engine.prefill(**sample, ratio=0.3, selector="frequency").logits
        kl.append(plain_kl(full, reuse))
        same.append(bool(full.argmax() == reuse.argmax()))
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl_worst == pytest.approx(max(kl), rel=1e-4)
    assert (found.top1, found.top1_worst) == (pytest.approx(np.mean(same)), min(same))
    assert found.statistic == found.kl


def test_the_continuation_is_full_prefills_greedy_answer(engine: CacheTune) -> None:
    expected = sum(
        engine.generate(**s, reuse=False, do_sample=False, max_new_tokens=12).completion_tokens for s in SAMPLES
    )
    assert engine.calibrate(SAMPLES, ratios=[1.0], tokens=12).target_tokens == expected


def test_bound_met_and_not_met(engine: CacheTune) -> None:
    strict = engine.calibrate(SAMPLES, bound=0, ratios=(0, 0.3), tokens=4)
    assert (strict.met, strict.ratio) == (False, 1.0)
    exact = engine.calibrate(SAMPLES, bound=0, ratios=FEW, tokens=4)
    assert (exact.met, exact.ratio) == (False, 1.0)
    loose = engine.calibrate(SAMPLES, bound=100, ratios=FEW, tokens=4)
    assert (loose.met, loose.ratio) == (True, 0.0)
    middle = engine.calibrate(SAMPLES, bound=strict.figures[1].kl, ratios=(0, 0.3, 0.6), tokens=4)
    assert [f.within for f in middle.figures] == [f.kl <= middle.bound for f in middle.figures]
    assert middle.ratio == choose(middle.figures) or not middle.met


@pytest.mark.parametrize("quantile", [None, 0.3, 0.6, 1.0])
def test_the_statistic_is_a_mean_or_what_a_share_of_samples_keeps(engine: CacheTune, quantile: float | None) -> None:
    each = [engine.calibrate([s], ratios=[0.1], tokens=4).figures[0] for s in SAMPLES]
    kl, top1 = sorted(f.kl for f in each), sorted((f.top1 for f in each), reverse=True)
    place = None if quantile is None else math.ceil(quantile * 3) - 1
    by_kl = engine.calibrate(SAMPLES, ratios=[0.1], tokens=4, quantile=quantile).figures[0].statistic
    by_top1 = engine.calibrate(SAMPLES, ratios=[0.1], tokens=4, quantile=quantile, measure="top1").figures[0].statistic
    assert by_kl == pytest.approx(np.mean(kl) if place is None else kl[place])
    assert by_top1 == pytest.approx(np.mean(top1) if place is None else top1[place])


def test_top1_is_held_against_its_bound_from_above(engine: CacheTune) -> None:
    found = engine.calibrate(SAMPLES, measure="top1", bound=1.0, ratios=FEW, tokens=8)
    assert [f.within for f in found.figures] == [f.top1 == 1.0 for f in found.figures]
    assert engine.calibrate(SAMPLES, measure="top1", bound=0, ratios=FEW, tokens=8).ratio == 0.0


def test_missing_chunks_are_precomputed_first(engine: CacheTune) -> None:
    assert engine.stats().store.host.chunks == 0
    found = engine.calibrate(SAMPLES, ratios=[0.0], tokens=2)
    assert engine.stats().store.host.chunks == len(CHUNKS)
    assert found.figures[0].kl > 1e-3
    assert engine.prefill(**SAMPLES[0]).report.missed == 0


def test_chunks_stored_before_lead_ins_were_chosen_are_stored_again_behind_them(engine: CacheTune) -> None:
    engine.precompute(CHUNKS)
    before = engine.namespace
    more = [f"{i} ships came by that winter, and {i * i} gulls. " * 6 for i in range(6)]
    found = engine.calibrate([*SAMPLES, {"query": "Gulls?", "chunks": more}], bound=100, ratios=[0.25], tokens=2)
    assert engine.namespace != before
    assert engine.prefill(**SAMPLES[0]).report.missed == 0
    assert engine.calibrated_ratio() == found.ratio == 0.25


def test_it_counts_as_no_request_and_tells_how_far_it_is(engine: CacheTune) -> None:
    seen: list[CalibrationProgress] = []
    engine.calibrate(SAMPLES, ratios=FEW, tokens=2, progress=seen.append)
    assert engine.stats().requests == engine.stats().full_prefills == 0
    assert [p.done for p in seen] == list(range(1, 13))
    assert {p.total for p in seen} == {12}
    assert [p.sample for p in seen] == [1] * 4 + [2] * 4 + [3] * 4


def test_samples_may_be_objects_and_prompts(engine: CacheTune) -> None:
    sample = SAMPLES[0]
    forms = [sample, SimpleNamespace(**sample), engine.prompts.build(**sample)]
    found = [engine.calibrate([form], ratios=[0.3], tokens=4).figures for form in forms]
    assert found[1][0].kl == found[2][0].kl == pytest.approx(found[0][0].kl, rel=1e-4)


# -- what is kept -----------------------------------------------------------------------------------------------------


def ratio_of(engine: CacheTune, **options: Any) -> float:
    return engine.prefill(**SAMPLES[0], **options).report.ratio


def test_auto_means_the_calibrated_ratio_in_this_engine_and_later_ones(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine:
        assert ratio_of(engine) == AUTO.ratio
        assert engine.calibrated_ratio() is None
        found = engine.calibrate(SAMPLES, bound=100, ratios=(0.25, 0.5), tokens=2)
        assert found.saved
        assert ratio_of(engine) == engine.calibrated_ratio() == found.ratio == 0.25
        assert engine.generate(**SAMPLES[0], max_new_tokens=1).report.ratio == 0.25
        assert ratio_of(engine, ratio=0.4) == 0.4
    with fresh(tmp_path) as later:
        assert ratio_of(later) == ratio_of(later, selector=AUTO.selector) == 0.25
        later.calibrate(SAMPLES, bound=0, ratios=(0.25, 0.5), tokens=2)
        assert ratio_of(later) == 1.0


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"codec": "int8"},
        {"tenant": "b"},
        {"lead_in": [1, 7]},
    ],
)
def test_another_model_codec_tenant_or_lead_in_does_not_see_it(tmp_path: Path, other: dict[str, Any]) -> None:
    with fresh(tmp_path) as engine:
        engine.calibrate(SAMPLES, bound=100, ratios=[0.25], tokens=2)
        assert ratio_of(engine, selector="frequency") == AUTO.ratio
    with fresh(tmp_path, **other) as engine:
        assert engine.calibrated_ratio() is None
        assert ratio_of(engine) == AUTO.ratio
    with fresh(tmp_path) as engine:
        assert engine.calibrated_ratio() == 0.25


def test_a_store_in_memory_keeps_it_as_long_as_the_engine(engine: CacheTune) -> None:
    found = engine.calibrate(SAMPLES, bound=100, ratios=[0.25], tokens=2)
    assert not found.saved
    assert ratio_of(engine) == 0.25
    with fresh() as other:
        assert ratio_of(other) == AUTO.ratio


def test_a_result_that_cannot_be_saved_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fresh(tmp_path) as engine:
        (tmp_path / "profiles").write_text("in the way")
        with caplog.at_level(logging.WARNING):
            found = engine.calibrate(SAMPLES, bound=100, ratios=[0.25], tokens=2)
        assert not found.saved
        assert "could not be saved" in caplog.text
        assert ratio_of(engine) == 0.25


@pytest.mark.parametrize("ratio", [1.5, -0.1, True, "0.2", None])
def test_a_saved_ratio_that_makes_no_sense_is_left_out(engine: CacheTune, ratio: Any) -> None:
    engine.profiles.save("calibration", engine.runtime.calibrations.key(AUTO.selector), {"ratio": ratio})
    assert engine.calibrated_ratio() is None
    assert ratio_of(engine) == AUTO.ratio


def test_chunks_of_another_codec_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fresh(tmp_path, codec="int8") as engine:
        engine.precompute(CHUNKS)
    with fresh(tmp_path) as engine, caplog.at_level(logging.WARNING):
        engine.calibrate(SAMPLES[:1], ratios=[0.5], tokens=2)
    assert "int8" in caplog.text


def test_the_result_is_json(engine: CacheTune) -> None:
    found = engine.calibrate(SAMPLES[:1], ratios=[0.5], tokens=2)
    content = engine.profiles.load("calibration", engine.runtime.calibrations.key(found.selector))
    assert content is not None
    assert {name: content[name] for name in ("ratio", "bound", "quantile", "samples")} == {
        "ratio": found.ratio, "bound": 0.05, "quantile": None, "samples": 1,
    }  # fmt: skip
    assert content["figures"] == list(found.as_dict()["figures"])
    assert isinstance(found, Calibration)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "kld"}, "measure is 'kld'"),
        ({"bound": -1}, "bound is -1"),
        ({"bound": float("nan")}, "bound is nan"),
        ({"bound": float("inf")}, "bound is inf"),
        ({"bound": "0.1"}, "bound is '0.1'"),
        ({"bound": 1.5, "measure": "top1"}, "bound is 1.5"),
        ({"selector": "nope"}, "unknown selector"),
        ({"selector": "none"}, "goes by no ratio"),
        ({"selector": "all"}, "goes by no ratio"),
        ({"ratios": []}, "ratios is"),
        ({"ratios": ["auto"]}, "ratios is"),
        ({"ratios": [0.1, 1.1]}, "ratio is 1.1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 5000}, "tokens is 5000"),
        ({"quantile": 0}, "quantile is 0"),
        ({"quantile": 1.1}, "quantile is 1.1"),
    ],
)
def test_arguments_out_of_range_are_refused(engine: CacheTune, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.calibrate(SAMPLES, **arguments)
    assert engine.stats().store.host.chunks == 0


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("a question", "sample 2: it is 'a question'"),
        ({"query": "x"}, "sample 2: it is"),
        ({"query": "x", "chunks": "y"}, "sample 2: it is"),
        ({"query": "x", "chunks": [3]}, "sample 2: "),
        ({"query": "x", "chunks": ["y"], "question": "x"}, "sample 2: it has the key 'question'"),
        ({"query": "x", "chunks": []}, "sample 2 has no chunks"),
        ({"query": "x", "chunks": [""]}, "sample 2 has no chunks"),
    ],
)
def test_an_unusable_sample_is_named_before_anything_is_computed(engine: CacheTune, sample: Any, message: str) -> None:
    with pytest.raises(CacheTuneError, match=message):
        engine.calibrate([SAMPLES[0], sample])
    assert engine.stats().store.host.chunks == 0


def test_no_samples_and_too_long_ones(engine: CacheTune) -> None:
    with pytest.raises(ConfigError, match="no samples"):
        engine.calibrate([])
    with pytest.raises(PromptTooLongError, match="sample 1: the prompt has"):
        engine.calibrate([{"query": "x" * 3000, "chunks": ["y"]}])


def test_chunks_that_do_not_stay_in_the_store_are_an_error_not_a_rosy_figure() -> None:
    with fresh() as probe:
        probe.precompute(CHUNKS)
        size = probe.stats().store.host.bytes
    with fresh(host_budget=int(size * 0.8)) as engine, pytest.raises(CacheTuneError, match="don't stay in the store"):
        engine.calibrate(SAMPLES[:1], ratios=[0.1], tokens=2)


def test_the_grid_is_within_zero_and_one_and_ascending() -> None:
    assert list(RATIOS) == sorted(set(RATIOS))
    assert RATIOS[0] == 0
    assert RATIOS[-1] < 1
