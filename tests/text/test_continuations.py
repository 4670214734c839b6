"""Where a sentence begins in one chunk of a prompt and goes on in the next is found in its token ids."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cachetune_rag.text.prompts.continuations import MOST_TOKENS, Continuations, Pieces
from cachetune_rag.text.prompts.prompt import Chunk, PromptBuilder
from cachetune_rag.text.prompts.segments import Prompt, Span
from cachetune_rag.text.recognising.id_spans import without_beginning

MILL = "The mill is old. It has a door. The access code of the mill"


def prompt_of(*chunks: str, separator: str = "\n\n") -> Prompt:
    return PromptBuilder(tokenizer(), chunk_separator=separator).build(query="Which code?", chunks=chunks)


def found(prompt: Prompt) -> list[tuple[str, str]]:
    def text(places: range) -> str:
        words: str = tokenizer().decode(list(prompt.ids[places.start : places.stop]))
        return words

    return [(text(begun).strip(), text(rest)) for begun, rest in Continuations(tokenizer())(prompt)]


@pytest.mark.parametrize(
    ("first", "second", "begun", "rest"),
    [
        (MILL, "is 48213. Nobody knows it.", "The access code of the mill", "is 48213."),
        (MILL + " is", "48213! Nobody knows it.", "The access code of the mill is", "48213!"),
        (MILL, "is 3.5 e.g. today (or so). No. It", "The access code of the mill", "is 3.5 e.g. today (or so)."),
        (MILL, "was set by J. Smith. Nobody knows it.", "The access code of the mill", "was set by J. Smith."),
        (MILL, "is 48213\n\nMore of it", "The access code of the mill", "is 48213\n\n"),
        ("It is old. It is a hou", "se of wood. More.", "It is a hou", "se of wood."),
        ("One.\n\nTwo. And\n\nthe code is", "48213.", "the code is", "48213."),
        ("| bolt | 12 |\n| nut |", "8 | new |\n| wire | 3 |", "| nut |", "8 | new |"),
        ("| bolt | 12 |\n| nut", "| 8 |\n| wire | 3 |", "| nut", "| 8 |"),
        ("| bolt | 12 |\n| Nut", "Small | 8 |", "| Nut", "Small | 8 |"),
    ],
)
def test_a_sentence_that_goes_on_is_found(first: str, second: str, begun: str, rest: str) -> None:
    ((before, after),) = found(prompt_of("Something else.", first, second, "Something else."))
    assert before.endswith(begun)  # a token may reach into the sentence before
    assert len(before) <= len(begun) + 2
    assert after.startswith(rest)
    assert len(after) <= len(rest) + 2


@pytest.mark.parametrize(
    "chunks",
    [
        (MILL + " is new.", "Nobody knows it. The door is shut."),
        ("is 48213. Nobody knows it.", MILL),  # not one behind the other, so no prompt has the sentence
        (MILL, "Is it known? It is not."),
        ("A title", "and another title"),  # no prose
        ("for x in names:\n    total += x\nreturn total", "def more(x):\n    return x"),
        ("| bolt | 12 |\n| nut | 8 |", "| wire | 3 |"),
        ("| bolt | 12 |\n| nut | 8 |", "Wires are sold by weight."),
        ("| bolt | 12 |\n| nut | 8 |\n", "3 | 4 |"),
        ("Bolts and nuts", "3 | 4 |"),
        ("It is old. It cost 12", "", "Twelve. No more."),
        (MILL,),
        (),
    ],
)
def test_nothing_is_found_where_no_sentence_goes_on(chunks: tuple[str, ...]) -> None:
    assert found(prompt_of(*chunks)) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The mill is old. It has a door that creaks. The access code of the mill", "a door that creaks. The access code of the mill is 48213. Nobody"),
        # The last window of a document may add nothing to the one before.
        ("The mill is old. It has a door. The access code of the mill is 48213, says the miller", "is 48213, says the miller"),
        # What is shared stands there twice, and only the second time at the end.
        ("It is old. It is cold, it is old and it is cold, it is old", "it is cold, it is old and grey. More."),
        ("磨坊很旧。它有一扇门。磨坊的密码", "它有一扇门。磨坊的密码是48213。没有人知道。"),  # each byte is a token here
    ],
)  # fmt: skip
def test_windows_that_overlap_have_the_sentence_whole(first: str, second: str) -> None:
    assert found(prompt_of(first, second)) == []


@pytest.mark.parametrize(
    ("first", "second", "begun", "rest"),
    [
        ("The mill is new. " + MILL, "is new.", "The access code of the mill", "is new."),
        (
            "| nut | 8 | red |\n| bolt | 12 | red |\n| wire |",
            "12 | red |",
            "| wire |",
            "12 | red |",
        ),
        (
            "磨坊很旧。它有一扇门。磨坊的密码和大门",
            "的密码和门的颜色。没有人知道。",
            "磨坊的密码和大门",
            "的密码和门的颜色。",
        ),
        # As long as a window's overlap, but not at the end of the first chunk.
        (
            "The door is kept shut in winter, as the miller says. It is old. The gate of the mill",
            "is kept shut in winter, as the miller says. Nobody knows it.",
            "The gate of the mill",
            "is kept shut in winter, as the miller says.",
        ),
    ],
)
def test_a_rest_that_the_chunk_before_has_elsewhere_is_no_overlap(
    first: str, second: str, begun: str, rest: str
) -> None:
    ((before, after),) = found(prompt_of(first, second))
    assert before.endswith(begun)
    assert after.startswith(rest)


def test_chunks_far_apart_are_no_neighbours() -> None:
    far = " and then, a long while later, somebody else came by and said: "
    assert found(prompt_of(MILL, "is 48213. Nobody knows it.", separator=far)) == []


def test_a_sentence_without_end_is_followed_for_some_tokens() -> None:
    prompt = prompt_of(MILL, "and so on " * 60)
    ((_, rest),) = Continuations(tokenizer())(prompt)
    assert rest == range(prompt.spans[1].start, prompt.spans[1].start + MOST_TOKENS)


def test_only_what_the_prompt_has_of_a_chunk_is_taken() -> None:
    """Where chunks are recognised in token ids, the prompt may have their first and last tokens in another form."""
    whole = prompt_of(MILL, "is 48213. Nobody knows it.")
    ((begun, rest),) = Continuations(tokenizer())(whole)
    first, second = whole.spans
    parts = (Span(first.start, first.end - 2, 0), Span(second.start + 1, second.end, 1, first=1))
    part = Prompt(whole.ids, parts, whole.chunk_ids, whole.chunk_texts)
    ((begun_there, rest_there),) = Continuations(tokenizer())(part)
    assert begun_there == range(begun.start, second.start + 1)
    assert rest_there == range(second.start + 1, rest.stop)


def test_scripts_without_capital_letters_and_blanks() -> None:
    first, second = "磨坊很旧。它有一扇门。磨坊的密码", "是48213。没有人知道。"
    vocab = {letter: number for number, letter in enumerate(dict.fromkeys("a" + first + second))}
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")))
    one, two = (tuple(vocab[letter] for letter in text) for text in (first, second))
    prompt = Prompt(one + two, (Span(0, len(one), 0), Span(len(one), len(one + two), 1)), (one, two), (first, second))
    ((begun, rest),) = Continuations(letters)(prompt)
    assert [first[begun.start :], second[: len(rest)]] == ["磨坊的密码", "是48213。"]


def test_a_beginning_that_was_computed_before_is_one_all_the_same() -> None:
    """A server may have the first chunks of a prompt already, as full prefill computes them."""
    whole = prompt_of("Something else.", MILL, "is 48213. Nobody knows it.")
    ((begun, rest),) = Continuations(tokenizer())(whole)
    for count in (begun.start + 3, begun.stop, rest.start + 2):
        part = without_beginning(whole, count)
        ((_, left),) = Continuations(tokenizer())(part)
        assert left == range(max(count, rest.start), rest.stop)
    assert Continuations(tokenizer())(without_beginning(whole, rest.stop)) == ()


def test_chunks_of_different_documents_and_the_same_chunk_twice_do_not_go_on() -> None:
    builder = PromptBuilder(tokenizer())

    def of(*documents: str | None) -> int:
        texts = (MILL, "is 48213. Nobody knows it.")
        chunks = [Chunk(text, document=name) for text, name in zip(texts, documents, strict=True)]
        return len(Continuations(tokenizer())(builder.build(query="Which code?", chunks=chunks)))

    assert [of("a", "a"), of(None, "a"), of("a", None)] == [1, 1, 1]
    assert of("a", "b") == 0
    twice = "goes on here. It is old. The access code of the mill"
    assert found(prompt_of(twice, twice)) == []


def test_letters_of_several_tokens() -> None:
    """Each byte is a token here, so that no token spells such a letter."""
    first, second = "磨坊很旧。它有一扇门。磨坊的密码", "是48213。没有人知道。"
    ((begun, rest),) = found(prompt_of(first, second))
    assert (begun, rest) == ("磨坊的密码", "是48213。")


def test_a_token_that_is_part_of_a_letter_counts_as_one() -> None:
    """Each byte of "é" is a token here. What stands before it shows that a sentence goes on."""
    assert found(prompt_of("It is old. It is a caf\u00e9", "\u00e9tait bien. More.")) == [
        ("It is a caf\u00e9", "\u00e9tait bien.")
    ]


def test_each_token_is_spelled_once() -> None:
    """Decoding takes longer than all the rest, and the same tokens come again and again."""

    class Counted:
        calls = 0

        def encode(self, text: str, **options: Any) -> list[int]:
            ids: list[int] = tokenizer().encode(text, **options)
            return ids

        def decode(self, ids: list[int], **options: Any) -> str:
            self.calls += 1
            text: str = tokenizer().decode(ids, **options)
            return text

    counted = Counted()
    find, prompt = Continuations(counted), prompt_of(MILL, "is 48213. Nobody knows it.", "It is old.")
    first = find(prompt)
    calls = counted.calls
    assert find(prompt) == first
    assert counted.calls == calls <= 1 + len(set(prompt.ids))


@pytest.mark.parametrize("blank", ["Ġ", "▁"])
def test_blanks_before_words_are_kept(blank: str) -> None:
    """SentencePiece's decoder drops the first one of a text."""
    decoder: Any = decoders.ByteLevel() if blank == "Ġ" else decoders.Metaspace()
    backend = Tokenizer(models.WordLevel({"a": 0, f"{blank}is": 1, "is": 2}, unk_token="a"))
    backend.decoder = decoder
    assert Pieces(PreTrainedTokenizerFast(tokenizer_object=backend))([1, 2, 1]) == [" is", "is", " is"]
