"""The tuner: the search on known functions, tiers by a cost model, what is saved and who uses it. No test goes by the clock."""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document, TuningResult
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.measuring.calibration.result import Calibration
from cachetune_rag.measuring.tuning import TierTuning, TuneProgress
from cachetune_rag.measuring.tuning.cost import CostModel
from cachetune_rag.measuring.tuning.golden import minimise
from cachetune_rag.measuring.tuning.measure import TierMeasure
from cachetune_rag.measuring.tuning.saved import KIND
from cachetune_rag.measuring.tuning.search import Line, Search
from cachetune_rag.measuring.tuning.tuner import Tuner, TuningPlan, block_steps
from cachetune_rag.reuse.config import AUTO, PAPER
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkStore

TEXTS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
SAMPLE = {"query": "How many steps are there?", "chunks": TEXTS}


# -- the search -------------------------------------------------------------------------------------------------------


def best(known: dict[float, float]) -> float:
    return min(known, key=known.__getitem__)


@pytest.mark.parametrize("place", [0.15, 0.151, 0.3, 0.5, 0.777, 0.999, 1.0, 0.0, 1.5])
@pytest.mark.parametrize("start", [None, 0.15, 0.4, 0.8, 1.0, -3.0, 9.0])
@pytest.mark.parametrize(
    "shape",
    [
        lambda d: d * d,
        abs,
        lambda d: max(-3 * d, d),  # a roofline's kink
        lambda d: -math.exp(-50 * d * d),
    ],
)
def test_the_minimum_is_found_wherever_it_is_and_the_search_begins(
    place: float, start: float | None, shape: Callable[[float], float]
) -> None:
    low, high, tolerance = 0.15, 1.0, 0.02
    known = minimise(lambda x: shape(x - place), low, high, start=start, tolerance=tolerance)
    assert abs(best(known) - min(max(place, low), high)) <= tolerance + 5e-4
    assert all(low <= x <= high for x in known)
    assert len(known) <= 20


def test_a_good_start_saves_evaluations() -> None:
    def asked(start: float) -> int:
        return len(minimise(lambda x: (x - 0.62) ** 2, 0.0, 1.0, start=start, tolerance=0.01))

    assert asked(0.6) < asked(0.05)
    assert asked(0.6) <= 11


def test_every_argument_is_asked_for_once() -> None:
    asked: list[float] = []

    def function(x: float) -> float:
        asked.append(x)
        return abs(x - 0.4)

    known = minimise(function, 0.0, 1.0, start=0.4)
    assert len(asked) == len(set(asked)) == len(known)
    assert all(x == round(x, 3) for x in asked)


def test_an_interval_of_one_point() -> None:
    assert minimise(lambda x: x, 0.3, 0.3) == {0.3: 0.3}


@pytest.mark.parametrize(("low", "high", "step", "tolerance"), [(1, 0, 0.1, 0.1), (0, 1, 0, 0.1), (0, 1, 0.1, 0)])
def test_an_impossible_search_is_refused(low: float, high: float, step: float, tolerance: float) -> None:
    with pytest.raises(ValueError, match="need low <= high"):
        minimise(lambda x: x, low, high, step=step, tolerance=tolerance)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_the_warm_start_is_where_moving_and_computing_take_as_long() -> None:
    cost = CostModel(move=3.0, compute=1.0, layers=10, chunk_tokens=100, other_tokens=0)
    assert cost.balance == 0.75
    assert cost.compute_seconds(0.75) == cost.move_seconds(0.75) == 750.0
    assert cost.roofline(0.75, 0.75) == 750.0
    assert cost.roofline(0.5, 0.5) == 1500.0
    assert cost.roofline(0.9, 0.9) == 900.0
    assert CostModel(0.0, 2.0, 1, 1, 0).balance == 0.0
    assert CostModel(0.0, 0.0, 1, 1, 0).balance == 0.0
    assert CostModel(1.0, 1.0, 2, 10, 5).compute_seconds(0.5) == 20.0


