"""The command line as a user sees it: results, refusals, interruption, and output for scripts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from tiny import llama, tokenizer

import cachetune_rag
from cachetune_rag.cli import meter
from cachetune_rag.cli import precompute as precompute_command
from cachetune_rag.cli.app import main
from cachetune_rag.cli.interrupts import sigterm_as_interrupt
from cachetune_rag.cli.lexical import rank
from cachetune_store import ChunkStore

SUMMARY = {
    "store": str, "documents": int, "chunks": int, "skipped": int, "tokens": int, "bytes": int, "seconds": float,
    "tokens_per_second": float, "lead_ins": int, "empty": int, "left_out": dict, "evicted": int, "interrupted": bool,
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli(Protocol):
    def __call__(self, *arguments: object, code: int = 0) -> Done: ...


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object, code: int = 0) -> Done:
        with pytest.raises(SystemExit) as exit_info:
            main([str(a) for a in arguments])
        found = capsys.readouterr()
        status = exit_info.value.code or 0
        done = Done(int(status), found.out, found.err)
        assert done.code == code, done
        assert "Traceback" not in done.err
        return done

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


def save_model(folder: Path, seed: int) -> Path:
    llama(seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "guide").mkdir(parents=True)
    (folder / "guide" / "reset.md").write_text("# Reset\n\nTo reset the lamp, hold the red button for ten seconds.\n")
    (folder / "story.txt").write_text("".join(f"The keeper saw ship number {i} pass by.\n\n" for i in range(40)))
    (folder / "faq.jsonl").write_text(
        '{"id": "faq-1", "text": "Ladders have forty steps."}\n{"id": "faq-2", "chunks": ["Oil is in the cellar.", "So is rope."]}\n'
    )
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def filled(cli: Cli, docs: Path, model: Path, store: Path) -> Path:
    cli("precompute", docs, "-m", model, "-s", store, "--chunk-tokens", 200)
    return store


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def schema(value: Any) -> Any:
    return {name: type(field) for name, field in value.items()}


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from cachetune_rag.cli.app import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]"
    for word in (
        "precompute",
        "ask",
        "stats",
        "verify",
        "remove",
        "prune",
        "calibrate",
        "tune",
        "A first run",
        "--model ./my-model",
    ):
        assert word in done.stdout


@pytest.mark.parametrize("command", ["precompute", "ask", "stats", "verify", "remove", "prune", "calibrate", "tune"])
def test_every_command_explains_itself_with_an_example(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert "Example" in done.out
    assert f"cachetune {command} " in done.out
    assert "--json" in done.out
    assert done.err == ""


def test_python_m_works_and_tells_the_version() -> None:
    done = run_python("-m", "cachetune_rag", "--version")
    assert (done.returncode, done.stdout) == (0, f"cachetune {cachetune_rag.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["precompute", "x"], "Missing option '--model'"),
        (["ask", "q", "-m", "x"], "Missing option '--store'"),
        (["precompute"], "Missing argument 'PATH'"),
        (["ask", "q", "-m", "m", "-s", "s", "--top-k", "0"], "Invalid value for '--top-k'"),
        (["precompute", "x", "-m", "m", "-s", "s", "--chunk-tokens", "many"], "Invalid value for '--chunk-tokens'"),
    ],
)
def test_a_wrong_command_line_is_explained_on_stderr(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli(*arguments, code=2)
    # The message stands in a box, in which it may be wrapped.
    assert message in " ".join(done.err.replace("│", " ").split())
    assert done.out == ""


# -- precompute -------------------------------------------------------------------------------------------------------


def test_precompute_tells_what_it_did_and_skips_it_the_next_time(
    cli: Cli, docs: Path, model: Path, store: Path
) -> None:
    (docs / "empty.md").write_text("\n")
    command = ["precompute", docs, "--model", model, "--store", store, "--chunk-tokens", 200, "--json"]
    first = cli(*command).json
    assert schema(first) == SUMMARY
    assert (first["documents"], first["skipped"], first["empty"], first["evicted"]) == (4, 0, 1, 0)
    assert first["tokens"] == sum(map(len, texts(store)))
    assert first["bytes"] == cli("stats", "-s", store, "--json").json["bytes"]
    second = cli(*command).json
    assert (second["documents"], second["chunks"], second["skipped"], second["bytes"]) == (4, 0, first["chunks"], 0)


def texts(store: Path) -> list[str]:
    with ChunkStore(store) as kv:
        return [text for _, text, _ in kv.texts()]


def test_precompute_in_words(cli: Cli, docs: Path, model: Path, store: Path) -> None:
    (docs / "empty.md").write_text("\n")
    done = cli("precompute", docs, "-m", model, "-s", store)
    assert "4 documents: 8 new chunks, 0 skipped (stored before)\n" in done.out
    assert " tokens/s, " in done.out
    assert f"Loading {model} ..." in done.err
    assert "Precomputing 4 files" in done.err
    assert "Left out 1 empty document: empty.md" in done.err


def test_a_run_over_a_folder_goes_on_and_names_what_it_left_out(cli: Cli, docs: Path, model: Path, store: Path) -> None:
    (docs / "self.txt").symlink_to("self.txt")
    (docs / "guide" / "photo.jpg").write_bytes(b"\xff\xd8")
    (docs / "prices.csv").write_text("part,price\noil,3\nrope,5\n")
    done = cli("precompute", docs, "-m", model, "-s", store, "--json")
    assert done.json["documents"] == 5
    assert "Left out, as nothing reads them: 1 .jpg." in done.err
    assert f"Left out: {docs / 'self.txt'} is a link that leads back to itself" in done.err
    told = done.json["left_out"]
    assert (told["unread"], [Path(each["path"]).name for each in told["failed"]]) == ({".jpg": 1}, ["self.txt"])
    assert "part: rope\nprice: 5\n" in texts(store)
    (docs / "photo.txt").write_bytes(b"caf\xe9")  # found out while documents are read
    again = cli("precompute", docs, "-m", model, "-s", store)
    assert "photo.txt:1 is not UTF-8" in again.err
    assert "Left out" not in cli("precompute", docs / "story.txt", "-m", model, "-s", store).err


def test_a_tilde_in_an_option_is_the_home_folder(
    cli: Cli, docs: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(docs)
    cli("precompute", "~/docs/story.txt", "-m", model, "--store=~/kv")
    assert cli("stats", "-s", tmp_path / "kv", "--json").json["documents"] == 1
    assert not (docs / "~").exists()


@pytest.mark.parametrize("command", ["precompute x -m y --store", "verify -s", "tune -m y -s z --plot"])
def test_an_empty_path_is_not_the_current_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the path is empty" in cli(*command.split(), "", code=2).err
    assert list(tmp_path.iterdir()) == []


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    cli: Cli, docs: Path, model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "LINE_SECONDS", 0.0)
    lines = cli("precompute", docs, "-m", model, "-s", store, "--chunk-tokens", 200, "--json")
    percents = [int(p) for p in re.findall(r"^ *(\d+)%  \d+ documents?, [\d,]+ tokens/s, .* stored$", lines.err, re.M)]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(percents) > 5
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = cli("precompute", docs, "-m", model, "-s", tmp_path / "kv2", "--json")
    assert "━" in bar.err
    assert " tok/s · " in bar.err
    assert bar.json["documents"] == 4


def test_stored_chunks_join_to_the_document(filled: Path, docs: Path) -> None:
    with ChunkStore(filled) as kv:
        text = {str(key): text for key, text, _ in kv.texts()}
        documents = {info.id: [text[str(key)] for key in info.chunks] for info in kv.documents()}
    assert sorted(documents) == ["faq-1", "faq-2", "guide/reset.md", "story.txt"]
    assert "".join(documents["story.txt"]) == (docs / "story.txt").read_text()
    assert len(documents["story.txt"]) > 5
    assert all(chunk.endswith("\n\n") and len(chunk) <= 200 for chunk in documents["story.txt"])
    assert documents["faq-2"] == ["Oil is in the cellar.", "So is rope."]


def test_lead_ins_are_the_users_own_texts_unless_switched_off(
    cli: Cli, docs: Path, model: Path, store: Path, tmp_path: Path
) -> None:
    command = ["precompute", docs, "-m", model, "--chunk-tokens", 200]
    auto = cli(*command, "-s", store)
    assert "each chunk behind 4 lead-ins" in auto.out
    assert cli(*command, "-s", store, "--json").json["lead_ins"] == 4
    single = cli(*command, "-s", tmp_path / "single", "--lead-in", "first-token", "--json").json
    assert (single["lead_ins"], single["documents"]) == (1, 4)
    assert [g["lead_in"] for g in cli("stats", "-s", store, "--json").json["groups"]] == ["mean over 4 lead-ins"]
    assert [g["lead_in"] for g in cli("stats", "-s", tmp_path / "single", "--json").json["groups"]] == [
        "lead-in of 1 token"
    ]
    refused = cli(*command, "-s", store, "--lead-in", "first-token", code=2)
    assert "it was made with other lead-ins" in refused.err
    assert (
        "--lead-in is 'none': use auto or first-token." in cli(*command, "-s", store, "--lead-in", "none", code=2).err
    )


def test_a_question_finds_what_was_stored_before_there_were_lead_ins(
    cli: Cli, docs: Path, model: Path, store: Path
) -> None:
    assert cli("precompute", docs / "guide", "-m", model, "-s", store, "--json").json["lead_ins"] == 1
    assert cli("precompute", docs / "story.txt", "-m", model, "-s", store, "--json").json["lead_ins"] == 4
    ask = ["ask", "red button or ship number 7?", "-m", model, "-s", store, "-n", 1, "--json", "-k", 2]
    first = cli(*ask).json
    assert {p["source"].split("#")[0] for p in first["passages"]} == {"reset.md", "story.txt"}
    assert first["report"]["missed"] == len("# Reset\n\nTo reset the lamp, hold the red button for ten seconds.\n")
    again = cli(*ask).json  # it is there twice now, and still one passage
    assert len(again["passages"]) == 2
    assert again["report"]["missed"] == 0
    named = cli("ask", "How?", "-m", model, "-s", store, "-d", "reset.md", "-n", 1, "--json").json
    assert named["report"]["missed"] == 0


def test_a_changed_document_is_replaced(cli: Cli, filled: Path, docs: Path, model: Path) -> None:
    (docs / "guide" / "reset.md").write_text("Pull the plug.")
    summary = cli("precompute", docs, "-m", model, "-s", filled, "--chunk-tokens", 200, "--json").json
    assert summary["chunks"] == 1
    assert not any("red button" in text for text in texts(filled))


def test_int8_takes_fewer_bytes(cli: Cli, docs: Path, model: Path, store: Path, tmp_path: Path) -> None:
    exact = cli("precompute", docs, "-m", model, "-s", store, "--json").json["bytes"]
    small = cli("precompute", docs, "-m", model, "-s", tmp_path / "kv8", "--codec", "int8", "--json").json["bytes"]
    assert small < exact


def test_a_broken_line_keeps_what_came_before_it(cli: Cli, model: Path, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "one", "text": "First."}\n{"id": "two", "text": 2}\n')
    done = cli("precompute", path, "-m", model, "-s", store, "--json", code=2)
    assert f'Error: {path}:2: "text" is a number: use a string.' in done.err
    assert "1 document before it is stored; correct it and run the same command again." in done.err
    assert done.out == ""
    path.write_text('{"id": "one", "text": "First."}\n{"id": "two", "text": "Second."}\n')
    summary = cli("precompute", path, "-m", model, "-s", store, "--json").json
    assert (summary["chunks"], summary["skipped"]) == (1, 1)


def test_a_full_store_says_what_had_to_go(cli: Cli, docs: Path, model: Path, store: Path) -> None:
    done = cli("precompute", docs, "-m", model, "-s", store, "--chunk-tokens", 200, "--disk-budget", "200KiB", "--json")
    assert done.json["evicted"] > 0
    assert "The store is full" in done.err
    assert "A larger --disk-budget than 200KiB keeps them." in done.err


def test_a_smaller_budget_does_not_empty_a_store(cli: Cli, filled: Path, docs: Path, model: Path) -> None:
    before = cli("stats", "-s", filled, "--json").json
    done = cli("precompute", docs, "-m", model, "-s", filled, "--disk-budget", "100KiB", code=2)
    assert "more than --disk-budget 100KiB: give a larger budget" in done.err
    assert cli("stats", "-s", filled, "--json").json == before


def test_a_store_whose_description_was_deleted_is_opened_again(cli: Cli, filled: Path, model: Path, docs: Path) -> None:
    """The error about a damaged store says to do this."""
    (filled / "store.json").write_text("garbage")
    assert "delete that file" in cli("precompute", docs, "-m", model, "-s", filled, code=2).err
    (filled / "store.json").unlink()
    done = cli("precompute", docs, "-m", model, "-s", filled, "--chunk-tokens", 200, "--json").json
    assert (done["chunks"], done["skipped"] > 0) == (0, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere.txt"}, "nowhere.txt does not exist: check the path."),
        ({"path": "image.png"}, "image.png is a binary file: only text can be indexed"),
        ({"path": "empty"}, "no documents in empty: folders are searched for files that end in .txt"),
        ({"path": "blank.txt"}, "no text in blank.txt: every document is empty."),
        ({"path": "latin1.txt"}, "latin1.txt:2 is not UTF-8 (byte 0xe9): convert it"),
        ({"path": "broken.jsonl"}, "broken.jsonl:1 is not JSON"),
        ({"--model": "./no-model"}, "model ./no-model is no folder: check --model"),
        ({"--model": "./empty"}, "no model could be loaded from './empty'"),
        ({"--store": "good.txt"}, "good.txt"),
        ({"--store": "good.txt/kv"}, "good.txt"),
        ({"--store": "folder"}, "folder is no store, but holds 'mine.doc': give --store a new or empty folder."),
        ({"--store": "future"}, "format version 99"),
        ({"--host-budget": "lots"}, "--host-budget is 'lots'; give bytes"),
        ({"--disk-budget": "-1"}, "--disk-budget is '-1'; give bytes"),
        ({"--codec": "zip"}, "zip"),
        ({"--dtype": "int8"}, "dtype is 'int8': use 'auto', 'float32'"),
        ({"--device": "tpu9"}, "device is 'tpu9': use 'auto', 'cpu'"),
        (
            {"--chunk-tokens": "2048"},
            "--chunk-tokens is 2048, but the model reads at most 2048 tokens: use 2047 or fewer",
        ),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_precompute_refuses_with_the_reason(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in ("empty", "folder", "future"):
        Path(folder).mkdir()
    Path("folder/mine.doc").write_text("mine")
    Path("future/store.json").write_text('{"version": 99}')
    Path("good.txt").write_text("A good text.")
    Path("blank.txt").write_text(" \n")
    Path("image.png").write_bytes(b"\x89PNG\0\0")
    Path("latin1.txt").write_bytes("one\ncafé".encode("latin1"))
    Path("broken.jsonl").write_text("{id: 1}\n")
    options = {"path": "good.txt", "--model": str(model), "--store": "kv", **change}
    path = options.pop("path")
    done = cli("precompute", path, *(word for option in options.items() for word in option), code=2)
    assert done.err.count("Error: ") == 1
    assert message in done.err.split("Error: ")[1]
    assert done.out == ""
    assert Path("folder/mine.doc").read_text() == "mine"


def test_ctrl_c_says_how_far_it_got_and_the_next_run_resumes(
    cli: Cli, model: Path, store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("w") as stream:
        for i in range(3000):
            stream.write(json.dumps({"id": f"d{i}", "text": f"Document {i}. " * 10}) + "\n")
    command = ["-m", "cachetune_rag", "precompute", path, "-m", model, "-s", store, "--json", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs, and so these tests where one runs them, have Ctrl-C switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 50
    while len(list((store / "chunks").glob("*/*"))) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Interrupted at " in err
    assert "run the same command again to resume" in err
    stopped = json.loads(out)
    assert schema(stopped) == SUMMARY
    assert stopped["interrupted"] is True
    assert 0 < stopped["chunks"] < 3000
    assert cli("verify", "-s", store, "--json").json["ok"] is True
    # The rest would take a while: 100 more documents show that it goes on where it was.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: stopped["documents"] + 100]))
    resumed = cli("precompute", path, "-m", model, "-s", store, "--json").json
    assert resumed["documents"] == stopped["documents"] + 100
    assert stopped["documents"] <= resumed["skipped"] <= stopped["documents"] + 10
    assert resumed["chunks"] == resumed["documents"] - resumed["skipped"]


SIGTERM_WHEN_ANSWERING = """
import os, signal, sys
from cachetune_rag.answering import decoding

