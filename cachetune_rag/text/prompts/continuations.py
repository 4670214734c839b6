"""Where a sentence begins in one chunk of a prompt and goes on in the next.

It is told by the chunks' token ids alone, so every way to make a prompt, and every process that has a part of the model, finds the same.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from cachetune_rag.text.prompts.segments import Prompt
from cachetune_rag.text.prompts.sentence_ends import CLOSING, MARKS, OTHER_MARKS

MOST_TOKENS = 64
"""Most tokens of a continuation. A sentence that goes on for longer is a list, or no sentence."""
_TAIL = 128
"""Tokens at the end of a chunk that show whether it breaks off within a sentence."""
_HEAD = MOST_TOKENS + 8
"""Tokens at the beginning of a chunk that are looked at: some more than the longest continuation, because what follows shows where it ends."""
_OVERLAP = 16
"""Tokens at the beginning of a chunk that show whether the chunk before has them, too."""
_NEAR = 16
"""Most tokens between two chunks that follow each other. A separator has one or two."""
_KNOWN = 2048
"""Beginnings and ends of chunks that are remembered: those of a few dozen long prompts."""

_STOP = rf"(?:[{MARKS}]|(?<!\b[^\W\d_])\.)"
"""A letter alone before a full stop is an initial, or part of an abbreviation."""
_BETWEEN = re.compile(rf"{_STOP}{CLOSING}\s+(?=[^\sa-z])|[{OTHER_MARKS}]{CLOSING}\s*|\n\s*\n")
"""Between two sentences, or two paragraphs."""
_SENTENCES = re.compile(rf"\w[.!?]{CLOSING} +[\"'(\[“‘«]*\w|[{OTHER_MARKS}]")
"""Where prose has ended a sentence. Titles, tables and code don't."""
_END = re.compile(rf"{_STOP}{CLOSING}(?=\s+[^\sa-z]|\s*\Z)|[{OTHER_MARKS}]{CLOSING}|\n\s*\n")
PART = "\ufffd"
"""What stands for a part of a character. It counts as a letter."""
_UNFINISHED = re.compile(rf"[\w,;，、；{PART}]\Z")


class Continuation(NamedTuple):
    """A sentence that two chunks share. Both ranges are places in the prompt, and not empty.

    Attributes:
        begun: where it begins: the end of the first chunk, and what stands between both.
        rest: where it goes on: the first tokens of the second chunk, up to the sentence's end.
    """

    begun: range
    rest: range


FindContinuations = Callable[[Prompt], tuple[Continuation, ...]]
"""Finds those of a prompt, in its order."""


def no_continuations(prompt: Prompt) -> tuple[Continuation, ...]:
    """None: for prompts of token ids that spell no text."""
    return ()


class Continuations:
    """Finds continuations (`FindContinuations`). Safe to use from many threads.

    Args:
        tokenizer: the model's; nothing may change it.
    """

    def __init__(self, tokenizer: Any):
        self._pieces = Pieces(tokenizer)
        self._begun = lru_cache(_KNOWN)(self._count_begun)
        self._rest = lru_cache(_KNOWN)(self._count_rest)

    def __call__(self, prompt: Prompt) -> tuple[Continuation, ...]:
        """Those of a prompt, in its order."""
        found = []
        spans = sorted((s for s in (*prompt.passed, *prompt.spans) if s.start < s.end), key=lambda s: s.start)
        for first, second in pairwise(spans):
            if second.start - first.end > _NEAR or second in prompt.passed:
                continue
            documents = {prompt.chunk_documents[first.chunk], prompt.chunk_documents[second.chunk]} - {None}
            if len(documents) > 1 or prompt.chunk_ids[first.chunk] == prompt.chunk_ids[second.chunk]:
                continue
            before, after = prompt.chunk_ids[first.chunk], prompt.chunk_ids[second.chunk]
            rest = self._rest(after[:_HEAD])
            begun = self._begun(before[-_TAIL:]) if rest else 0
            # Tokens at a chunk's edges may stand in the prompt in another form, outside of its span.
            start = max(first.start, first.start - first.first + len(before) - begun)
            end = min(second.end, second.start - second.first + rest)
            if begun and start < second.start < end and not self._overlap(before, after):
                found.append(Continuation(range(start, second.start), range(second.start, end)))
        return tuple(found)

    def _overlap(self, before: Sequence[int], after: Sequence[int]) -> bool:
        """Whether a chunk begins with what the one before has as well, as windows do: then it has the cut sentence whole."""
        return "".join(self._pieces(after[:_OVERLAP])).strip() in "".join(self._pieces(before))

    def _count_begun(self, tail: tuple[int, ...]) -> int:
        """How many of a chunk's last tokens begin a sentence without ending it; 0 if it ends otherwise, or is no prose."""
        text, end = self._spelled(tail)
        text = text.rstrip()
        if not _UNFINISHED.search(text) or not _SENTENCES.search(text):
            return 0
        ends = [
            len(text[: between.end()].rstrip()) for between in _BETWEEN.finditer(text)
        ]  # a blank belongs to the next word's token
        return len(tail) - _tokens_to(ends[-1], len(tail), end) if ends else 0

    def _count_rest(self, head: tuple[int, ...]) -> int:
        """How many of a chunk's first tokens go on with a sentence; 0 if it begins with a sentence of its own, or with none.

        A capital letter begins a sentence. Where a script has none, only the chunk before shows whether one goes on.
        """
        text, end_of = self._spelled(head)
        first = text.lstrip()[:1]
        if not (first.isalnum() or first == PART) or first.isupper() or first.istitle():
            return 0
        end = _END.search(text, text.index(first))
        return min(MOST_TOKENS, len(head) if end is None else _tokens_to(end.end(), len(head), end_of))

    def _spelled(self, ids: Sequence[int]) -> tuple[str, Callable[[int], int]]:
        """The text of some tokens, and what tells how many characters of it the first ones have."""
        pieces = self._pieces(ids)
        text = "".join(pieces)
        if PART not in text:
            return text, list(accumulate(map(len, pieces), initial=0)).__getitem__
        # Characters of several tokens: only all of them together spell them.
        return self._pieces.text(ids), lambda count: len(self._pieces.text(ids[:count]).rstrip(PART))


class Pieces:
    """What tokens spell, one by one; it is remembered for each token of the vocabulary. Safe to use from many threads.

    Args:
        tokenizer: the model's; nothing may change it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Decoders of some vocabularies drop the blank before the first word of a text, so every token is spelled behind another one.
        self._alone = list(tokenizer.encode("a", add_special_tokens=False))
        self._first = self._alone[-1:]
        self._before = len(self._decode(self._first))
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """A piece for each token. A token that is a part of a character has `PART`."""
        known = self._known
        return [known[i] if i in known else self._spell(i) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        """What the tokens spell together."""
        return self._decode([*self._first, *ids])[self._before :]

    def ids(self, letter: str) -> list[int]:
        """The tokens of a letter that stands behind another one; none if the vocabulary can't spell it there."""
        whole: list[int] = self._tokenizer.encode(f"a{letter}", add_special_tokens=False)
        ids = whole[len(self._alone) :]
        return ids if self.text(ids) == letter else []

    def _spell(self, number: int) -> str:
        piece = self._known[number] = self.text([number])
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _tokens_to(place: int, count: int, end: Callable[[int], int]) -> int:
    """How many of `count` tokens it takes to spell the characters before `place`; see `Continuations._spelled`."""
    return bisect_left(range(1, count + 1), place, key=end) + 1
