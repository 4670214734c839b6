"""Recognising chunks in token ids: interiors to the token, edges by what they spell, and fast whatever is asked."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece

from cachetune_rag import PromptError
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.recognising import chunk_search
from cachetune_rag.text.recognising.chunk_search import RATE
from cachetune_rag.text.recognising.id_recognizer import ALIKE, ANCHOR, CREDIT, EDGE, LEAST, IdRecognizer
from cachetune_rag.text.recognising.id_spans import IdSpan
from cachetune_rag.text.recognising.named_chunks import find_named, joined
from cachetune_rag.text.recognising.spelling import Spelling

PIECES = {
    900: " ",
    901: "\n",
    902: "w1 w2 ",
    903: "w1",
    904: " w2 ",
    905: "w29 w30 ",
    906: "> w1 ",
    907: "w1 w2 w3 ",
    908: "w28 w29 w30 ",
}


def spell(ids: Iterable[int]) -> str:
    return "".join(PIECES.get(i, f"w{i} ") for i in ids)


def known(*chunks: Sequence[int], spell: Callable[[Iterable[int]], str] | None = spell) -> IdRecognizer:
    recognizer = IdRecognizer(spell)
    recognizer.update(enumerate(chunks))
    return recognizer


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000, 50_000) for _ in range(count)]


CHUNK = list(range(1, 31))
MIDDLE = CHUNK[2:-2]


def test_whole_chunks_are_found_in_order() -> None:
    rng = random.Random(1)
    first, second = ids(rng, 40), ids(rng, LEAST)
    prompt = [5, *second, 6, 7, *first, *first]
    places = [(1, 1 + LEAST, 1), (3 + LEAST, 43 + LEAST, 0), (43 + LEAST, 83 + LEAST, 0)]
    for given_as in (prompt, tuple(prompt), np.array(prompt, np.int32)):
        found = known(first, second, spell=None).find(given_as)
        assert found == [IdSpan(*place) for place in places]
    assert [span.chunk_ids(prompt) for span in found] == [tuple(second), tuple(first), tuple(first)]


@pytest.mark.parametrize(
    ("before", "behind", "head", "tail"),
    [
        ([902], [], (1, 2), ()),  # two tokens joined into one
        ([903, 904], [905], (1, 2), (29, 30)),  # other tokens, fewer of them
        ([906], [], (1,), ()),  # the first one joined with what stands before it
        ([77], [78], (), ()),
        ([907], [908], (1, 2, 3), (28, 29, 30)),  # three tokens of one word
    ],
)
def test_other_tokens_that_spell_the_same_are_left_out(
    before: list[int], behind: list[int], head: tuple[int, ...], tail: tuple[int, ...]
) -> None:
    equal = CHUNK[len(head) : len(CHUNK) - len(tail)]
    prompt = [50, 51, *before, *equal, *behind, 52]
    start = 2 + len(before)
    (span,) = known(CHUNK).find(prompt)
    assert span == IdSpan(start, start + len(equal), 0, head, tail)
    assert span.chunk_ids(prompt) == tuple(CHUNK)
    assert (known(CHUNK, spell=None).find(prompt) == []) == bool(head or tail)


@pytest.mark.parametrize("changed", [0, 1, EDGE, 15, -EDGE - 1, -2, -1])
def test_a_passage_with_one_other_word_is_not_the_chunk(changed: int) -> None:
    other = list(CHUNK)
    other[changed] = 99
    assert known(CHUNK).find([50, *other, 51]) == []


def test_white_space_at_the_ends_may_be_missing() -> None:
    chunk = [900, 901, *range(3, 30), 901]
    (span,) = known(chunk).find(chunk[2:-1])
    assert span == IdSpan(0, len(chunk) - 3, 0, (900, 901), (901,))
    assert known([900, 1, *range(3, 30), 901]).find(range(3, 30)) == [], "a word is missing too"


def test_edges_at_the_beginning_and_the_end_of_a_prompt() -> None:
    recognizer = known(CHUNK)
    assert recognizer.find(CHUNK) == [IdSpan(0, 30, 0)]
    assert recognizer.find([902, *CHUNK[2:]]) == [IdSpan(1, 29, 0, (1, 2))]
    assert recognizer.find([*CHUNK[:-2], 905]) == [IdSpan(0, 28, 0, (), (29, 30))]
    assert recognizer.find(MIDDLE) == []
    assert recognizer.find(MIDDLE[:-1]) == recognizer.find([]) == recognizer.find([1]) == []


def test_short_chunks() -> None:
    recognizer = IdRecognizer(spell)
    assert not recognizer.add("a", CHUNK[: LEAST - 1])
    assert recognizer.find(CHUNK) == []
    assert recognizer.add("a", CHUNK[:LEAST])
    assert recognizer.find(CHUNK) == [IdSpan(0, LEAST, "a")]
    assert not recognizer.add("a", CHUNK[:3]), "a key that comes back with a short chunk is forgotten"
    assert len(recognizer) == 0


def test_first_then_longest() -> None:
    rng = random.Random(2)
    whole = ids(rng, 100)
    assert known(whole[:40], whole[:90], [*whole[:89], 1]).find(whole) == [IdSpan(0, 90, 1)]
    assert known(whole[:60], whole[20:]).find(whole) == [IdSpan(0, 60, 0)]
    assert known(whole[:60], whole[20:]).find(whole[1:]) == [IdSpan(19, 99, 1)]


def test_neighbours_share_no_token() -> None:
    """What both edges could be belongs to the first; what is another's interior never belongs to an edge."""
    rng = random.Random(3)
    middle = ids(rng, 4)
    first, second = [*ids(rng, 20), *middle[:2]], [*middle[:2], *ids(rng, 20)]
    prompt = [*first, *second[2:]]
    assert known(first, second).find(prompt) == [IdSpan(0, 22, 0), IdSpan(22, 42, 1, tuple(middle[:2]))]
    first, second = [*ids(rng, 20), *middle], [*middle, *ids(rng, 20)]
    prompt = [*first, *second[4:]]
    assert known(first, second).find(prompt) == [
        IdSpan(0, 23, 0, (), tuple(middle[3:])),
        IdSpan(23, 44, 1, tuple(middle[:3])),
    ]
    assert [s.chunk_ids(prompt) for s in known(first, second).find(prompt)] == [tuple(first), tuple(second)]