def decode_text(*arguments):
    for token in real(*arguments):
        yield token
        os.kill(os.getpid(), signal.SIGTERM)

real, decoding.decode_text = decoding.decode_text, decode_text
from cachetune_rag.cli import main
main(sys.argv[1:])
"""


def test_sigterm_amid_an_answer_is_told_in_a_line_and_the_store_is_closed(filled: Path, model: Path) -> None:
    command = ["ask", "Which red button?", "-m", model, "-s", filled, "--device", "cpu"]
    done = run_python("-c", SIGTERM_WHEN_ANSWERING, *command)
    assert done.returncode == 143, done.stderr
    assert done.stderr.endswith("\nTerminated.\n")
    assert "Traceback" not in done.stderr
    assert [file.name for file in (filled / "tmp").iterdir()] == ["gate.lock"]


@pytest.mark.parametrize(
    ("how", "code", "said"), [("SIGINT", 130, "Interrupted at "), ("SIGTERM", 143, "Terminated at ")]
)
def test_a_run_that_a_signal_ends_says_how_far_it_got(
    cli: Cli, docs: Path, model: Path, store: Path, how: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ChunkStore.set_document

    def set_document(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        os.kill(os.getpid(), signal.Signals[how])

    monkeypatch.setattr(ChunkStore, "set_document", set_document)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with sigterm_as_interrupt():
            done = cli("precompute", docs, "-m", model, "-s", store, "--json", code=code)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said in done.err
    assert done.json["interrupted"] is True
    assert cli("verify", "-s", store, "--json").json["documents"] == 1


def test_a_signal_in_the_last_moments_does_not_kill_a_command_that_is_done() -> None:
    """Python sets signals back to the system's handlers when it ends."""
    late = (
        "import atexit, os, signal, sys\n"
        "atexit.register(lambda: [os.kill(os.getpid(), s) for s in (signal.SIGINT, signal.SIGTERM)])\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from cachetune_rag.cli import main\n"
        "main(['--version'])\n"
    )
    done = run_python("-c", late)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_before_the_work_began(cli: Cli, docs: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(precompute_command, "load_engine", interrupt)
    assert "Interrupted." in cli("precompute", docs, "-m", "m", "-s", store, code=130).err


CTRL_C_WHEN_IMPORTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2] == "ignored" else signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from cachetune_rag.cli import main
main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("when", "how", "code", "said"),
    [("typer", "", 130, "\nInterrupted.\n"), ("torch", "", 130, "\nInterrupted.\n"), ("typer", "ignored", 0, "")],
)
def test_ctrl_c_during_imports_ends_the_program_without_a_traceback(
    tmp_path: Path, when: str, how: str, code: int, said: str
) -> None:
    command = ["precompute", "--help"] if when == "typer" else ["tune", "-m", "m", "-s", tmp_path / "none"]
    done = run_python("-c", CTRL_C_WHEN_IMPORTED, when, how, *command)
    assert (done.returncode, done.stderr) == (code, said)