class Machine:
    """A machine of exact arithmetic: moving and computing overlap in full, and `noise` comes on top."""

    def __init__(self, cost: CostModel, noise: Callable[[], float] = lambda: 0.0):
        self.model, self.noise = cost, noise
        self.asked: list[tuple[float, float]] = []
        self.made_ready: list[tuple[float, float]] = []

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ready(self, ratio: float, skipped: float) -> None:
        self.made_ready.append((ratio, skipped))

    def ttft(self, ratio: float, skipped: float) -> float:
        assert (ratio, skipped) in self.made_ready
        self.asked.append((ratio, skipped))
        return self.model.roofline(ratio, skipped) + self.noise()

    def full(self, rounds: int) -> list[float]:
        return [3 * self.model.compute_seconds(1.0), self.model.compute_seconds(1.0), self.model.compute_seconds(1.0)]

    def cost(self, full: float, rounds: int) -> CostModel:
        assert full == self.model.compute_seconds(1.0)  # undisturbed
        return self.model


def cost(move: float, compute: float = 1e-6) -> CostModel:
    return CostModel(move, compute, layers=32, chunk_tokens=16384, other_tokens=64)


FAST, SLOW = cost(move=0.05e-6), cost(move=2e-6)


def test_offline_a_slow_tier_gets_the_balance_and_a_fast_one_the_floor() -> None:
    line = [Line(0.15, 1.0, selected=0.0)]
    slow = Search(Machine(SLOW)).search(line, SLOW.balance)
    assert slow.skipped == slow.ratio
    assert slow.ratio == pytest.approx(2 / 3, abs=0.02)
    fast = Search(Machine(FAST)).search(line, FAST.balance)
    assert (fast.ratio, fast.skipped) == (0.15, 0.15)


def test_online_what_goes_beyond_the_floor_is_skipped() -> None:
    line = [Line(0.15, 1.0, selected=0.15)]
    slow = Search(Machine(SLOW)).search(line, SLOW.balance)
    # r * tc = (1 - (r - 0.15)) * ti, but for the query
    assert slow.ratio == pytest.approx(2 * 1.15 / 3, abs=0.02)
    assert slow.ratio - slow.skipped == pytest.approx(0.15)
    fast = Search(Machine(FAST)).search(line, FAST.balance)
    assert (fast.ratio, fast.skipped) == (0.15, 0.0)


def test_of_two_lines_the_faster_one_wins() -> None:
    lines = [Line(0.1, 1.0, selected=0.1), Line(0.5, 1.0, selected=0.0)]
    slow = Search(Machine(SLOW)).search(lines, SLOW.balance)
    assert slow.skipped == slow.ratio == pytest.approx(2 / 3, abs=0.02)
    fast = Search(Machine(FAST)).search(lines, FAST.balance)
    assert (fast.ratio, fast.skipped) == (0.1, 0.0)