def test_of_chunks_with_one_interior_that_with_all_its_tokens_there_is_found_or_else_the_nearest() -> None:
    variants = [[902, 1000 + i, *MIDDLE, 29, 30] for i in range(200)]
    recognizer = known(*variants)
    for number in (0, 77, 199):
        assert recognizer.find([5, *variants[number], 6]) == [IdSpan(1, 31, number)]
    near = known(CHUNK, [1, 2, *MIDDLE, 905, 901], [7, 8, *MIDDLE, 29, 30])
    assert near.find([903, 904, *MIDDLE, 29, 30]) == [IdSpan(2, 30, 0, (1, 2))]


def test_adding_replacing_and_removing() -> None:
    rng = random.Random(4)
    first, second = ids(rng, 30), ids(rng, 30)
    recognizer = IdRecognizer(spell)
    recognizer.update([("a", first), ("b", first), ("a", first), ("c", first)])
    assert (len(recognizer), "b" in recognizer) == (3, True)
    for gone, left in (("a", {"b", "c"}), ("c", {"b"})):
        assert recognizer.remove(gone)
        assert not recognizer.remove(gone)
        assert {span.key for span in recognizer.find(first)} <= left
        assert len(recognizer.find(first)) == 1
    recognizer.add("b", second)
    assert recognizer.find(first) == []
    assert recognizer.find(second) == [IdSpan(0, 30, "b")]
    recognizer.add("d", first)
    recognizer.clear()
    assert (len(recognizer), recognizer.find([*first, *second])) == (0, [])
    recognizer.add("d", first)
    assert recognizer.find(first) == [IdSpan(0, 30, "d")]


@pytest.mark.parametrize(
    "odd", [[1.5, 2.0], "text", [True, "a"], [-1, 5], [1 << 32], [1 << 70], [[1, 2]], None, np.array([0.5])]
)
def test_what_is_no_token_ids_is_refused(odd: Any) -> None:
    recognizer = IdRecognizer(spell)
    for call in (recognizer.find, lambda ids: recognizer.add("a", ids)):
        with pytest.raises(PromptError, match="token ids are"):
            call(odd)


