"""`cachetune precompute --ray`: what it prints and refuses. The cluster itself is in test_precompute.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")

from cachetune_rag.cli.app import main
from cachetune_rag.cli.on_ray import RayJob
from cachetune_ray.job import RaySummary


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert ended.value.code == code, told.err
    return told.out, told.err


def test_actors_and_urls_need_ray(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    words = ("precompute", tmp_path / "a.txt", "-m", tmp_path)
    _, said = run(capsys, *words, "-s", tmp_path / "kv", "--actors", 2, code=2)
    assert "--actors is 2, but there is no --ray" in said
    _, said = run(capsys, *words, "-s", "s3://bucket/kv", code=2)
    assert "give a folder, with --remote s3://bucket/kv" in said


def test_a_cluster_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**_: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", refuse)
    _, said = run(capsys, "precompute", tmp_path, "-m", "m", "-s", tmp_path / "kv", "--ray", "10.0.0.9:1", code=2)
    assert "--ray is '10.0.0.9:1', and there is no cluster (nobody answers)" in said
    assert "local to start one here" in said


def test_a_corpus_of_which_nothing_can_be_read_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(job: RayJob) -> None:
        job.done = RaySummary(0, 0, 0, 0, 0, 1.0, failed=(("a.pdf", "a.pdf is encrypted"),))

    monkeypatch.setattr(RayJob, "run", nothing)
    _, said = run(capsys, "precompute", tmp_path, "-m", "m", "-s", tmp_path / "kv", "--ray", "local", code=2)
    assert "Left out: a.pdf is encrypted" in said
    assert "nothing could be read" in said
    assert "empty" not in said


@pytest.mark.cluster
def test_a_folder_on_a_cluster_of_this_machine(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("A text of its own. " * 100)
    (corpus / "empty.txt").write_text(" ")
    (corpus / "b.zip").write_text("no text")
    words = ("precompute", corpus, "-m", model, "--json")
    alone, _ = run(capsys, *words, "-s", tmp_path / "alone")
    out, said = run(capsys, *words, "-s", tmp_path / "kv", "--ray", "local")
    found = json.loads(out)
    assert (found["documents"], found["empty"], found["interrupted"]) == (1, 1, False)
    assert found["chunks"] == json.loads(alone)["chunks"] > 1
    assert found["left_out"]["unread"] == {".zip": 1}
    assert "Left out, as nothing reads them: 1 .zip." in said
    out, _ = run(capsys, "stats", "-s", tmp_path / "kv", "--json")
    assert json.loads(out)["chunks"] == found["chunks"]
