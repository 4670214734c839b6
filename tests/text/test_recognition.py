"""Recognising stored chunk texts in plain strings: exact, longest first, and fast at scale."""

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachetune_rag.chunks.recognition import ANCHOR, ChunkRecognizer
from cachetune_rag.text.prompts.prompt import Chunk, Text


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(count))


def known(*texts: str) -> ChunkRecognizer:
    recognizer = ChunkRecognizer()
    recognizer.update(enumerate(texts))
    return recognizer


def expected(prompt: str, texts: list[str]) -> list[tuple[int, int]]:
    """What `find` returns, computed in the simplest way."""
    found, at = [], 0
    while at < len(prompt):
        length = max((len(t) for t in texts if len(t) >= ANCHOR and prompt.startswith(t, at)), default=0)
        if length:
            found.append((at, at + length))
        at += length or 1
    return found


def test_cuts_a_prompt_into_text_and_chunks() -> None:
    rng = random.Random(1)
    first, second = words(rng, 50), words(rng, 80)
    prompt = f"Context:\n{second}\n\n{first}\nQuestion: {first[:20]}?"
    assert known(first, second).segment(prompt) == [
        Text("Context:\n"),
        Chunk(second),
        Text("\n\n"),
        Chunk(first),
        Text(f"\nQuestion: {first[:20]}?"),
    ]


def test_no_separator_is_needed_and_repetition_is_fine() -> None:
    rng = random.Random(2)
    first, second = words(rng, 20), words(rng, 20)
    assert known(first, second).segment(first + second + first) == [Chunk(first), Chunk(second), Chunk(first)]


def test_the_longest_chunk_wins_and_a_longer_one_that_differs_does_not() -> None:
    rng = random.Random(3)
    whole = words(rng, 60)
    for length in (ANCHOR, 2 * ANCHOR - 1, 2 * ANCHOR, 200):
        recognizer = known(whole[:ANCHOR], whole[:length], whole[:length] + "!", whole)
        assert recognizer.segment(whole) == [Chunk(whole)]
        assert recognizer.find(whole[:-1])[0] == (0, length)


def test_leftmost_of_two_overlapping_chunks() -> None:
    whole = words(random.Random(4), 60)
    assert known(whole[:150], whole[100:]).find(whole) == [(0, 150)]


@pytest.mark.parametrize("changed", [0, 10, ANCHOR, 100, -1])
def test_one_changed_character_is_not_recognised(changed: int) -> None:
    text = words(random.Random(5), 40)
    other = list(text)
    other[changed] = "#"
    assert known(text).segment("".join(other)) == [Text("".join(other))]


def test_beyond_ascii() -> None:
    texts = ["Ünïcödé 漢字 🚀 " * 9, "\ud800" + "lone surrogate " * 5, "\0\n\t\u3000" * 20]
    prompt = "→" + "🚀".join(texts) + "é"
    recognizer = known(*texts)
    assert [s.text for s in recognizer.segment(prompt) if isinstance(s, Chunk)] == texts
    assert "".join(s.text for s in recognizer.segment(prompt)) == prompt


def test_short_chunks_and_empty_prompts() -> None:
    recognizer = ChunkRecognizer()
    assert not recognizer.add("a", "x" * (ANCHOR - 1))
    assert recognizer.segment("x" * 100) == [Text("x" * 100)]
    assert recognizer.add("a", "x" * ANCHOR)
    assert recognizer.segment("") == []
    assert recognizer.segment("x" * ANCHOR) == [Chunk("x" * ANCHOR)]
    assert not recognizer.add("a", "short now"), "a key that comes back with a short text is forgotten"
    assert len(recognizer) == 0