# -- ask --------------------------------------------------------------------------------------------------------------


def test_ask_finds_passages_and_reports(cli: Cli, filled: Path, model: Path) -> None:
    done = cli("ask", "How do I reset the lamp?", "-m", model, "-s", filled, "-n", 5, "--top-k", 2)
    assert "Using 2 passages: guide/reset.md#1, " in done.err
    assert "0 missed (expected_error, r=0.15); read " in done.out
    assert done.out.splitlines()[-1].startswith("[")


def test_ask_gives_the_engines_answer(cli: Cli, filled: Path, model: Path) -> None:
    done = cli(
        "ask",
        "What?",
        "-m",
        model,
        "-s",
        filled,
        "-d",
        "faq-2",
        "-r",
        0.5,
        "--selector",
        "frequency",
        "-n",
        9,
        "--json",
    )
    result = done.json
    assert schema(result) == {
        "question": str, "answer": str, "finish_reason": str, "report": dict, "passages": list, "full": type(None), "seed": type(None),
    }  # fmt: skip
    assert [passage["source"] for passage in result["passages"]] == ["faq-2#1", "faq-2#2"]
    report = result["report"]
    assert (report["selector"], report["ratio"], report["missed"]) == ("frequency", 0.5, 0)
    assert report["reused"] + report["recomputed"] == len("Oil is in the cellar.So is rope.")
    with cachetune_rag.CacheTune.from_pretrained(model, filled) as engine:
        chunks = ["Oil is in the cellar.", "So is rope."]
        answer = engine.generate("What?", chunks, ratio=0.5, selector="frequency", max_new_tokens=9)
    assert result["answer"] == answer.text