class Blocks(Machine):
    """Reads chunks of `tokens` tokens in whole blocks of 64 rows."""

    def __init__(self, cost: CostModel, tokens: int):
        super().__init__(cost)
        self.tokens = tokens

    def ttft(self, ratio: float, skipped: float) -> float:
        kept = self.tokens - math.floor(skipped * self.tokens + 1e-9)
        return self.model.roofline(ratio, 1 - min(self.tokens, -(-kept // 64) * 64) / self.tokens)


@pytest.mark.parametrize("tokens", [512, 510, 700])
@pytest.mark.parametrize("move", [0.3e-6, 0.6e-6, 1.5e-6, 3e-6])
@pytest.mark.parametrize("selected", [0.0, 0.15])
def test_where_blocks_are_read_the_best_step_is_found(tokens: int, move: float, selected: float) -> None:
    machine, low = Blocks(cost(move), tokens), 0.15
    found = Search(machine).search([Line(low, 1.0, selected, block_steps(tokens, selected))], start=0.4)
    grid = [low + (1 - low) * n / 2000 for n in range(2001)]
    least = min(machine.ttft(r, max(0.0, round(r - selected, 6))) for r in grid)
    assert found.ttft <= least * 1.001


def test_noise_is_met_by_medians() -> None:
    generator = random.Random(7)

    def spikes() -> float:
        return generator.choice([0.0, 0.0, 0.0, 0.0, 5.0]) + generator.random() * 1e-3

    machine = Machine(SLOW, spikes)
    search = Search(machine, rounds=7)
    found = search.search([Line(0.15, 1.0, selected=0.0)], SLOW.balance)
    assert found.ratio == pytest.approx(2 / 3, abs=0.03)
    point = next(p for p in search.points if p.ratio == found.ratio)
    assert point.ttft == statistics.median(point.samples)


def test_the_best_are_measured_again_in_turn() -> None:
    machine = Machine(SLOW)
    search = Search(machine, rounds=2)
    search.search([Line(0.15, 1.0, selected=0.0)], 0.5)
    counts = sorted((len(p.samples) for p in search.points), reverse=True)
    assert counts[:3] == [4, 4, 4]
    assert set(counts[3:]) == {2}
    last = machine.asked[-6:]
    assert last[:3] == last[3:]
    assert len(set(last)) == 3
    assert sorted(machine.made_ready) == sorted(set(machine.made_ready))


def test_the_floor_is_always_looked_at() -> None:
    search = Search(Machine(SLOW))
    search.search([Line(0.15, 1.0, selected=0.15)], SLOW.balance)
    assert (search.points[0].ratio, search.points[0].skipped) == (0.15, 0.0)


def test_a_lucky_round_does_not_decide() -> None:
    # The first look at one bad setting comes out best; the finalists' rounds put it right.
    luck = iter([0.0])

    class Lucky(Machine):
        def ttft(self, ratio: float, skipped: float) -> float:
            seconds = super().ttft(ratio, skipped)
            return next(luck, seconds) if ratio > 0.8 else seconds

    found = Search(Lucky(SLOW), rounds=1).search([Line(0.15, 1.0, selected=0.0)], 0.8)
    assert found.ratio < 0.8


# -- the tuner --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), tmp_path / "kv") as made:
        made.precompute([Document("a", TEXTS)])
        yield made


class Machines:
    """A machine for each tier."""

    def __init__(self, **tiers: CostModel):
        self.tiers = {name: Machine(cost) for name, cost in tiers.items()}
        self.prompts: list[Sequence[Prompt]] = []

    def __call__(self, bench: Bench, prompts: Sequence[Prompt], tier: str, selector: str) -> Machine:
        self.prompts.append(prompts)
        return self.tiers[tier]


def tune(
    engine: CacheTune, machines: Machines | None = None, samples: Any = None, progress: Any = None, **options: Any
) -> TuningResult:
    machines = machines or Machines(host=FAST, disk=SLOW)
    runtime = engine.runtime
    plan = TuningPlan.of(**options)
    return Tuner(runtime.bench(), plan, runtime.calibrations.ratio, runtime.tunings, progress, machines).tune(samples)


def calibrate(engine: CacheTune, selector: str, ratio: float) -> None:
    """As if `engine.calibrate` had found this ratio."""
    found = Calibration(
        ratio=ratio, met=True, selector=selector, measure="kl", bound=0.05, quantile=None, samples=1, target_tokens=1,
        figures=(),
    )  # fmt: skip
    engine.runtime.calibrations.save(found)


def test_a_tier_that_is_slow_against_compute_gets_the_larger_ratio(engine: CacheTune) -> None:
    host, disk = tune(engine).tiers
    assert (host.tier, disk.tier) == ("host", "disk")
    assert (host.ratio, host.skipped) == (0.15, 0.0)
    assert disk.ratio == pytest.approx(2 * 1.15 / 3, abs=0.02)
    assert disk.ratio - disk.skipped == pytest.approx(0.15)
    assert host.warm_start == 0.15
    assert disk.warm_start == pytest.approx(2 / 3)
    assert disk.ttft == pytest.approx(SLOW.roofline(disk.ratio, disk.skipped))
    assert disk.full == SLOW.compute_seconds(1.0)
    assert disk.speedup > 1.2
    assert disk.ttft <= min(SLOW.roofline(r, 0.0) for r in (0.15, 0.3, 0.5, 0.7))
    assert [p.ratio for p in disk.points] == sorted(p.ratio for p in disk.points)


def test_the_paper_selector_skips_all_that_it_recomputes(engine: CacheTune) -> None:
    host, disk = tune(engine, selector="frequency").tiers
    assert (host.ratio, host.skipped) == (0.15, 0.15)
    assert disk.ratio == disk.skipped == pytest.approx(2 / 3, abs=0.02)


def test_bounds_are_kept(engine: CacheTune) -> None:
    (disk,) = tune(engine, tier="disk", r_min=0.1, r_max=0.4).tiers
    assert disk.ratio == 0.4
    assert all(0.1 <= p.ratio <= 0.4 for p in disk.points)
    (host,) = tune(engine, tier="host", r_min=0.25).tiers
    assert (host.ratio, host.r_min, host.calibrated) == (0.25, 0.25, False)
    (one,) = tune(engine, tier="host", r_min=0.3, r_max=0.3).tiers
    assert [p.ratio for p in one.points] == [0.3]


def test_the_floor_is_the_calibrated_one_where_there_is_one(engine: CacheTune) -> None:
    calibrate(engine, AUTO.selector, 0.05)
    host, disk = tune(engine).tiers
    assert (host.ratio, host.r_min, host.calibrated) == (0.05, 0.05, True)
    assert disk.ratio - disk.skipped == pytest.approx(0.05)


def test_the_offline_ranking_stands_in_only_above_a_floor_of_its_own(engine: CacheTune) -> None:
    calibrate(engine, AUTO.selector, 0.1)
    calibrate(engine, "frequency", 0.5)
    host, disk = tune(engine).tiers
    assert (host.ratio, host.skipped) == (0.1, 0.0)
    assert disk.ratio == disk.skipped == pytest.approx(2 / 3, abs=0.02)
    calibrate(engine, "frequency", 0.9)
    host, disk = tune(engine).tiers
    assert disk.ratio - disk.skipped == pytest.approx(0.1)


def test_progress_tells_every_setting(engine: CacheTune) -> None:
    told: list[TuneProgress] = []
    result = tune(engine, progress=told.append)
    assert {p.tier for p in told} == {"host", "disk"}
    assert {p.tiers for p in told} == {("host", "disk")}
    for tier in result.tiers:
        mine = [p for p in told if p.tier == tier.tier]
        assert [p.measured for p in mine] == list(range(1, len(tier.points) + 1))
        assert mine[-1].best.ttft == tier.ttft
        assert all(p.best.ttft <= p.point.ttft for p in mine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "tape"}, "tier is 'tape'.*'host', 'disk', 'remote' or 'auto'"),
        ({"tier": "device"}, "tier is 'device'.*this store has .host, disk"),
        ({"selector": "all"}, "goes by no ratio"),
        ({"selector": "best"}, "unknown selector 'best'"),
        ({"r_min": -0.1}, "r_min is -0.1"),
        ({"r_min": True}, "r_min is True"),
        ({"r_max": 1.1}, "r_max is 1.1"),
        ({"r_max": "auto"}, "r_max is 'auto'"),
        ({"r_max": float("nan")}, "r_max is nan"),
        ({"r_min": 0.5, "r_max": 0.4}, "r_min is 0.5, above r_max 0.4"),
        ({"r_max": 0.1}, "r_min is 0.15, above r_max 0.1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"tokens": 2.5}, "tokens is 2.5"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_name(engine: CacheTune, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.tune(**options)


# -- the prompts ------------------------------------------------------------------------------------------------------


def test_made_prompts_hold_stored_chunks_up_to_their_size_and_are_the_same_again(engine: CacheTune) -> None:
    sizes = [len(text) for text in TEXTS]
    machines = Machines(host=FAST, disk=SLOW)
    tune(engine, machines, tokens=2 * max(sizes) + 20)
    tune(engine, machines, tokens=2 * max(sizes) + 20)
    first, second, *_ = machines.prompts
    assert [p.ids for p in first] == [p.ids for p in second]
    assert len(first) == 2
    for prompt in first:
        assert len(prompt.chunk_texts) in (2, 3)
        assert set(prompt.chunk_texts) <= set(TEXTS)
    machines = Machines(host=FAST, disk=SLOW)
    tune(engine, machines)
    assert {len(p.chunk_texts) for p in machines.prompts[0]} == {len(TEXTS)}  # all there is
    tune(engine, machines, tokens=1)
    assert {len(p.chunk_texts) for p in machines.prompts[-1]} == {1}


def test_made_prompts_fit_the_model() -> None:
    with CacheTune(llama(max_positions=600), tokenizer()) as engine:
        engine.precompute([Document("a", [text * 3 for text in TEXTS])])
        machines = Machines(host=FAST)
        tune(engine, machines, tokens=4096)
        assert all(200 < len(p.ids) < 600 for p in machines.prompts[0])


def test_an_empty_store_has_nothing_to_tune_with() -> None:
    with CacheTune(llama(), tokenizer()) as engine, pytest.raises(ConfigError, match="no chunks of this model"):
        engine.tune()


def test_samples_are_used_as_they_are_and_what_is_missing_is_stored(engine: CacheTune) -> None:
    machines = Machines(host=FAST, disk=SLOW)
    sample = {"query": "Which?", "chunks": ["This was never stored.", TEXTS[0]], "prefix": "Be brief."}
    prompt = engine.prompts.build(query="Who?", chunks=TEXTS[1:])
    tune(engine, machines, [sample, prompt])
    assert [p.ids for p in machines.prompts[0]] == [engine.prompts.build(**sample).ids, prompt.ids]  # type: ignore[arg-type]
    assert engine.prefill(prompt=machines.prompts[0][0]).report.missed == 0


def test_lead_ins_that_the_samples_settle_are_settled_before_measuring() -> None:
    long = [text * 5 for text in TEXTS]
    with CacheTune(llama(), tokenizer()) as engine:
        before = engine.namespace
        tune(engine, Machines(host=FAST), [{"query": "?", "chunks": long}])
        assert engine.namespace != before
        assert engine.prefill(query="?", chunks=long).report.missed == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "there are no samples"),
        ([SAMPLE, {"query": "?", "chunks": []}], "sample 2 has no chunks"),
        ([{"query": "?", "passages": TEXTS}], "sample 1: it has the key 'passages'"),
        (["text"], "sample 1: it is 'text'"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_by_number(engine: CacheTune, samples: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tune(engine, samples=samples)


def test_samples_of_two_codecs_are_refused(tmp_path: Path) -> None:
    for codec, texts in (("exact", TEXTS[:2]), ("int8", TEXTS[2:])):
        with CacheTune(llama(), tokenizer(), tmp_path / "kv", codec=codec) as engine:
            engine.precompute([Document(codec, texts)])
    with CacheTune(llama(), tokenizer(), tmp_path / "kv", codec="int8") as engine:
        with pytest.raises(ConfigError, match="exact and int8"):
            tune(engine, samples=[SAMPLE])
        # Made prompts keep to one of them.
        assert {t.codec for t in tune(engine).tiers} <= {"exact", "int8"}


# -- saved, and used --------------------------------------------------------------------------------------------------


def test_auto_goes_by_the_slowest_tier_among_the_chunks(tmp_path: Path) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path / "kv") as engine:
        engine.precompute([Document("a", TEXTS)])
        host, disk = tune(engine).tiers
        assert host.saved
        assert disk.saved
        assert engine.prefill(query="?", chunks=TEXTS).report.ratio == host.ratio
    with CacheTune(llama(), tokenizer(), tmp_path / "kv") as engine:
        assert engine.prefetch(TEXTS[:2]).wait(20)
        report = engine.prefill(query="?", chunks=TEXTS[:2]).report
        assert (report.ratio, set(report.bytes_read)) == (host.ratio, {"host"})
        report = engine.prefill(query="?", chunks=TEXTS).report  # half of it from disk
        assert report.ratio == disk.ratio
        assert report.skipped >= disk.skipped * sum(map(len, TEXTS)) - len(TEXTS)
        report = engine.prefill(query="?", chunks=TEXTS).report  # now all in host memory
        assert (report.ratio, report.skipped) == (host.ratio, engine.prefill(query="?", chunks=TEXTS).report.skipped)


def test_auto_goes_by_nothing_else(engine: CacheTune) -> None:
    calibrate(engine, "frequency", 0.5)
    host, _ = tune(engine, r_min=0.35).tiers
    assert host.ratio == 0.35
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.35
    assert engine.generate(query="?", chunks=TEXTS, max_new_tokens=1).report.ratio == 0.35
    assert engine.prefill(query="?", chunks=TEXTS, ratio=0.2).report.ratio == 0.2
    assert engine.prefill(query="?", chunks=TEXTS, selector="frequency").report.ratio == 0.5
    assert engine.prefill(query="?", chunks=TEXTS, selector="random").report.ratio == AUTO.ratio
    assert engine.prefill(query="?", chunks=["Never stored."]).report.ratio == AUTO.ratio


def test_a_tuning_holds_for_its_model_hardware_tier_codec_and_selector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kv"
    with CacheTune(llama(), tokenizer(), path) as engine:
        engine.precompute([Document("a", TEXTS)])
        saved = tune(engine, tier="host").tiers[0]
    with CacheTune(llama(), tokenizer(), path) as engine:
        found = engine.runtime.tunings.load("host", "exact", AUTO.selector)
        assert found == saved
        assert engine.runtime.tunings.load("disk", "exact", AUTO.selector) is None
        assert engine.runtime.tunings.load("host", "int8", AUTO.selector) is None
        assert engine.runtime.tunings.load("host", "exact", "frequency") is None
    with CacheTune(llama(seed=1), tokenizer(), path) as other:
        assert other.runtime.tunings.load("host", "exact", AUTO.selector) is None
    monkeypatch.setattr("cachetune_rag.measuring.tuning.saved._processor", lambda: "another machine")
    with CacheTune(llama(), tokenizer(), path) as engine:
        assert engine.runtime.tunings.load("host", "exact", AUTO.selector) is None


def test_a_floor_calibrated_later_goes_before_a_tuning_that_does_not_keep_it(engine: CacheTune) -> None:
    tune(engine)
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.15
    calibrate(engine, AUTO.selector, 0.3)
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.3
    tune(engine)
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.3
    calibrate(engine, AUTO.selector, 0.02)
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.3  # tuned above the floor: kept
    # A ratio that the offline ranking chooses goes by that ranking's floor.
    calibrate(engine, "frequency", 0.5)
    machines = Machines(host=SLOW, disk=SLOW)
    host, _ = tune(engine, machines).tiers
    assert host.ratio == host.skipped
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == host.ratio
    calibrate(engine, "frequency", 0.9)
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.02


def test_a_saved_tuning_that_makes_no_sense_is_left_out(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    tuned = tune(engine).tiers[0]
    good = tuned.as_dict()
    for bad in (
        {**good, "ratio": 1.5},
        {**good, "skipped": 0.9, "ratio": 0.2},
        {**good, "ratio": "auto"},
        {**good, "cost": 3},
        {**good, "points": [{"ratio": 1}]},
        {"ratio": 0.5},
    ):
        engine.profiles.save(KIND, engine.runtime.tunings.key("host", "exact", AUTO.selector), bad)
        engine.runtime.tunings.forget()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert engine.prefill(query="?", chunks=TEXTS).report.ratio == AUTO.ratio
        assert "Tune again" in caplog.text


def test_a_store_that_cannot_be_written_keeps_the_result_for_this_engine(
    engine: CacheTune, caplog: pytest.LogCaptureFixture
) -> None:
    assert engine.store.path is not None
    (engine.store.path / "profiles").write_text("in the way")
    host, _ = tune(engine, r_min=0.4).tiers
    assert not host.saved
    assert "for this engine only" in caplog.text
    assert engine.prefill(query="?", chunks=TEXTS).report.ratio == 0.4


def test_results_are_plain_numbers_and_words(engine: CacheTune) -> None:
    result = tune(engine)
    again = json.loads(json.dumps(result.as_dict()))
    assert [TierTuning.from_dict(t) for t in again["tiers"]] == list(result.tiers)
    words = str(result).splitlines()
    assert words[0] == result.hardware
    assert result.hardware.endswith(" 1 thread") is (torch.get_num_threads() == 1)
    assert "1 threads" not in result.hardware
    assert words[1].startswith(f"host (exact, {AUTO.selector}): ratio 0.15, of it 0 not read; first token after ")


# -- measured, for once -----------------------------------------------------------------------------------------------


def test_tiers_that_there_are(tmp_path: Path) -> None:
    for path, options, expected in (
        (None, {}, ("host",)),
        (tmp_path / "a", {}, ("host", "disk")),
        (tmp_path / "b", {"host_budget": 0}, ("disk",)),
        (None, {"host_budget": 0}, ()),
    ):
        with CacheTune(llama(), tokenizer(), path, **options) as engine:
            assert tuple(kind.name for kind in engine.store.tiers) == expected
            if not expected:
                with pytest.raises(ConfigError, match="give it one of both"):
                    engine.tune()


@pytest.mark.parametrize("selector", [AUTO.selector, "frequency"])
def test_an_engine_measures_itself_on_every_tier_and_leaves_no_trace(tmp_path: Path, selector: str) -> None:
    path = tmp_path / "kv"
    with CacheTune(llama(), tokenizer(), path) as engine:
        engine.precompute([Document("a", TEXTS)])
        before = engine.stats()
        result = engine.tune(selector=selector, rounds=1, tokens=200)
        assert [t.tier for t in result.tiers] == ["host", "disk"]
        for tier in result.tiers:
            assert tier.saved
            assert tier.codec == "exact"
            assert tier.cost.move > 0
            assert tier.cost.compute > 0
            assert tier.cost.layers == 3
            assert 0 < tier.cost.chunk_tokens <= 200
            assert tier.r_min <= tier.ratio <= 1
            assert tier.full > 0
            assert {p.ratio for p in tier.points} >= {tier.ratio}
        after = engine.stats()
        assert (after.requests, after.full_prefills) == (before.requests, before.full_prefills)
        assert after.store.host.bytes == before.store.host.bytes
        assert engine.prefill(query="?", chunks=TEXTS, selector=selector).report.ratio == result.tiers[0].ratio
    assert sorted(p.name.split("-")[0] for p in (path / "profiles").iterdir()) == ["tuning", "tuning"]


def test_each_tier_is_measured_where_it_says(engine: CacheTune) -> None:
    prompts = [engine.prompts.build(query="?", chunks=TEXTS)]
    for tier in ("host", "disk"):
        with TierMeasure(engine.runtime.bench(), prompts, tier, "frequency") as measure:
            for _ in range(2):
                state = measure.bench.prefill(prompts[0], replace(PAPER, ratio=0.5))
                assert set(state.report.bytes_read) == {tier}
            assert measure.bench.transfer(prompts[0])[0] == sum(map(len, TEXTS))
            assert measure.cost(1.0, 1).other_tokens == len(prompts[0].ids) - sum(map(len, TEXTS))


@pytest.mark.parametrize("in_memory", [True, False])
def test_chunks_on_the_device_are_a_tier_of_their_own(
    tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The tier's device is the host here; what matters is where each request finds its rows."""
    path = None if in_memory else tmp_path / "kv"
    with (
        ChunkStore(path, device="cpu", device_budget="64MiB") as store,
        CacheTune(llama(), tokenizer(), store) as engine,
    ):
        engine.precompute([Document("a", TEXTS)])
        expected = ("device", "host") if in_memory else ("device", "host", "disk")
        assert tuple(kind.name for kind in engine.store.tiers) == expected
        prompts = [engine.prompts.build(query="?", chunks=TEXTS)]
        for _ in range(2):  # whether the engine's own chunks have come up or not
            for tier in expected:
                with TierMeasure(engine.runtime.bench(), prompts, tier, "frequency") as measure:
                    for _ in range(2):
                        state = measure.bench.prefill(prompts[0], replace(PAPER, ratio=0.5))
                        assert set(state.report.bytes_read) == {tier}
            engine.prefill(prompt=prompts[0])
        device = tune(engine, Machines(device=FAST, host=SLOW, disk=SLOW)).tiers[0]
        assert device.tier == "device"
        assert engine.prefill(prompt=prompts[0]).report.ratio == device.ratio
    small = ChunkStore(path, device="cpu", device_budget="4KiB")
    with small, CacheTune(llama(), tokenizer(), small) as engine:
        engine.precompute([Document("a", TEXTS)])
        with pytest.raises(ConfigError, match=r"device_budget .4096 bytes. doesn't hold"):
            engine.tune(tier="device", rounds=1)
        tiers = engine.tune(rounds=1, tokens=100, r_max=0.2).tiers
        assert [t.tier for t in tiers] == (["host"] if in_memory else ["host", "disk"])
        assert "the tier device is left out" in caplog.text


def test_memory_alone_can_be_tuned_and_a_chunk_that_goes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheTune(llama(), tokenizer()) as engine:
        engine.precompute([Document("a", TEXTS)])
        (host,) = engine.tune(rounds=1, tokens=150).tiers
        assert not host.saved
        prompts = [engine.prompts.build(query="?", chunks=TEXTS)]
        with TierMeasure(engine.runtime.bench(), prompts, "host", "frequency") as measure:
            measure.bench.store.discard(engine.runtime.assembler.key(prompts[0].chunk_ids[0]))
            with pytest.raises(CacheTuneError, match="left the store while it was tuned"):
                measure.ttft(0.5, 0.0)
