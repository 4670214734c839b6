"""Turns tokens that come one at a time into text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTEXT = 16
"""How many of the last tokens are kept after their text was returned. They decide how the next tokens join."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\ufffd"
_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TextStream:
    """Turns tokens into pieces of text that later tokens don't change.

    All pieces joined are `tokenizer.decode(ids, skip_special_tokens=True)`, cut where the first stop string begins. As in transformers,
    stop strings are also searched for in the text with its special tokens: "<|im_end|>" ends the text, although it isn't shown.
    Incomplete characters, and text that may begin a stop string, are held back until the next token.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end the text.
        skip: ids that have no text, such as end tokens that the tokenizer doesn't call special.

    Attributes:
        stopped: whether a stop string was found. No text comes after it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, skip: Iterable[int] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = frozenset(skip)
        self._unstable = _CLEANED_UP if getattr(tokenizer, "clean_up_tokenization_spaces", False) else ()
        self._ids: list[
            int
        ] = []  # a window over the last tokens: all whose text was not returned yet, and some before them
        self._text = ""  # text of the window
        self._out = 0  # how many characters of it were returned
        self._whole = ""  # text of the window with its special tokens, if it has any
        self._special: list[tuple[int, int]] = []  # where the special tokens are in it
        self._in_bytes = False
        self._compact_at = 4 * _CONTEXT

    @property
    def window(self) -> int:
        """How many of the last tokens are kept. Each new token decodes them again."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Take the next token. Returns the text that is certain now, which may be empty."""
        if self.stopped or token in self._skip:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        silent = text == self._text
        # The text of a run of byte tokens changes as a whole if it turns out to be invalid. Tokens without text don't end the run.
        self._in_bytes = self._is_byte(token) or (self._in_bytes and silent)
        self._text = text
        certain = len(text.rstrip(_INCOMPLETE))
        if self._stop and (silent or self._special):
            self._see_special(silent)
        for end in sorted([*self._first_stop(certain), *self._first_special_stop()])[:1]:
            self.stopped = True
            return self._take(end)
        if self._in_bytes:
            return ""
        certain -= _overlap(text[self._out : certain], self._unstable)
        certain -= _overlap(text[self._out : certain], self._stop)
        piece = self._take(min(certain, self._special_certain()))
        if len(self._ids) >= self._compact_at and self._out == len(text):
            self._compact()
        return piece

    def finish(self) -> str:
        """The text that was held back. Call it once, after the last token."""
        return "" if self.stopped else self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._out : end]
        self._out = max(self._out, end)
        return piece

    def _first_stop(self, certain: int) -> list[int]:
        """Where the first stop string begins, or an empty list. It can't begin in text that was returned: that would have been held back."""
        found = [self._text.find(text, self._out, certain) for text in self._stop]
        return sorted(place for place in found if place >= 0)[:1]

    # Special tokens add no text. So the text with special tokens is only decoded after a token that added no text.

    def _see_special(self, silent: bool) -> None:
        before = self._whole if self._special else self._text
        self._whole = self._decode(self._ids, special=True)
        added = self._whole[len(before) :]
        if silent and (literal := added.strip()):
            start = len(before) + added.index(literal)
            self._special.append((start, start + len(literal)))

    def _first_special_stop(self) -> list[int]:
        """Where in the text a stop string begins that is a special token or contains one."""
        places = []
        for text in self._stop if self._special else ():
            for start, end in self._special:
                place = self._whole.find(text, max(0, start - len(text) + 1), end - 1 + len(text))
                if place >= 0:
                    places.append(max(self._out, self._shown(place)))
        return places

    def _special_certain(self) -> int:
        """How much of the text can't belong to the beginning of such a stop string."""
        if not self._special:
            return len(self._text)
        known = self._whole.rstrip(_INCOMPLETE)
        held = _overlap(known[max(0, self._special[0][0] - max(map(len, self._stop))) :], self._stop)
        return self._shown(len(known) - held)

    def _shown(self, place: int) -> int:
        """Turn a place in the text with special tokens into the place in the text without them."""
        # Counted from the end, because a tokenizer may strip the space at the beginning of only one of the two.
        behind = len(self._whole) - place - sum(max(0, end - max(start, place)) for start, end in self._special)
        return max(0, len(self._text) - behind)

    def _compact(self) -> None:
        """Drop the window's first tokens, if the others decode to the same text without them."""
        for keep in range(_CONTEXT, _CONTEXT + 4):  # a window that begins inside a character decodes to another text
            ids = self._ids[-keep:]
            text = self._decode(ids)
            whole = self._decode(ids, special=True) if self._special else ""
            if text and self._text.endswith(text) and self._whole.endswith(whole):
                cut = len(self._whole) - len(whole)
                self._special = [(start - cut, end - cut) for start, end in self._special if start >= cut]
                self._ids, self._text, self._whole, self._out = ids, text, whole, len(text)
                self._compact_at = 4 * _CONTEXT
                return
        self._compact_at = 2 * len(self._ids)

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))

    def _is_byte(self, token: int) -> bool:
        written = self._tokenizer.convert_ids_to_tokens(token)
        return written is not None and _BYTE_TOKEN.fullmatch(str(written)) is not None


def _overlap(text: str, patterns: Iterable[str]) -> int:
    """Length of the longest end of `text` with which a pattern begins, but which is not the whole pattern."""
    longest = 0
    for pattern in patterns:
        for length in range(min(len(pattern) - 1, len(text)), longest, -1):
            if text.endswith(pattern[:length]):
                longest = length
                break
    return longest