def test_ask_with_everything_recomputed_is_full_prefill(cli: Cli, filled: Path, model: Path) -> None:
    command = ["ask", "Which ship?", "-m", model, "-s", filled, "-d", "story.txt", "-r", 1, "-n", 6, "--full"]
    result = cli(*command, "--json").json
    assert result["same_answer"] is True
    assert result["full"]["answer"] == result["answer"]
    assert result["full"]["report"]["full"] is True
    shown = cli(*command).out
    assert shown.index("With reuse:") < shown.index("Full prefill:") < shown.index("Reuse gave the same answer")


def test_ask_reads_a_prompt_again_where_the_model_is_not_sure(cli: Cli, filled: Path, model: Path) -> None:
    command = ["ask", "Which ship?", "-m", model, "-s", filled, "-d", "story.txt", "-n", 6, "--min-sure", 1]
    result = cli(*command, "--full", "--json").json
    assert result["same_answer"] is True
    assert result["report"]["read_again"]["token"] == 0
    assert "read again in full before token 0 of the answer" in cli(*command).out.replace("\n", " ")
    assert "min_sure is 2.0: use a probability" in cli(*command[:-1], 2, code=2).err


def test_both_answers_of_a_model_that_samples_are_drawn_alike(
    cli: Cli, docs: Path, store: Path, tmp_path: Path
) -> None:
    """Many models' generation configs sample, and two draws differ whatever is reused."""
    sampling = save_model(tmp_path / "sampling", seed=0)
    config = json.loads((sampling / "generation_config.json").read_text())
    (sampling / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 1.0}))
    cli("precompute", docs, "-m", sampling, "-s", store)
    command = ["ask", "Which ship?", "-m", sampling, "-s", store, "-d", "faq-2", "-r", 1, "-n", 12, "--json"]
    done = cli(*command, "--full")
    assert done.json["same_answer"] is True
    drawn = done.json["seed"]
    assert f"The model's generation config samples (temperature 1): --seed {drawn} gives the same" in done.err
    assert cli(*command, "--seed", drawn).json["answer"] == done.json["answer"]
    assert len({cli(*command, "--seed", seed).json["answer"] for seed in range(3)}) > 1


