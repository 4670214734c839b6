"""What a vLLM server with the connector measures of itself, and what it expects from that; the clock is the test's."""

from __future__ import annotations

import pytest

from cachetune_rag.report import Report
from cachetune_rag.reuse.reading import Reading
from cachetune_rag.reuse.state import NothingReused
from cachetune_vllm.measured import REMEMBERED, TRIED, Measured, between
from cachetune_vllm.responses import why_nothing
from cachetune_vllm.slow_disk import USUAL, FromDisk, Plain, SlowDisk

LEAST = 1000
"""Tokens that vLLM reads in the time that reuse takes beside computing, as long as nothing is known."""


class Server:
    """A server that reads 50 tokens a millisecond, 10 ms a step, and takes 40 ms for each prompt beside what it computes of it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.measured = Measured(lambda: self.now, LEAST)

    def step(self, tokens: int, seconds: float) -> None:
        number = self.measured.step_begins(tokens)
        self.now += seconds
        self.measured.step_ends(number)

    def load(self, stored: int, to_compute: int, reused: int, seconds: float, *, typical: bool = True) -> None:
        self.measured.load_begins("one", "frequency", stored, to_compute, typical=typical)
        self.now += seconds
        self.measured.load_ends("one", reused)

    def used(self, times: int = 3) -> Server:
        for _ in range(times):
            for tokens in (1, 500, 2000):
                self.step(tokens, 0.01 + tokens / 50_000)
            self.load(4000, 4200, 3800, 0.04 + 0.01 + 400 / 50_000)
        return self


def test_times_are_those_of_the_steps_and_of_what_reuse_takes_beside_computing() -> None:
    reuse, plain = Server().used().measured.times("frequency", 4000, 400, 4200) or (0, 0)
    assert plain == pytest.approx(4200 * 0.05 / 2000)  # beyond the longest step, in proportion: as many such steps
    assert reuse == pytest.approx(0.04 + 0.018 + 0.01002)  # the last token takes a step of its own


def test_what_a_small_prompt_takes_lies_between_the_prior_and_what_larger_ones_take() -> None:
    server = Server().used()
    prior = 0.01 + LEAST / 50_000
    reuse, _ = server.measured.times("frequency", 2000, 400, 2200) or (0, 0)
    assert reuse - 0.018 - 0.01002 == pytest.approx((prior + 0.04) / 2)
    for _ in range(3):
        server.load(1000, 1200, 800, 0.012 + 0.018)  # much less than the prior
    reuse, _ = server.measured.times("frequency", 10, 400, 600) or (0, 0)
    assert reuse == pytest.approx(0.012 + 0.018 + 0.01002)


@pytest.mark.parametrize(
    ("kind", "stored", "computed", "to_compute"),
    [("expected_error", 4000, 400, 4200), ("frequency, bounded", 4000, 400, 4200)],
)
def test_nothing_is_expected_of_what_was_not_measured(kind: str, stored: int, computed: int, to_compute: int) -> None:
    assert Server().used().measured.times(kind, stored, computed, to_compute) is None


def test_two_measurements_are_too_few() -> None:
    assert Server().used(2).measured.times("frequency", 4000, 400, 4200) is None


def test_long_prompts_are_not_judged_by_steps_of_answers() -> None:
    server = Server()
    for _ in range(5):
        server.step(16, 0.01)
        server.load(4000, 4200, 3800, 0.05)
    assert server.measured.times("frequency", 4000, 400, 4200) is None


def test_what_is_old_is_forgotten() -> None:
    server = Server().used()
    server.now += REMEMBERED + 1
    assert server.measured.times("frequency", 4000, 400, 4200) is None
    server.used()
    assert server.measured.times("frequency", 4000, 400, 4200) is not None


def test_the_latest_measurements_count() -> None:
    server = Server().used()
    for _ in range(9):
        server.load(4000, 4200, 3800, 0.2 + 0.018)
    reuse, _ = server.measured.times("frequency", 4000, 400, 4200) or (0, 0)
    assert reuse == pytest.approx(0.2 + 0.018 + 0.01002)


def test_a_step_that_waits_for_the_one_before_begins_with_its_end() -> None:
    """With asynchronous scheduling, vLLM plans a step while the one before it runs."""
    server = Server()
    for _ in range(3):
        first = server.measured.step_begins(2000)
        second = server.measured.step_begins(1)
        server.now += 0.05
        server.measured.step_ends(first)
        server.now += 0.01
        server.measured.step_ends(second)
        server.load(4000, 4200, 3800, 0.1)
    _, plain = server.measured.times("frequency", 4000, 1, 1) or (0, 0)
    assert plain == pytest.approx(0.01)
    _, plain = server.measured.times("frequency", 4000, 1, 2000) or (0, 0)
    assert plain == pytest.approx(0.05)


def test_what_is_computed_beside_something_else_does_not_count() -> None:
    server = Server().used()
    expected = server.measured.times("frequency", 4000, 400, 4200)
    for _ in range(9):
        server.measured.load_begins("one", "frequency", 4000, 4200, typical=True)
        beside = server.measured.step_begins(2000)
        server.measured.load_begins("two", "frequency", 4000, 4200, typical=True)
        server.now += 1
        server.measured.load_ends("one", 3800)
        server.measured.load_ends("two", 3800)
        server.measured.step_ends(beside)
        server.load(4000, 4200, 3800, 1, typical=False)
        server.measured.load_begins("one", "frequency", 4000, 4200, typical=True)
        server.now += 1
        server.measured.load_ends("one", None)
    server.measured.load_ends("unknown", 10)
    assert server.measured.times("frequency", 4000, 400, 4200) == expected


def test_an_outcome_that_never_comes_is_not_waited_for() -> None:
    server = Server()
    for _ in range(1000):
        server.measured.step_begins(5)
    server.step(5, 0.01)
    server.measured.step_ends(3)


@pytest.mark.parametrize(
    ("points", "tokens", "seconds"),
    [
        ([], 5, None),
        ([(10, 1.0)], 5, 1.0),
        ([(10, 1.0)], 20, 2.0),
        ([(10, 1.0)], 21, None),
        ([(1024, 1.0)], 10_240, 10.0),
        ([(10, 1.0), (20, 3.0), (40, 4.0)], 15, 2.0),
        ([(10, 1.0), (20, 3.0), (40, 4.0)], 40, 4.0),
    ],
)
def test_seconds_between_measured_points(points: list[tuple[float, float]], tokens: int, seconds: float | None) -> None:
    assert between(points, tokens) == seconds


def test_vllms_own_time_is_known_without_any_prompt_of_ours() -> None:
    server = Server()
    assert server.measured.plain(4000) is None
    for _ in range(3):
        server.step(2000, 0.05)
    assert server.measured.plain(4000) == pytest.approx(0.1)


def test_a_prompt_is_left_where_reuse_is_expected_to_take_longer_and_tried_now_and_then() -> None:
    disk = SlowDisk()
    quick, as_quick, slow = (FromDisk(1.1, 0.1, 0.1, least) for least in (0.1, 1.0, 1.001))
    assert USUAL == 1.1
    assert not disk.leaves(as_quick)
    for _ in range(3):
        assert [disk.leaves(slow) for _ in range(TRIED)] == [True] * (TRIED - 1) + [False]
        assert not disk.leaves(quick)  # one that is quick doesn't count


@pytest.mark.parametrize(
    ("reading", "first", "computing", "least"),
    [
        (Reading(0.5, 0.0, 600), 0, 0.4, 0.5),  # rows are read while the rest is computed
        (Reading(0.25, 0.0, 600), 0, 0.4, 0.4),  # which may take longer
        (Reading(0.5, 1.0, 600), 0, 0.4, 0.9),  # a selector looks at all rows
        (Reading(0.5, 0.25, 600), 0, 0.4, 0.525),  # or at those of a quarter of the layers
        (Reading(2.0, 0.25, 600), 0, 0.4, 2.0),
        (Reading(0.5, 1.0, 0), 0, 1.0, 1.5),  # all others are missed, say
        (Reading(0.5, 1.0, 600, 100), 0, 0.4, 0.8),  # the beginning is computed while it looks
        (Reading(0.0625, 1.0, 600, 100), 0, 0.4, 0.4),  # which may take longer
        (Reading(0.5, 1.0, 600, 100), 60, 0.4, 0.86),  # vLLM has 60 tokens of it
        (Reading(0.5, 1.0, 600, 100), 200, 0.4, 0.9),
    ],
)
def test_the_least_time_of_reuse_from_a_disk(reading: Reading, first: int, computing: float, least: float) -> None:
    times = FromDisk.of(Plain(1.0, first, 1000), reading)
    assert (times.plain, times.reading) == (1.0, reading.seconds)
    assert times.computing == pytest.approx(computing)
    assert times.least == pytest.approx(least)


def test_a_left_prompt_says_both_times() -> None:
    report = Report(10, 0, 8, 0, {"disk": 0}, 0.15, "frequency", 0.0, {})
    plain = Plain(0.52, 0, 100)
    for before, about, behind in (
        (1.0, 594, 140),
        (0.9, 550, 100),
        (0.0, 440, 0),
    ):
        said = why_nothing(NothingReused(report, reading=Reading(0.4, before, 100 - 27), left_on_disk=3), plain)
        assert said == {
            "reused": 0,
            "left": "slow disk",
            "why": f"reuse would take about {about} ms, as its chunks take 400 ms to be read from disk and its other tokens 140 ms to be computed, "
            f"{behind} ms of that behind the reading; vLLM takes 520 ms for the prompt, by what this server took lately",
            "left_on_disk": 3,
        }
    assert why_nothing(NothingReused(report), plain) == {"reused": 0, "left": "all recomputed"}
