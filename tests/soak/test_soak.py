"""The soak's parts, short. `make soak` runs them at full length."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak_bounds
import soak_cancel
import soak_crashes
import soak_damage
import soak_faults
import soak_forks
import soak_load
import soak_planted
import soak_remote
import soak_shared
from remote_servers import missing
from soak_common import Corpus


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(prompts=2)


def test_killed_processes_lose_nothing(tmp_path: Path, corpus: Corpus) -> None:
    outcome = soak_crashes.run(tmp_path, kills=4, seed=3, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["kills"] >= 4


def test_random_damage_is_noticed_before_use(tmp_path: Path, corpus: Corpus) -> None:
    outcome = soak_damage.run(tmp_path, examples=15, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["files set aside"] > 0


def test_a_failing_disk_gives_no_wrong_answer_and_no_hang(tmp_path: Path, corpus: Corpus) -> None:
    outcome = soak_faults.run(tmp_path, most=12, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["faults met"] > 0


def test_memory_and_files_stay_flat(tmp_path: Path, corpus: Corpus) -> None:
    outcome = soak_bounds.run(tmp_path, requests=40, budget_mib=2, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["pinned at the end"] == 0


def test_engines_on_one_model_and_the_program_that_owns_it(tmp_path: Path) -> None:
    outcome = soak_shared.run(tmp_path, rounds=2, passages=6, tenants=2)
    assert outcome.problems == []
    assert outcome.figures["the program's answers"] > 0


def test_processes_and_threads_on_a_store_far_too_small(tmp_path: Path) -> None:
    outcome = soak_load.run(tmp_path, seconds=3, processes=2, threads=2, corpus=Corpus(prompts=8, length=30))
    assert outcome.problems == []
    assert outcome.figures["answers"] > 0


def test_forks_at_any_moment_are_refused_at_once_and_harm_nobody(tmp_path: Path, corpus: Corpus) -> None:
    outcome = soak_forks.run(tmp_path, forks=6, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["answers"] > 0


def test_a_remote_tier_that_is_killed_loses_nothing(tmp_path: Path, corpus: Corpus) -> None:
    if (why := missing("valkey")) is not None:
        pytest.skip(why)
    outcome = soak_remote.run(tmp_path, kills=2, places=("valkey",), up=0.5, machines=soak_remote.FEW, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["valkey"]["kills"] == 2


def test_planted_files_neither_block_nor_are_followed(tmp_path: Path, corpus: Corpus) -> None:
    outcome = soak_planted.run(tmp_path, rounds=5, corpus=corpus)
    assert outcome.problems == []


def test_cancelling_leaves_nothing_behind(tmp_path: Path, corpus: Corpus) -> None:
    pytest.importorskip("llama_index.core")
    pytest.importorskip("langchain_core")
    outcome = soak_cancel.run(tmp_path, interrupts=14, cancels=1, corpus=corpus)
    assert outcome.problems == []
    assert outcome.figures["interrupts"] > 0
