"""Precompute on a real Ray cluster of this machine, with a tiny model."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")

import ray
import ray.data
from stored import CUT, ROWS, by_one_process, contents, rows_of

import cachetune_ray
from cachetune_rag import ConfigError, ModelLoadError


def dataset(blocks: int = 2) -> Any:
    return ray.data.from_items(ROWS, override_num_blocks=blocks)


def written(writes: Path, since: int = 0) -> list[tuple[str, str]]:
    """Key and process of each chunk that was written by the cluster."""
    with contextlib.suppress(FileNotFoundError):
        return [tuple(line.split()) for line in (writes / "written").read_text().splitlines()][since:]
    return []


@pytest.mark.cluster
def test_two_actors_store_what_one_process_stores(cluster: None, model: Path, writes: Path, tmp_path: Path) -> None:
    before = len(written(writes))
    told: list[int] = []
    summary = cachetune_ray.precompute(
        dataset(), model, tmp_path / "kv", actors=2, progress=lambda so_far: told.append(so_far.documents), **CUT
    )
    assert contents(model, tmp_path / "kv") == by_one_process(model, tmp_path / "one")
    assert rows_of(model, tmp_path / "kv") == rows_of(model, tmp_path / "one")
    keys = Counter(key for key, _ in written(writes, before))
    assert set(keys.values()) == {1}, "no chunk was computed twice"
    assert summary.chunks == len(keys)
    assert (summary.documents, summary.lead_ins, summary.size) == (len(ROWS), 4, sum(len(r["text"]) for r in ROWS))
    assert told == sorted(told)
    assert told[-1] == len(ROWS)
    assert len(told) > 4, "work was handed out in several rows"


@pytest.mark.cluster
def test_what_a_killed_actor_had_begun_is_computed_by_another(
    cluster: None, model: Path, writes: Path, tmp_path: Path
) -> None:
    before = len(written(writes))
    (writes / "kill-after-7").touch()
    summary = cachetune_ray.precompute(dataset(), model, tmp_path / "kv", actors=2, **CUT)
    assert not (writes / "kill-after-7").exists(), "an actor was killed"
    found = written(writes, before)
    assert contents(model, tmp_path / "kv") == by_one_process(model, tmp_path / "one")
    counts = Counter(key for key, _ in found)
    assert sum(counts.values()) - len(counts) <= 1, "at most what was being computed is computed again"
    assert len({process for _, process in found}) >= 2
    assert summary.documents == len(ROWS)


@pytest.mark.cluster
def test_a_run_again_computes_nothing_and_one_that_failed_resumes(
    cluster: None, model: Path, writes: Path, tmp_path: Path
) -> None:
    def stop(so_far: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cachetune_ray.precompute(dataset(), model, tmp_path / "kv", actors=1, progress=stop, **CUT)
    first = {key for key, _ in written(writes)}
    before = len(written(writes))
    assert first, "something was stored"
    summary = cachetune_ray.precompute(dataset(), model, tmp_path / "kv", actors=1, **CUT)
    assert contents(model, tmp_path / "kv") == by_one_process(model, tmp_path / "one")
    assert summary.documents == len(ROWS)
    assert len({key for key, _ in written(writes, before)}) == len(written(writes, before))
    before = len(written(writes))
    again = cachetune_ray.precompute(dataset(), model, tmp_path / "kv", actors=1, **CUT)
    assert (again.chunks, again.documents) == (0, len(ROWS))
    assert written(writes, before) == []


@pytest.mark.cluster
def test_errors_of_actors_are_the_packages_own(cluster: None, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nothing"):
        cachetune_ray.precompute(dataset(), tmp_path / "nothing", tmp_path / "kv", actors=1, **CUT)
    with pytest.raises(ConfigError, match="unknown codec 'zip'"):
        cachetune_ray.precompute(dataset(), model, tmp_path / "kv", actors=1, codec="zip", **CUT)
    with pytest.raises(ConfigError, match="reads at most 2048 tokens"):
        cachetune_ray.precompute(dataset(), model, tmp_path / "kv", actors=1, chunk_tokens=4096)
    with pytest.raises(ConfigError, match="it needs 'id'"):
        cachetune_ray.precompute(ray.data.from_items([{"url": "x"}]), model, tmp_path / "kv")


@pytest.mark.cluster
def test_files_of_all_kinds_are_read_by_tasks(cluster: None, model: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("A text of its own. " * 20)
    (folder / "b.jsonl").write_text('{"id": "x", "text": "A line."}\n{"id": "y", "chunks": ["One.", "Two."]}\n')
    tables = tmp_path / "tables"
    tables.mkdir()
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["In Parquet.", "Here too."]}), tables / "p.parquet")
    corpus = cachetune_ray.read_corpus([folder.as_uri(), tables])
    summary = cachetune_ray.precompute(corpus, model, tmp_path / "kv", actors=1, **CUT)
    assert set(contents(model, tmp_path / "kv")) == {"a.txt", "x", "y", "1", "2"}
    assert summary.failed == ()
