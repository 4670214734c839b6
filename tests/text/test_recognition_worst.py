"""Finding chunks stays linear in the prompt, whatever is stored and whatever is asked. Times are in benchmarks/recognition.py."""

from __future__ import annotations

import logging
import random
import threading
from typing import Any

import pytest

from cachetune_rag.chunks.recognition import ChunkRecognizer
from cachetune_rag.text.prompts.prompt import Chunk
from cachetune_rag.text.recognising import chunk_search
from cachetune_rag.text.recognising.chunk_recognizer import ANCHOR
from cachetune_rag.text.recognising.chunk_search import CREDIT, RATE

LENGTH = 60_000


def known(*texts: str) -> ChunkRecognizer:
    recognizer = ChunkRecognizer()
    recognizer.update(enumerate(texts))
    return recognizer


def thue_morse(length: int) -> tuple[str, str]:
    """Two texts of different letters throughout that any polynomial hash modulo 2**64 takes for one another."""
    one, other = "a", "b"
    while len(one) < length:
        one, other = one + other, other + one
    return one, other


NEAR_MISSES = {
    "one length": (["a" * 1000 + "b"], "a" * LENGTH),
    "many lengths": (["a" * (1024 + i) + "b" for i in range(1500)], "a" * LENGTH),
    "many periods": (["ab" * (600 + i) + "#" for i in range(700)], "ab" * (LENGTH // 2)),
    "all sizes": (["a" * (ANCHOR << level) + "b" for level in range(12)], "a" * LENGTH),
    "between short chunks": (["a" * (1024 + i) + "b" for i in range(1500)] + ["a" * ANCHOR], "a" * LENGTH),
    "equal hashes": ([thue_morse(2048)[0] + "c"], "".join(thue_morse(2048)) * (LENGTH // 4096)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_everywhere_cost_a_bounded_number_of_hashes_a_character(name: str) -> None:
    texts, prompt = NEAR_MISSES[name]
    once, twice = (known(*texts).search(prompt * times).hashes for times in (1, 2))
    for hashes, length in ((once, len(prompt)), (twice, 2 * len(prompt))):
        # What was begun when the credit ran out is finished.
        assert hashes <= CREDIT + RATE * length + chunk_search.AT_A_TIME + 20 * chunk_search.BLOCK


def test_a_chunk_behind_a_stretch_that_was_not_looked_at_whole_is_found() -> None:
    rng = random.Random(1)
    passage = " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(100))
    recognizer = known(*(["a" * (1024 + i) + "b" for i in range(1500)] + [passage]))
    prompt = "a" * LENGTH + ". " + "Something else, said at length. " * 4000 + passage
    found = recognizer.search(prompt)
    assert found.left_out > 0
    assert found.places == [(len(prompt) - len(passage), len(prompt))]


def test_texts_with_the_same_hash_are_told_apart() -> None:
    one, other = thue_morse(4096)
    recognizer = known(one + "tail", other + "tail")
    for text in (one + "tail", other + "tail"):
        assert recognizer.segment(f"x{text}y")[1] == Chunk(text)
    assert known(one).find(other + "c" * 40) == known(one).find(other) == []


def test_repetitions_that_are_stored_are_found_though_every_place_is_one_of_many_lengths() -> None:
    recognizer = known(*("a" * (1024 + i) for i in range(500)))
    found = recognizer.search("a" * LENGTH)
    assert found.places == [
        (start, min(start + 1523, LENGTH)) for start in range(0, LENGTH, 1523) if LENGTH - start >= 1024
    ]
    assert found.left_out == 0


def test_a_prompt_that_was_not_looked_at_whole_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    texts, prompt = NEAR_MISSES["many lengths"]
    recognizer = known(*texts)
    with caplog.at_level(logging.WARNING):
        recognizer.find(prompt)
        recognizer.find(prompt)
    assert recognizer.cut_short == 2
    assert len(caplog.records) == 1
    assert "computed as plain text" in caplog.text
    assert "aaa" not in caplog.text


def test_whoever_adds_a_chunk_does_not_wait_for_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search stands still in the middle until the chunk was added."""
    recognizer = known("a" * 100)
    inside, added = threading.Event(), threading.Event()
    between = chunk_search.PrefixHashes.between

    def slowly(hashes: chunk_search.PrefixHashes, *places: Any) -> Any:
        inside.set()
        assert added.wait(30)
        return between(hashes, *places)

    monkeypatch.setattr(chunk_search.PrefixHashes, "between", slowly)
    found: list[tuple[int, int]] = []
    searching = threading.Thread(target=lambda: found.extend(recognizer.find("a" * 150)))
    searching.start()
    assert inside.wait(30)
    recognizer.add("new", "b" * 100)
    recognizer.remove("new")
    added.set()
    searching.join()
    assert found == [(0, 100)]