def test_ask_keeps_a_file_for_the_next_time(cli: Cli, model: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("The spare key is under the mat.\n")
    command = ["ask", "Where?", "-m", model, "-s", store, "--chunk-file", tmp_path / "note.txt", "-n", 3, "--json"]
    assert cli(*command).json["report"]["missed"] == 32
    assert cli(*command).json["report"]["missed"] == 0


def test_top_k_keeps_to_the_named_documents(cli: Cli, filled: Path, model: Path) -> None:
    command = ["ask", "ship 7 button", "-m", model, "-s", filled, "-n", 2, "-k", 3, "--json"]
    sources = [p["source"] for p in cli(*command, "-d", "story.txt").json["passages"]]
    assert len(sources) == 3
    assert all(source.startswith("story.txt#") for source in sources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "faq-3"], "no document 'faq-3' in the store. Did you mean 'faq-2' or 'faq-1'?"),
        (["--ratio", "1.5"], "ratio is 1.5: use 'auto' or a number from 0"),
        (["--ratio", "half"], "ratio is 'half': use 'auto' or a number"),
        (["--selector", "magic"], "magic"),
        (["--chunk-file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--chunk-file", "."], ". is no regular file: give a text file."),
        (["-k", "2"], "shares a word with the question: reword it"),
        (["-d", "faq-1", "-d", "story.txt", "--chunk-file", "long.txt"], "the model's context is 2048"),
    ],
)
def test_ask_refuses_with_the_reason(
    cli: Cli,
    filled: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("long " * 300)
    done = cli("ask", "Zyx?", "-m", model, "-s", filled, *arguments, "--json", code=2)
    assert done.err.count("Error: ") == 1
    assert message in done.err.split("Error: ")[1]
    assert done.out == ""


def test_an_empty_question_is_refused(cli: Cli, filled: Path, model: Path) -> None:
    assert "the question is empty" in cli("ask", " ", "-m", model, "-s", filled, code=2).err


@pytest.mark.parametrize("words", [["ask", "Which ship?"], ["precompute", "more.txt"]])
def test_a_model_that_does_not_match_the_store_is_refused(
    cli: Cli, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("more.txt").write_text("More text.")
    other = save_model(tmp_path / "other", seed=1)
    before = cli("stats", "-s", filled, "--documents", "--json").json
    done = cli(*words, "-m", other, "-s", filled, code=2)
    assert f"the store {filled} does not match this run: it was made with another model" in done.err
    after = cli("stats", "-s", filled, "--documents", "--json").json
    for told in (before, after):
        del told["lifetime"]  # that the store was looked at counts
    assert after == before


def test_another_dtype_does_not_match_either(cli: Cli, filled: Path, model: Path) -> None:
    done = cli("ask", "ship?", "-m", model, "-s", filled, "--dtype", "bfloat16", code=2)
    assert "it was made with dtype float32, and this run has bfloat16" in done.err


# -- stats, verify, remove --------------------------------------------------------------------------------------------


def test_stats_as_text_and_json(cli: Cli, filled: Path) -> None:
    plain = cli("stats", "-s", filled, "--json").json
    totals = {"store": str, "documents": int, "chunks": int, "tokens": int, "bytes": int}
    assert schema(plain) == {**totals, "groups": list, "tenants": list, "lifetime": dict}
    assert plain["tenants"] == [{"tenant": "", **{name: plain[name] for name in ("documents", "chunks", "bytes")}}]
    assert [group["chunks"] for group in plain["groups"]] == [plain["chunks"]]
    assert plain["lifetime"]["disk"]["bytes_written"] == plain["bytes"]
    listed = cli("stats", "-s", filled, "--documents", "--json").json["document_list"]
    assert [schema(document) for document in listed] == [{"id": str, "chunks": int, "stored": int, "bytes": int}] * 4
    assert sum(document["bytes"] for document in listed) == plain["bytes"]
    shown = cli("stats", "-s", filled, "--documents").out
    assert shown.startswith(f"{filled}: 4 documents, {plain['chunks']} chunks, ")
    assert "guide/reset.md" in shown


def test_verify_finds_damage_and_precompute_repairs_it(cli: Cli, filled: Path, docs: Path, model: Path) -> None:
    assert "all in order" in cli("verify", "-s", filled).out
    file = sorted((filled / "chunks").glob("*/*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    report = cli("verify", "-s", filled, "--json", code=1).json
    assert report["ok"] is False
    assert report["damaged"] == [file.stem]
    assert cli("verify", "-s", filled, "--json").json["ok"] is True
    assert cli("precompute", docs, "-m", model, "-s", filled, "--chunk-tokens", 200, "--json").json["chunks"] == 1


def test_remove_frees_documents_all_or_none(cli: Cli, filled: Path) -> None:
    done = cli("remove", "faq-1", "nothing", "-s", filled, code=2)
    assert "no document 'nothing' in the store" in done.err
    assert cli("stats", "-s", filled, "--json").json["documents"] == 4
    result = cli("remove", "faq-1", "story.txt", "-s", filled, "--json").json
    assert schema(result) == {"store": str, "removed": list, "bytes": int}
    assert [document["id"] for document in result["removed"]] == ["faq-1", "story.txt"]
    assert result["bytes"] > 0
    assert cli("stats", "-s", filled, "--json").json["documents"] == 2
    assert "Removed 1 document, " in cli("remove", "faq-2", "-s", filled).out


def test_prune_removes_what_the_model_cannot_use(
    cli: Cli, filled: Path, model: Path, tmp_path: Path, docs: Path
) -> None:
    other = save_model(tmp_path / "other", seed=5)
    before = cli("stats", "-s", filled, "--json").json
    assert "nothing to prune" in cli("prune", "-m", other, "-s", filled, code=2).err
    assert cli("prune", "--stale", "-m", model, "-s", filled, "--json").json["chunks"] == 0
    dry = cli("prune", "--stale", "-m", other, "-s", filled, "--dry-run", "--json").json
    assert schema(dry) == {"store": str, "dry_run": bool, "chunks": int, "foreign": int, "bytes": int}
    assert cli("stats", "-s", filled, "--json").json["chunks"] == before["chunks"] == dry["chunks"]
    assert f"Removed {before['chunks']} stale chunks" in cli("prune", "--stale", "-m", other, "-s", filled).out
    after = cli("stats", "-s", filled, "--json").json
    assert (after["chunks"], after["documents"]) == (0, before["documents"])
    again = cli("precompute", docs, "-m", model, "-s", filled, "--chunk-tokens", 200, "--json").json
    assert again["chunks"] == before["chunks"]


def test_stats_tell_different_settings_apart(cli: Cli, filled: Path, model: Path, docs: Path) -> None:
    assert "Made with different settings" not in cli("stats", "-s", filled).out
    (docs / "more.txt").write_text("Gulls came in the morning.")
    cli("precompute", docs, "-m", model, "-s", filled, "--chunk-tokens", 200, "--codec", "int8")
    shown = cli("stats", "-s", filled).out
    assert "Made with different settings" in shown
    assert "int8" in shown
    assert cli("prune", "--stale", "--codec", "exact", "-m", model, "-s", filled, "--json").json["chunks"] == 1


@pytest.mark.parametrize("command", [["stats"], ["verify"], ["remove", "x"], ["ask", "q", "-m", "m"]])
def test_a_missing_store_is_named_and_not_made(cli: Cli, store: Path, command: list[str]) -> None:
    assert f"no store at {store}: check --store" in cli(*command, "-s", store, code=2).err
    assert not store.exists()


def test_looking_after_a_store_loads_no_model(filled: Path) -> None:
    code = (
        "import sys; from cachetune_rag.cli.app import main\n"
        f"for words in (['stats'], ['verify'], ['remove', 'faq-1']):\n"
        f"    try: main([*words, '-s', {str(filled)!r}, '--json'])\n"
        "    except SystemExit as done: assert not done.code, done.code\n"
        "print('transformers' in sys.modules)"
    )
    done = run_python("-c", code)
    assert done.stdout.endswith("False\n"), done


# -- the program ------------------------------------------------------------------------------------------------------


def test_a_bug_is_one_line_unless_debug_is_on(
    cli: Cli, capsys: pytest.CaptureFixture[str], docs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom [/bold]")

    monkeypatch.setattr(precompute_command, "load_engine", fail)
    command = ["precompute", str(docs), "-m", "m", "-s", str(store)]
    assert cli(*command, code=2).err.endswith("Error: unexpected RuntimeError: boom [/bold] (--debug shows where)\n")
    with pytest.raises(SystemExit):
        main([*command, "--debug"])
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("CACHETUNE_DEBUG", "1")
    with pytest.raises(SystemExit):
        main(command)
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_went_away_is_no_error(filled: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cachetune_rag", "stats", "--documents", "-s", str(filled)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_ranking_by_words() -> None:
    texts = [
        ("a", "Cats sleep."),
        ("b", "Dogs bark; CATS hiss at dogs."),
        ("c", "Ships."),
        ("d", "Dogs bark at night."),
    ]
    assert rank("Do dogs and cats bark?", texts) == ["b", "d", "a"]
    assert rank("nothing here", texts) == []
    assert rank("灯台", [("x", "海"), ("y", "白い灯台。")]) == ["y"]
    assert rank("same", [("x", "same"), ("y", "same")]) == ["x", "y"]
