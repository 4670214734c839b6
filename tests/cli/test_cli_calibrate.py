"""`cachetune calibrate` as a user meets it, and what `ask` makes of it."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import test_cli
from test_cli import Cli

from cachetune_rag.cli.prompt_files import read_samples
from cachetune_rag.measuring.calibration.calibrator import RATIOS
from cachetune_rag.reuse.config import AUTO

cli, docs, model, store, filled = test_cli.cli, test_cli.docs, test_cli.model, test_cli.store, test_cli.filled

ASK = "How do I reset the lamp?"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.txt"
    path.write_text(f"{ASK}\n\nWhere is the oil?\n")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"query": ASK, "chunks": ["Oil is in the cellar.", "A passage that no document has."], "id": 7},
        {"query": "Where is the oil?", "prefix": "Be brief."},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ratio_of_ask(cli: Cli, model: Path, store: Path, *options: object) -> float:
    return cli("ask", ASK, "-m", model, "-s", store, "-n", 1, "--json", *options).json["report"]["ratio"]


def test_the_ratio_found_is_what_ask_uses_from_then_on(cli: Cli, model: Path, filled: Path, questions: Path) -> None:
    assert ratio_of_ask(cli, model, filled) == AUTO.ratio
    words = ["calibrate", questions, "-m", model, "-s", filled, "--bound", 100, "--ratios", "0.25,0.5", "--tokens", 4]
    done = cli(*words)
    lines = done.out.splitlines()
    assert lines[0].split() == ["ratio", "KL", "worst", "top-1", "worst"]
    assert lines[1].startswith("  0.25")
    assert lines[1].endswith("<-")
    assert lines[2].startswith("   0.5")
    assert lines[-1].startswith(
        f"Ratio 0.25 of selector {AUTO.selector} keeps at most 100 nats of KL a token on average (2 "
    )
    assert ratio_of_ask(cli, model, filled) == 0.25
    assert ratio_of_ask(cli, model, filled, "--selector", "frequency") == AUTO.ratio
    assert ratio_of_ask(cli, model, filled, "--ratio", 0.4) == 0.4


def test_ask_takes_the_ratio_that_is_predicted_to_keep_a_bound(
    cli: Cli, model: Path, filled: Path, questions: Path
) -> None:
    ask = ["ask", ASK, "-m", model, "-s", filled, "-n", 1]
    assert "run `cachetune calibrate" in cli(*ask, "--max-kl", 1, code=2).err
    ladder = [0.1, 0.65]
    questions.write_text("".join(f"{ASK} Or number {n}?\n" for n in range(10)))
    words = ["calibrate", questions, "-m", model, "-s", filled, "--ratios", ",".join(map(str, ladder)), "--tokens", 4]
    assert cli(*words, "--json").json["predictor"]["ratios"] == ladder
    report = cli(*ask, "--max-kl", 1e6, "--min-top1", 0, "--json").json["report"]
    assert report["ratio"] == report["prediction"]["ratio"] == 0.1
    assert "least ratio for KL at most 1e+06" in report["prediction"]["why"]
    assert "full prefill, because even at r=0.65" in cli(*ask, "--max-kl", 0).out
    assert "max_kl is -1.0" in cli(*ask, "--max-kl", -1, code=2).err


def test_a_bound_that_no_ratio_keeps_means_computing_everything(
    cli: Cli, model: Path, filled: Path, questions: Path
) -> None:
    done = cli("calibrate", questions, "-m", model, "-s", filled, "--bound", 0, "--ratios", "0,0.1", "--tokens", 4)
    assert "No ratio below 1" in done.out
    assert ratio_of_ask(cli, model, filled) == 1.0


def test_a_store_of_another_codec_is_calibrated_and_asked_alike(
    cli: Cli, docs: Path, model: Path, store: Path, prompts: Path
) -> None:
    cli("precompute", docs, "-m", model, "-s", store, "--codec", "int8")
    done = cli(
        "calibrate", prompts, "-m", model, "-s", store, "--bound", 100, "--ratios", "0.3", "--tokens", 2, "--json"
    )
    assert "codec" not in done.err
    assert ratio_of_ask(cli, model, store) == 0.3


def test_json_has_all_figures(cli: Cli, model: Path, filled: Path, prompts: Path) -> None:
    found = cli(
        "calibrate", prompts, "-m", model, "-s", filled, "--json", "--measure", "top1", "--quantile", 0.5, "--tokens", 2,
        "--selector", "frequency",
    ).json  # fmt: skip
    assert {k: found[k] for k in ("store", "selector", "measure", "bound", "quantile", "samples", "saved", "plot")} == {
        "store": str(filled), "selector": "frequency", "measure": "top1", "bound": 0.95, "quantile": 0.5, "samples": 2,
        "saved": True, "plot": None,
    }  # fmt: skip
    assert [f["ratio"] for f in found["figures"]] == list(RATIOS)
    assert set(found["figures"][0]) == {"ratio", "kl", "kl_worst", "top1", "top1_worst", "statistic", "within"}


def test_retrieval_is_asks(cli: Cli, model: Path, filled: Path, questions: Path, tmp_path: Path) -> None:
    words = ["-m", model, "-s", filled, "--json"]
    passages = cli("ask", ASK, *words, "-n", 1, "-k", 1, "-d", "faq-2").json["passages"]
    assert [p["source"] for p in passages] == ["faq-2#1"]
    explicit = tmp_path / "explicit.jsonl"
    explicit.write_text(json.dumps({"query": "Where is the oil?", "chunks": ["Oil is in the cellar."]}))
    retrieved = tmp_path / "retrieved.jsonl"
    retrieved.write_text(json.dumps({"query": "Where is the oil?"}))
    options = [*words, "--ratios", "0.2", "--tokens", 3]
    one = cli("calibrate", explicit, *options).json["figures"][0]
    other = cli("calibrate", retrieved, *options, "-k", 1, "-d", "faq-2").json["figures"][0]
    assert one == other


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_shows_both_measures_the_bound_and_the_choice(
    cli: Cli, model: Path, filled: Path, questions: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot = tmp_path / f"kl{suffix}"
    done = cli(
        "calibrate", questions, "-m", model, "-s", filled, "--ratios", "0,0.5", "--tokens", 2, "--bound", 0.125,
        "--quantile", 0.9, "--plot", plot, "--json",
    )  # fmt: skip
    assert done.json["plot"] == str(plot)
    assert [p for p in tmp_path.iterdir() if ".part" in p.name] == []
    if suffix == ".png":
        assert plot.read_bytes().startswith(b"\x89PNG")
        return
    text = " ".join(ElementTree.parse(plot).getroot().itertext())
    for label in ("KL(full || reuse)", "top-1 agreement", "bound 0.125", f"chosen {done.json['ratio']:g}", "90% of"):
        assert label in text


def test_without_matplotlib_the_error_says_how_to_get_it(
    cli: Cli, model: Path, filled: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("calibrate", questions, "-m", model, "-s", filled, "--plot", "x.svg", code=2)
    assert "pip install 'cachetune-rag[plot]'" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measure", "kld"], "measure is 'kld'"),
        (["--bound", "-1"], "bound is -1.0"),
        (["--ratios", "0.1;0.2"], "--ratios is '0.1;0.2'"),
        (["--ratios", "2"], "ratio is 2.0"),
        (["--tokens", "0"], "tokens is 0"),
        (["--selector", "none"], "goes by no ratio"),
        (["--plot", "x.gif"], "no known ending"),
        (["--plot", "missing/x.svg"], "can't be written"),
        (["-d", "faq-3"], "no document 'faq-3'"),
    ],
)
def test_refused_before_the_model_is_loaded(
    cli: Cli, filled: Path, questions: Path, options: list[str], message: str
) -> None:
    done = cli("calibrate", questions, "-m", "no/such-model", "-s", filled, *options, code=2)
    assert message in done.err
    assert "Loading" not in done.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2 is no JSON"),
        ("[1]", "prompts.jsonl:2 is no sample"),
        ('{"chunks": ["x"]}', "prompts.jsonl:2 is no sample"),
        ('{"query": " "}', "prompts.jsonl:2 is no sample"),
        ('{"query": "x", "chunks": "y"}', "prompts.jsonl:2 is no sample"),
        ('{"query": "x", "chunks": []}', "prompts.jsonl:2 is no sample"),
        ('{"query": "x", "chunks": [1]}', "prompts.jsonl:2 is no sample"),
        ('{"query": "x", "prefix": 1}', "prompts.jsonl:2 is no sample"),
    ],
)
def test_a_broken_line_is_named(cli: Cli, filled: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"query": "fine", "chunks": ["x"]}\n' + line)
    assert message in cli("calibrate", path, "-m", "m", "-s", filled, code=2).err


def test_questions_that_find_nothing_and_empty_files(cli: Cli, model: Path, filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("\n \n")
    assert "no samples in" in cli("calibrate", path, "-m", model, "-s", filled, code=2).err
    path.write_text(f"{ASK}\nXylophone?\n")
    assert f"{path}:2: no passage" in cli("calibrate", path, "-m", model, "-s", filled, code=2).err


def test_a_store_that_cannot_be_written_is_an_error_after_the_figures(
    cli: Cli, model: Path, filled: Path, questions: Path
) -> None:
    (filled / "profiles").write_text("in the way")
    done = cli("calibrate", questions, "-m", model, "-s", filled, "--ratios", "0.5", "--tokens", 1, code=2)
    assert "0.5" in done.out
    assert "could not be saved" in done.err


def test_samples_of_several_files_in_order(questions: Path, prompts: Path) -> None:
    found = read_samples([str(questions), str(prompts)])
    assert [s.query for s in found] == [ASK, "Where is the oil?", ASK, "Where is the oil?"]
    assert [s.chunks is None for s in found] == [True, True, False, True]
    assert [s.where.rpartition(":")[2] for s in found] == ["1", "3", "1", "2"]
    assert found[3].prefix == "Be brief."
