"""`cachetune explain`: the page, the JSON and the lines; what it refuses, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.cli.app import main
from cachetune_rag.explaining import Explanation, html_page

TEXTS = [
    "To reset the lamp, hold the red button for ten seconds.",
    "The ladder has forty steps, and the lamp hangs above it.",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a store with a document."""
    model, store = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("kv") / "store"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    with CacheTune.from_pretrained(model, store=store) as engine:
        engine.precompute([Document("reset.md", TEXTS)])
    return model, store


@pytest.fixture
def explain(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, code: int = 0) -> Any:
        model, store = made
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in ("explain", "How is the lamp reset?", "-m", model, "-s", store, "-n", 4, *arguments)])
        assert (ended.value.code or 0) == code
        return capsys.readouterr()

    return run


def test_page_and_json_are_the_same_explanation(explain: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    printed = explain("--json", "--html", page, "--compare")
    found = Explanation.from_dict(json.loads(printed.out))
    assert page.read_text(encoding="utf-8") == html_page(found)
    assert found.question == "How is the lamp reset?"
    assert {chunk.document for chunk in found.chunks} == {"reset.md"}
    assert found.divergence is not None
    assert f"Wrote {page}" in printed.err
    assert list(tmp_path.iterdir()) == [page]


def test_lines_say_what_was_changed_in_a_missed_chunk(explain: Any, tmp_path: Path) -> None:
    file = tmp_path / "passage.txt"
    file.write_text(TEXTS[0].replace("red", "blue"))
    printed = explain("--chunk-file", file)
    assert "1 chunk" not in printed.out
    assert "Chunk 1: missed" in printed.out
    assert "stored: red button for ten seconds." in printed.out
    assert "prompt: blue button for ten seconds." in printed.out
    again = explain("--chunk-file", file, "--json")
    assert json.loads(again.out)["chunks"][0]["outcome"] == "missed", "nothing was stored"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--html", "nowhere/page.html"), "--html nowhere/page.html can't be written"),
        (("--html", "."), "can't be written"),
        (("--ratio", "2"), "ratio is"),
        (("--selector", "best"), "unknown selector"),
        (("--max-kl", "0.1"), "calibrate"),
        (("-d", "nothing.md"), "nothing.md"),
    ],
)
def test_what_it_refuses(explain: Any, arguments: tuple[str, ...], words: str) -> None:
    assert words in " ".join(explain(*arguments, code=2).err.split())