def test_adding_replacing_and_removing() -> None:
    rng = random.Random(6)
    first, second = words(rng, 30), words(rng, 30)
    recognizer = ChunkRecognizer()
    recognizer.update([("a", first), ("b", first), ("a", first)])
    assert len(recognizer) == 2
    assert recognizer.remove("a")
    assert not recognizer.remove("a")
    assert recognizer.segment(first) == [Chunk(first)], "still known under b"
    recognizer.add("b", second)
    assert recognizer.segment(first) == [Text(first)]
    assert recognizer.segment(second) == [Chunk(second)]
    assert "b" in recognizer
    recognizer.clear()
    assert recognizer.segment(second) == [Text(second)]
    assert (len(recognizer), recognizer.find(first)) == (0, [])


def test_stale_bits_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachetune_rag.text.recognising.known_sequences.STALE", 10)
    rng = random.Random(7)
    kept = words(rng, 30)
    recognizer = known(kept)
    for i in range(50):
        recognizer.add("passing", words(rng, 30) + str(i))
    assert recognizer.anchor_bits.count() <= 15
    assert recognizer.segment(kept) == [Chunk(kept)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_agrees_with_the_slow_way(data: st.DataObject) -> None:
    # two letters and a shared start, so that chunks overlap, nest and nearly match
    letters = st.text("ab", min_size=0, max_size=90)
    texts = data.draw(st.lists(st.builds(lambda tail: "ab" * (ANCHOR // 2) + tail, letters), min_size=1, max_size=8))
    texts += data.draw(st.lists(st.text("ab", min_size=20, max_size=120), max_size=4))
    parts = data.draw(st.lists(st.sampled_from(texts) | letters, max_size=8))
    prompt = "".join(parts)
    gone = data.draw(st.sets(st.sampled_from(range(len(texts)))))
    recognizer = known(*texts)
    for key in gone:
        recognizer.remove(key)
    kept = [text for i, text in enumerate(texts) if i not in gone]
    assert recognizer.find(prompt) == expected(prompt, kept)
    assert "".join(s.text for s in recognizer.segment(prompt)) == prompt


def test_many_threads() -> None:
    rng = random.Random(8)
    texts = [words(rng, 30) for _ in range(60)]
    recognizer = known(*texts[:30])
    prompt = "\n".join(texts[:30])
    wrong: list[str] = []

    def read() -> None:
        for _ in range(100):
            if sum(isinstance(s, Chunk) for s in recognizer.segment(prompt)) != 30:
                wrong.append("a chunk went missing")

    def write() -> None:
        for _ in range(30):
            for i, text in enumerate(texts[30:]):
                recognizer.add(("other", i), text)
                recognizer.remove(("other", i))

    threads = [threading.Thread(target=f) for f in (read, read, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("header", ["", "file_path: /data/documents/handbook.txt\ntitle: The handbook\n\n"])
def test_chunks_are_found_among_many_that_begin_alike(header: str) -> None:
    """How long it takes is measured in benchmarks/recognition.py."""
    rng = random.Random(9)
    vocabulary = [words(rng, 1) for _ in range(3000)]
    texts = [header + " ".join(rng.choices(vocabulary, k=rng.randint(100, 400))) for _ in range(1000)]
    recognizer = known(*texts)
    recognizer.update((i, f"{header}{i:06d} {texts[i % 1000][len(header) :]}") for i in range(1000, 20_000))
    picks = [rng.choice(texts) for _ in range(90)]
    prompt = "\n\n".join(picks)[:130_000] + "\nQuestion: what?"
    segments = recognizer.segment(prompt)
    assert sum(isinstance(s, Chunk) for s in segments) > 50
    assert "".join(s.text for s in segments) == prompt


def test_a_text_is_known_only_as_a_whole() -> None:
    text = words(random.Random(10), 40)
    recognizer = known(text, text)
    assert [recognizer.knows(each) for each in (text, text[:-1], f"{text} ", "short")] == [True, False, False, False]
    recognizer.remove(0)
    assert recognizer.knows(text), "still known under the other key"
    recognizer.remove(1)
    assert not recognizer.knows(text)
