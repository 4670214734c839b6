"""`cachetune tune` as a user meets it, and what `ask` makes of it. Times are whatever they are; nothing here goes by them."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import test_cli
import torch
from test_cli import Cli

from cachetune_rag.cli import meter
from cachetune_rag.cli.session import open_existing
from cachetune_rag.reuse.config import AUTO

cli, docs, model, store, filled = test_cli.cli, test_cli.docs, test_cli.model, test_cli.store, test_cli.filled

ASK = "How do I reset the lamp?"
QUICK = ["--rounds", 1, "--tokens", 300]


def report_of_ask(cli: Cli, model: Path, store: Path, *options: object) -> dict[str, object]:
    return cli("ask", ASK, "-m", model, "-s", store, "-n", 1, "--json", *options).json["report"]


def test_what_it_finds_is_what_ask_uses_from_then_on(cli: Cli, model: Path, filled: Path) -> None:
    assert report_of_ask(cli, model, filled)["ratio"] == AUTO.ratio
    found = cli("tune", "-m", model, "-s", filled, *QUICK, "--r-min", 0.3, "--json").json
    assert (found["store"], found["plot"]) == (str(filled), None)
    assert [t["tier"] for t in found["tiers"]] == ["host", "disk"]
    disk = found["tiers"][1]
    assert disk["saved"] is True
    assert 0.3 <= disk["ratio"] <= 1
    report = report_of_ask(cli, model, filled)  # ask reads from disk
    assert report["ratio"] == disk["ratio"]
    assert report_of_ask(cli, model, filled, "--ratio", 0.4)["ratio"] == 0.4
    assert report_of_ask(cli, model, filled, "--selector", "frequency")["ratio"] == AUTO.ratio


def test_a_device_tier_needs_a_device(cli: Cli, model: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachetune_rag.engine.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    given = ("tune", "-m", model, "-s", filled, "--device-budget")
    assert (
        "--device-budget is 1MiB, but the model runs on the CPU" in cli(*given, "1MiB", "--device", "cpu", code=2).err
    )
    assert "--device-budget is 'much'" in cli(*given, "much", code=2).err


def test_the_device_tier_is_beside_the_model(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU, this checks the arguments that the store would be opened with."""
    monkeypatch.setattr("cachetune_rag.model.loading.resolve_device", torch.device)
    opened: list[dict[str, object]] = []
    monkeypatch.setattr("cachetune_store.ChunkStore", lambda _path, **options: opened.append(options))
    open_existing(filled, "1KiB", device_budget="2KiB", device="cuda:1")
    open_existing(filled)
    budgets = [tuple(options[name] for name in ("host_budget", "device_budget", "device")) for options in opened]
    assert budgets == [(1024, 2048, torch.device("cuda:1")), (0, 0, None)]


def test_in_words(cli: Cli, model: Path, filled: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text(f"{ASK}\nWhere is the oil?\n")
    done = cli("tune", questions, "-m", model, "-s", filled, "--tier", "disk", "--rounds", 1, "-k", 2)
    lines = done.out.splitlines()
    threads = torch.get_num_threads()
    assert lines[0].endswith(f", {threads} thread{'s' if threads > 1 else ''}")
    assert lines[2].split() == ["ratio", "skipped", "first", "token", "spread", "bound"]
    assert lines[3].startswith("  0.15        0  ")
    assert sum(line.endswith("<-") for line in lines) == 1
    assert f"disk (exact, {AUTO.selector}): ratio " in done.out
    assert "Least ratio 0.15 (given or usual). --ratio auto now means this." in done.out
    assert "Tuning with 2 prompts ..." in done.err


def test_the_calibrated_ratio_is_the_least(cli: Cli, model: Path, filled: Path, tmp_path: Path) -> None:
    samples = tmp_path / "prompts.jsonl"
    samples.write_text(json.dumps({"query": ASK, "chunks": ["Oil is in the cellar.", "So is rope."]}) + "\n")
    cli("calibrate", samples, "-m", model, "-s", filled, "--bound", 100, "--ratios", "0.45", "--tokens", 1)
    done = cli("tune", samples, "-m", model, "-s", filled, "--tier", "host", "--rounds", 1, "--json").json
    assert (done["tiers"][0]["r_min"], done["tiers"][0]["calibrated"]) == (0.45, True)
    assert done["tiers"][0]["ratio"] >= 0.45


def test_progress_is_a_line_now_and_then(cli: Cli, model: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "LINE_SECONDS", 0.0)
    done = cli("tune", "-m", model, "-s", filled, *QUICK, "--tier", "host", "--r-max", 0.3)
    assert "host, setting 1: ratio " in done.err
    assert "; best so far 0." in done.err


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_shows_points_roofline_and_choice(
    cli: Cli, model: Path, filled: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot = tmp_path / f"ttft{suffix}"
    done = cli("tune", "-m", model, "-s", filled, *QUICK, "--r-max", 0.3, "--plot", plot, "--json")
    assert done.json["plot"] == str(plot)
    if suffix == ".png":
        assert plot.read_bytes().startswith(b"\x89PNG")
        return
    text = " ".join(ElementTree.parse(plot).getroot().itertext())
    for tier in done.json["tiers"]:
        assert f"{tier['tier']} (exact, {AUTO.selector})" in text
        assert f"chosen {tier['ratio']:g}" in text
    for label in (
        "max(compute, transfer)",
        "measured",
        "full prefill",
        "time to first token, ms",
        done.json["hardware"],
    ):
        assert label in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tier", "tape"], "tier is 'tape'"),
        (["--selector", "none"], "goes by no ratio"),
        (["--selector", "best"], "unknown selector 'best'"),
        (["--r-min", "2"], "r_min is 2.0"),
        (["--r-min", "0.5", "--r-max", "0.4"], "r_min is 0.5, above r_max 0.4"),
        (["--rounds", "0"], "rounds is 0"),
        (["--plot", "x.gif"], "no known ending"),
        (["--host-budget", "much"], "--host-budget"),
        (["missing.txt"], "missing.txt"),
    ],
)
def test_refused_before_the_model_is_loaded(cli: Cli, filled: Path, options: list[str], message: str) -> None:
    done = cli("tune", *options, "-m", "no/such-model", "-s", filled, code=2)
    assert message in done.err
    assert "Loading" not in done.err


def test_without_matplotlib_the_error_says_how_to_get_it(
    cli: Cli, model: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("tune", "-m", model, "-s", filled, "--plot", "x.svg", code=2)
    assert "pip install 'cachetune-rag[plot]'" in done.err


def test_no_store_and_one_that_cannot_be_written(cli: Cli, model: Path, filled: Path, tmp_path: Path) -> None:
    assert "no store at" in cli("tune", "-m", model, "-s", tmp_path / "none", code=2).err
    (filled / "profiles").write_text("in the way")
    done = cli("tune", "-m", model, "-s", filled, *QUICK, "--tier", "host", "--r-max", 0.2, code=2)
    assert "<-" in done.out
    assert "could not be saved" in done.err
