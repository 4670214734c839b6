"""Both that look for ends of sentences know the same marks: what a chunk is cut within, and what is recomputed whole."""

from __future__ import annotations

import pytest
from tiny import tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cachetune_rag.text.prompts.continuations import Continuations
from cachetune_rag.text.prompts.segments import Prompt, Span
from cachetune_rag.text.prompts.sentence_ends import MARKS, OTHER_MARKS
from cachetune_rag.text.prompts.sentences import Sentences

FIRST = "It is old. The code of the mill"


def sentences_of(text: str, spelling: PreTrainedTokenizerFast | None = None) -> list[str]:
    """The sentences of a chunk; each byte is a token."""
    made = spelling or tokenizer()
    ids = tuple(made.encode(text, add_special_tokens=False))
    numbers = Sentences(made)(Prompt(ids, (Span(0, len(ids), 0),), (ids,), (text,)))
    found = [made.decode([i for i, m in zip(ids, numbers, strict=True) if m == n]) for n in range(numbers.max() + 1)]
    return [sentence.strip() for sentence in found]


@pytest.mark.parametrize(
    "sentences",
    [
        ["The pump costs 48.50 euros.", "The valve costs 48.05 euros."],
        ["Version 1.2.3 opens at 10:30.", "See https://example.com/a.html?x=1", "More"],
        ["It cost $3.5m.", "Who knows?!", "Nobody..."],
        ["| 1.5 | 2.7 |", "| 1;2 | a:b |"],
        ['He said "no."', '"Why?"', "(So it was.)", "Then:", "end"],
        ["行こう。", "と彼は言った。", "はい：", "そう"],
        ["ماذا؟", "نعم"],
        ["ሰላም።", "ሰላም።"],
    ],
)
def test_a_mark_within_a_number_a_name_or_an_address_ends_nothing(sentences: list[str]) -> None:
    """Each byte is a token, so that many of these marks are spelled by several."""
    between = "" if ord(sentences[0][0]) > 255 else "\n" if sentences[0][0] == "|" or "//" in sentences[1] else " "
    assert sentences_of(between.join(sentences)) == sentences


def ends(second: str) -> tuple[list[int], list[int]]:
    """How many letters the sentences of a second chunk have, and of what goes on in it with the first one's sentence. Each letter is a token."""
    vocab = {letter: number for number, letter in enumerate(dict.fromkeys("a" + FIRST + second))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.decoder = decoders.Fuse()
    letters = PreTrainedTokenizerFast(tokenizer_object=backend)
    one, two = (tuple(vocab[letter] for letter in text) for text in (FIRST, second))
    prompt = Prompt(one + two, (Span(0, len(one), 0), Span(len(one), len(one + two), 1)), (one, two), (FIRST, second))
    numbers = Sentences(letters)(prompt)[len(one) :].tolist()
    return [numbers.count(n) for n in dict.fromkeys(numbers)], [len(rest) for _, rest in Continuations(letters)(prompt)]


@pytest.mark.parametrize("mark", [*MARKS, *OTHER_MARKS, "."])
@pytest.mark.parametrize("closing", ["", "”", "）」"])
def test_both_end_at_a_mark(mark: str, closing: str) -> None:
    sentences, rests = ends(f"is 12{mark}{closing} Who knows")
    whole = len(f"is 12{mark}{closing}")
    assert sentences[0] == whole
    assert rests == [whole]


@pytest.mark.parametrize("end", [":", ";", "\n", "J."])
def test_what_ends_only_what_is_recomputed(end: str) -> None:
    """A cut sentence is followed over a colon, a line break or an initial, since its end is what its beginning lacks."""
    sentences, rests = ends(f"is 12 {end} Who knows. No")
    assert sentences[0] == len(f"is 12 {end}")
    assert rests == [len(f"is 12 {end} Who knows.")]