def expected(prompt: list[int], chunks: list[list[int]]) -> list[tuple[int, int]]:
    """Where interiors of chunks that stand there whole are found, said slowly."""
    found, at = [], EDGE
    while at < len(prompt):
        here = [c for c in chunks if len(c) >= LEAST and prompt[at - EDGE : at - EDGE + len(c)] == c]
        if here:
            found.append((at, at + max(map(len, here)) - 2 * EDGE))
        at = found[-1][1] if here else at + 1
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_agrees_with_the_slow_way(data: st.DataObject) -> None:
    tokens = st.integers(1, 2)
    chunks = data.draw(st.lists(st.lists(tokens, min_size=LEAST, max_size=40), min_size=1, max_size=8))
    parts = data.draw(st.lists(st.sampled_from(chunks) | st.lists(tokens, max_size=20), max_size=8))
    prompt = [token for part in parts for token in part]
    recognizer = known(*chunks, spell=None)
    found = recognizer.search(prompt).places
    assert found == expected(prompt, chunks)
    spans = recognizer.find(prompt)
    assert len(spans) == len(found)
    for span in spans:
        assert span.chunk_ids(prompt) == tuple(chunks[span.key])  # type: ignore[call-overload]
    assert all(a.end <= b.start for a, b in pairwise(spans))


def thue_morse(length: int) -> tuple[list[int], list[int]]:
    """Two sequences, different throughout, that any polynomial hash modulo 2**64 takes for one another."""
    one, other = [1], [2]
    while len(one) < length:
        one, other = one + other, other + one
    return one, other


def test_a_crafted_collision_is_not_the_chunk() -> None:
    one, other = thue_morse(2048)
    edges = [1000, 1001], [1002, 1003]
    mine, crafted = ([*edges[0], *middle, *edges[1]] for middle in (one, other))
    assert known(mine).find(crafted) == []
    assert [span.key for span in known(mine, crafted).find([*crafted, 5, *mine])] == [1, 0]


