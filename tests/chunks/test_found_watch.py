"""Why little of what was retrieved was found: the likely reason is logged once, and counted."""

from __future__ import annotations

import html
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk
from cachetune_rag.telemetry.prometheus import CacheTuneCollector
from cachetune_rag.text.recognising.text_changes import REASONS, change_of

SUBJECTS = ("keeper", "harbour master", "pilot", "cook")


def passage(subject: str) -> str:
    return (
        f"The {subject}'s café stands at the pier.\n\nEach night, the {subject} counts boats & lamps <twice>,\n"
        f'and says "all well" to the {subject} of the other shore.\nBy day the {subject} sleeps.  \n'
    )


PASSAGES = [passage(subject) for subject in SUBJECTS]
HEADER = "file_path: /data/notes.txt\ntitle: Notes\n\n"

CHANGES: dict[str, Callable[[str], str]] = {
    "stripped": str.strip,
    "escaped": html.escape,
    "quoted": lambda text: "\n".join(f"> {line}" for line in text.splitlines()),
    "numbered": lambda text: "\n".join(f"{i}. {line}" for i, line in enumerate(text.splitlines(), 1)),
    "indented": lambda text: "\n".join(f"    {line}" for line in text.splitlines()),
    "whitespace": lambda text: " ".join(text.split()),
    "unicode": lambda text: unicodedata.normalize("NFD", text),
    "case": str.upper,
    "truncated": lambda text: text[: len(text) // 2],
    "altered": lambda text: "; ".join(text.upper().replace(",", " -").split("\n")),
}


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(max_positions=8192), tokenizer(), lead_in="first_token") as engine:
        yield engine


