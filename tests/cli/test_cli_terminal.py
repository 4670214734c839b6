"""Text from outside is escaped on a terminal, so that it can't change or rewrite what is shown."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import Cli, cli, model, store  # noqa: F401 (fixtures)

from cachetune_rag.checking.escaping import visible, visible_line
from cachetune_rag.cli import console
from cachetune_rag.cli.app import main
from cachetune_store import ChunkStore

EVIL = "\x1b[2J\x1b[Hall is well"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Both streams become a terminal. (No fixture: pytest puts its own streams there after fixtures have run.)"""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("a\x9b1mb\x7f\x00\r", "a\\x9b1mb\\x7f\\x00\\r"),
        ("abc\u202egnp.exe\u2066", "abc\\u202egnp.exe\\u2066"),
        ("\U000e0041\u2028", "\\U000e0041\\u2028"),
        ("\udcff.txt \ud800", "\\xff.txt \\ud800"),
        ("two\n\tlines, café, 灯台, می\u200cخواهم, 👩\u200d🚀", "two\n\tlines, café, 灯台, می\u200cخواهم, 👩\u200d🚀"),
    ],
)
def test_harmful_characters_are_spelt_out_and_no_others(given: str, shown: str) -> None:
    assert visible(given) == shown
    assert visible_line(given) == shown.replace("\n", "\\n").replace("\t", "\\t")


def test_everything_printed_passes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    console.stdout().print(f"{EVIL} [red]:cat:[/red]", style="bold")
    console.note(EVIL)
    console.stderr().print(EVIL)
    with console.warnings_on_stderr():
        logging.getLogger("cachetune_rag.anything").warning("%s is damaged", EVIL)
    shown = terminal.getvalue()
    assert "\x1b[2J" not in shown
    assert shown.count("\\x1b[2J\\x1b[Hall is well") == 4
    assert "[red]:cat:[/red]" in shown
    assert "Warning: \\x1b[2J\\x1b[Hall is well is damaged" in shown


def test_a_models_text_is_made_harmless_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    assert console.printable("one\r\ntwo\x1b[31m") == "one\ntwo\\x1b[31m"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console.printable("one\r\ntwo\x1b[31m") == "one\r\ntwo\x1b[31m"


def test_ids_with_control_characters_in_every_command(
    cli: Cli,  # noqa: F811
    model: Path,  # noqa: F811
    store: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    lines = [
        {"id": EVIL, "text": "The steps."},
        {"id": "two\nlines", "text": "\x1b[2J"},
        {"id": "\x07empty", "text": " "},
    ]
    source = tmp_path / "esc.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = [cli("precompute", source, "-m", model, "-s", store)]
    told.append(cli("stats", "-s", store, "--documents"))
    assert "\\x1b[2J\\x1b[Hall is well\n" in told[-1].out
    assert "two\\nlines\n" in told[-1].out
    told.append(cli("ask", "steps", "-m", model, "-s", store, "-n", 1))
    assert "Using 1 passage: \\x1b[2J\\x1b[Hall is well#1" in told[-1].err
    told.append(cli("remove", EVIL + "?", "-s", store, code=2))
    told.append(cli("precompute", tmp_path / "\x1b[2Jnowhere", "-m", model, "-s", store, code=2))
    assert all("\x1b" not in done.err and "\x07" not in done.err for done in told)
    assert all("\x1b" not in done.out for done in told[:2])
    listed = cli("stats", "-s", store, "--documents", "--json").json["document_list"]
    assert {document["id"] for document in listed} == {EVIL, "two\nlines"}  # JSON has them as they are
    assert cli("remove", EVIL, "two\nlines", "-s", store, "--json").json["bytes"] > 0


def test_json_is_json_whatever_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"kl": float("inf"), "all": [float("nan"), 1.5], "id": EVIL})
    assert json.loads(capsys.readouterr().out) == {"kl": None, "all": [None, 1.5], "id": EVIL}


@pytest.mark.parametrize(
    "arguments",
    [
        ("stats", f"--{EVIL}"),
        ("stats", "-s", "kv", EVIL),
        (f"{EVIL}\nline",),
    ],
)
def test_usage_errors_spell_out_control_characters(cli: Cli, arguments: tuple[str, ...]) -> None:  # noqa: F811
    done = cli(*arguments, code=2)
    assert "\x1b" not in done.err
    assert "\\x1b[2J" in done.err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["stats", "--json"], ["stats"]])
def test_a_result_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    if "stats" in arguments:
        with ChunkStore(tmp_path):
            arguments = [*arguments, "--store", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert sys.stdout is full
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: the result can't be written to standard output (No space left on device)")


def test_a_closed_standard_output_is_an_error() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m cachetune_rag --version >&- <&-', sys.executable], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: standard output is closed")
    assert len(done.stderr.splitlines()) == 1