LENGTH = 30_000
REPEATED = {
    "one length": ([[1] * 500 + [2] * (EDGE + 1)], [1] * LENGTH),
    "many lengths": ([[1] * (100 + i) + [2] * (EDGE + 1) for i in range(1000)], [1] * LENGTH),
    "many lengths with other edges": ([[1] * (100 + i) + [2] * EDGE for i in range(1000)], [1] * LENGTH),
    "the shortest chunk everywhere": ([[1] * LEAST], [1] * LENGTH),
    "an interior with other edges": ([[5, 6, *MIDDLE, 7, i] for i in range(8, 1000)], MIDDLE * (LENGTH // 26)),
    "a short interior with other edges": ([[5, 5, 6, *[1] * ANCHOR, 7, 7, i] for i in range(8, 1000)], [1] * LENGTH),
    "equal hashes": (
        [[8, 9, *thue_morse(512)[0], 8, 9]],
        [token for half in thue_morse(512) for token in half] * (LENGTH // 1024),
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_hostile_prompts_cost_a_bounded_amount_of_work_a_token(name: str) -> None:
    chunks, prompt = REPEATED[name]
    compared = 0

    def counting(ids: Iterable[int]) -> str:
        nonlocal compared
        compared += 1
        return spell(ids)

    recognizer = known(*chunks, spell=counting)
    for times in (1, 2):
        compared, length = 0, times * len(prompt)
        hashes = recognizer.search(prompt * times).hashes
        assert hashes <= CREDIT + RATE * length + chunk_search.AT_A_TIME + 20 * chunk_search.BLOCK
        assert compared <= 4 * (CREDIT + RATE * length) // 1024 + 4 * ALIKE


def test_less_than_a_kilobyte_a_chunk() -> None:
    rng = np.random.default_rng(0)
    recognizer = IdRecognizer(spell)
    recognizer.add(-1, CHUNK)
    before = rng.integers(0, 50_000, (2000, 60))
    tracemalloc.start()
    recognizer.update(enumerate(before))
    assert tracemalloc.get_traced_memory()[0] < 1000 * len(before)
    tracemalloc.stop()


def test_many_threads() -> None:
    rng = random.Random(5)
    chunks = [ids(rng, 40) for _ in range(40)]
    recognizer = known(*chunks[:20])
    prompt = [token for chunk in chunks[:20] for token in chunk]
    wrong: list[int] = []

    def read() -> None:
        for _ in range(60):
            if (count := len(recognizer.find(prompt))) != 20:
                wrong.append(count)

    def write() -> None:
        for _ in range(30):
            for number, chunk in enumerate(chunks[20:]):
                recognizer.add(("other", number), chunk)
                recognizer.add(("same", number), chunks[0])
                recognizer.remove(("other", number))
                recognizer.remove(("same", number))

    threads = [threading.Thread(target=f) for f in (read, read, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert {span.key for span in recognizer.find(prompt)} == set(range(20))


# -- with tokenizers ------------------------------------------------------------------------------------------------

TEXTS = [
    "The river Seine runs through Paris; its oldest bridge was completed in 1607, another much later.",
    "question: how high is it? Answer the question using only the passages below.",
    "  5,642 metres high.\nThe passages below: user, system, assistant and tools.\n",
    "\u6f22\u5b57 and \u00fcml\u00e4uts, then the bridge was completed in 1607 below the passages.",
]
LAYOUTS = {
    "between blank lines": "Answer below.\n\n{0}\n\n{1}\n\n{2}\n\n{3}\n\nQuestion: how high?",
    "in a list": "Passages:\n- {0}\n- {1}\n* {2}\n1. {3}\nWhat?",
    "between tags": "<doc>{0}</doc><doc>{1}</doc>\n<doc>{2}</doc> ({3})",
    "without anything between": "{0}{1}{2}{3}",
    "in quotes": 'He said: "{0}" and "{1}", \'{2}\' and: {3}.',
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [byte_level, sentencepiece, lambda: sentencepiece(scheme="always")])
def test_chunks_are_found_whatever_a_tokenizer_does_at_their_edges(make: Callable[[], Any], layout: str) -> None:
    tokenizer = make()
    encode, spelling = PromptBuilder(tokenizer).encode, Spelling(tokenizer)
    chunks = [encode(text) for text in TEXTS]
    recognizer = known(*chunks, spell=spelling)
    for texts in (TEXTS, [text.strip() for text in TEXTS]):
        prompt = tokenizer(LAYOUTS[layout].format(*texts))["input_ids"]
        found = recognizer.find(prompt)
        assert [span.key for span in found] == [0, 1, 2, 3]
        assert [span.chunk_ids(prompt) for span in found] == [tuple(chunk) for chunk in chunks]
    other = tokenizer(LAYOUTS[layout].format(*TEXTS).replace("The river", "One river"))["input_ids"]
    assert [span.key for span in recognizer.find(other)] == [1, 2, 3]


def test_numbers_of_no_token_spell_nothing() -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        spelling = Spelling(tokenizer)
        assert spelling([(1 << 32) - 1, tokenizer.convert_tokens_to_ids("a")]) == "a"

    class InPython:
        def convert_ids_to_tokens(self, number: int) -> bytes:
            return [b"a", b"\xff"][number]

    assert Spelling(InPython())([0, 1, 2]) == "a\xff"


def test_named_texts_are_found_whether_stored_or_not() -> None:
    tokenizer = byte_level()
    encode = PromptBuilder(tokenizer).encode
    prompt = tokenizer(LAYOUTS["in a list"].format(TEXTS[1], TEXTS[0], TEXTS[1], "nothing"))["input_ids"]
    named = find_named([TEXTS[0], TEXTS[1], TEXTS[2], "short", TEXTS[1]], prompt, encode, Spelling(tokenizer))
    assert [span.key for span in named.spans] == [1, 0, 1]
    assert named.not_found == (2, 3)
    assert find_named([], prompt, encode, Spelling(tokenizer)).spans == ()


def test_spans_found_in_two_ways_are_joined() -> None:
    first = [IdSpan(5, 10, "a"), IdSpan(20, 30, "b")]
    others = [
        IdSpan(30, 40, 6),
        IdSpan(0, 5, 1),
        IdSpan(4, 6, 2),
        IdSpan(10, 20, 3),
        IdSpan(22, 24, 4),
        IdSpan(29, 31, 5),
    ]
    assert [span.key for span in joined(first, others)] == [1, "a", 3, "b", 6]
    assert joined([], []) == []