@pytest.fixture(autouse=True)
def _warnings_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As Python's logging begins; importing a framework may have lowered the root logger's level."""
    caplog.set_level(logging.WARNING, logger="cachetune_rag.found_watch")


@pytest.mark.parametrize("kind", CHANGES)
def test_the_reason_is_the_change(kind: str) -> None:
    shown = "Answer from these.\n" + "\n---\n".join(map(CHANGES[kind], PASSAGES)) + "\nWho?"
    assert {change_of(text, shown) for text in PASSAGES} == {kind}


@pytest.mark.parametrize("escape", [json.dumps, repr, lambda text: json.dumps(text, ensure_ascii=False)])
def test_all_ways_to_escape_are_known(escape: Callable[[str], str]) -> None:
    assert change_of(PASSAGES[0], f'{{"context": {escape(PASSAGES[0])}}}') == "escaped"


def test_a_header_that_is_not_shown_is_told_from_a_part() -> None:
    assert change_of(HEADER + PASSAGES[0], f"{PASSAGES[0]}\nWho?") == "header"
    assert change_of("title: Notes\n" + PASSAGES[0], f"{PASSAGES[0]}\nWho?") == "header"


def test_another_text_is_no_change_of_it() -> None:
    assert change_of(PASSAGES[0], "The weather was fine all week, and nobody came to the island. " * 20) is None
    assert change_of("", "anything") is None


@pytest.mark.parametrize("kind", ["stripped", "escaped", "quoted", "numbered", "whitespace", "truncated"])
@pytest.mark.parametrize("told", [True, False])
def test_the_engine_warns_once_of_a_kind(
    engine: CacheTune, caplog: pytest.LogCaptureFixture, kind: str, told: bool
) -> None:
    """Whether the caller says what was retrieved, or sends a long prompt."""
    engine.precompute(PASSAGES)
    prompt = "\n---\n".join(map(CHANGES[kind], PASSAGES)) + "\nQuestion: who? " + "Think it over well. " * 60
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            engine.prompt_from_text(prompt, retrieved=PASSAGES if told else ())
    assert [record.name for record in caplog.records] == ["cachetune_rag.found_watch"]
    assert f"The likely reason: {kind} ({REASONS[kind]})" in caplog.text
    assert "keeper" not in caplog.text, "no log line holds a text"
    assert engine.stats().little_found == 3


def test_the_share_found_is_said_once_and_then_to_who_debugs(
    engine: CacheTune, caplog: pytest.LogCaptureFixture
) -> None:
    """So that somebody who has just set a pipeline up sees that it works."""
    engine.precompute(PASSAGES[:2])
    tokens = [len(engine.prompts.encode(text)) for text in PASSAGES]
    with caplog.at_level(logging.DEBUG, logger="cachetune_rag.found_watch"):
        engine.prompt_from_text("Nothing was retrieved for this.")
        assert not caplog.records
        engine.prompt_from_text("\n".join(PASSAGES[:2]) + "\nWho?", retrieved=PASSAGES[:2])
        engine.prompt_from_text("\n".join(PASSAGES[1:3]) + "\nWho?", retrieved=PASSAGES[1:3])
    assert [(r.levelname, r.getMessage()) for r in caplog.records if r.levelno < logging.WARNING] == [
        ("INFO", f"found {sum(tokens[:2])} of {sum(tokens[:2])} retrieved tokens in the store (100%)"),
        (
            "DEBUG",
            f"found {tokens[1]} of {sum(tokens[1:3])} retrieved tokens in the store "
            f"({100 * tokens[1] // sum(tokens[1:3])}%)",
        ),
    ]


def test_what_is_only_about_to_be_stored_is_not_said_to_be_found(
    engine: CacheTune, caplog: pytest.LogCaptureFixture
) -> None:
    engine.precompute(PASSAGES[:1])
    tokens = [len(engine.prompts.encode(text)) for text in PASSAGES[:2]]
    shown = "\n".join(PASSAGES[:2]) + "\nWho?"
    with caplog.at_level(logging.INFO, logger="cachetune_rag.found_watch"):
        prompt = engine.prompt_from_text(shown, retrieved=[Chunk(text, "d") for text in PASSAGES[:2]])
    assert prompt.chunk_texts == tuple(PASSAGES[:2])
    share = 100 * tokens[0] // sum(tokens)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        f"found {tokens[0]} of {sum(tokens)} retrieved tokens in the store ({share}%)"
    ]


def test_each_kind_is_said_by_itself(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    engine.precompute(PASSAGES)
    for kind in ("stripped", "quoted", "stripped"):
        text = "\n".join(map(CHANGES[kind], PASSAGES))
        engine.prompt_from_messages([{"role": "user", "content": text}], retrieved=PASSAGES)
    assert [kind for kind in REASONS if f"reason: {kind} (" in caplog.text] == ["stripped", "quoted"]
    assert len(caplog.records) == 2


def test_what_is_stored_with_its_header_and_shown_without(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    engine.precompute([HEADER + text for text in PASSAGES])
    engine.prompt_from_text("\n\n".join(PASSAGES) + "\nWho?", retrieved=PASSAGES)
    assert "The likely reason: header" in caplog.text


def test_what_is_not_stored_and_what_is_not_shown(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    engine.prompt_from_text("\n\n".join(PASSAGES) + "\nWho?", retrieved=PASSAGES)
    assert "The likely reason: not stored" in caplog.text
    engine.precompute(PASSAGES)
    engine.prompt_from_text("In short: all is well at the shore. Who?", retrieved=PASSAGES)
    assert "The likely reason: not shown" in caplog.text


def test_nothing_is_said_where_enough_was_found_or_little_was_retrieved(
    engine: CacheTune, caplog: pytest.LogCaptureFixture
) -> None:
    engine.precompute(PASSAGES)
    engine.prompt_from_text("\n".join(PASSAGES) + "\nWho?", retrieved=PASSAGES)
    engine.prompt_from_text("x" * 90, retrieved=["y" * 90])
    engine.prompt_from_text("Short, and about something else.")
    engine.prompt_from_text("\n".join(map(str.strip, PASSAGES)), recognise=False, retrieved=PASSAGES)
    assert (caplog.records, engine.stats().little_found) == ([], 0)


def test_an_engine_without_chunks_says_nothing_of_long_prompts(
    engine: CacheTune, caplog: pytest.LogCaptureFixture
) -> None:
    engine.prompt_from_text("An agent's own long instructions. " * 100)
    assert not caplog.records


def test_comparing_gives_up_in_time(
    engine: CacheTune, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many texts are stored: with no time at all, one is looked at."""
    monkeypatch.setattr("cachetune_rag.chunks.found_watch.SECONDS", -1.0)
    looked: list[str] = []
    monkeypatch.setattr("cachetune_rag.chunks.alike.likeness", lambda text, _: looked.append(text) or 0.0)
    engine.precompute(PASSAGES)
    engine.prompt_from_text("Nothing of the kind. " * 100)
    assert len(looked) == 1
    assert "not stored" in caplog.text


def test_prometheus_counts_such_prompts(engine: CacheTune) -> None:
    registry = CollectorRegistry()
    registry.register(CacheTuneCollector(engine))
    engine.prompt_from_text("Nothing of the kind.", retrieved=PASSAGES)
    assert registry.get_sample_value("cachetune_little_found_prompts_total") == 1
    assert registry.get_sample_value("cachetune_cut_short_prompts_total") == 0
