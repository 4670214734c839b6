"""Both that look for ends of sentences know the same marks: what a chunk is cut within, and what is recomputed whole."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cachetune_rag.text.prompts.continuations import Continuations
from cachetune_rag.text.prompts.segments import Prompt, Span
from cachetune_rag.text.prompts.sentence_ends import MARKS, OTHER_MARKS
from cachetune_rag.text.prompts.sentences import Sentences

FIRST = "It is old. The code of the mill"


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
@pytest.mark.parametrize("closing", ["", "”"])
def test_both_end_at_a_mark(mark: str, closing: str) -> None:
    sentences, rests = ends(f"is 12{mark}{closing} Who knows")
    whole = len(f"is 12{mark}{closing}")
    assert sentences[0] in (len(f"is 12{mark}"), whole)
    assert rests == [whole]


@pytest.mark.parametrize("end", [":", ";", "\n", "J."])
def test_what_ends_only_what_is_recomputed(end: str) -> None:
    """A cut sentence is followed over a colon, a line break or an initial, since its end is what its beginning lacks."""
    sentences, rests = ends(f"is 12 {end} Who knows. No")
    assert sentences[0] == len(f"is 12 {end}")
    assert rests == [len(f"is 12 {end} Who knows.")]
