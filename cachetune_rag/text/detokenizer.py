"""Text out of tokens that come one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTEXT = 16
"""Tokens kept for context once their text is out; the last of them decide how the next ones join on."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\ufffd"
_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TextStream:
    """Turns tokens into text pieces that never have to be taken back.

    All pieces joined are `tokenizer.decode(ids, skip_special_tokens=True)`, cut where the first stop string begins. Stop strings
    are sought in the text with its special tokens too, as transformers does: "<|im_end|>" stops, although it isn't shown.
    Held back until the next token decides: incomplete characters, and what may be the beginning of a stop string.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end the text.
        skip: ids without text (end tokens that the tokenizer doesn't call special, say).

    Attributes:
        stopped: whether a stop string was found; nothing comes after it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, skip: Iterable[int] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = frozenset(skip)
        self._unstable = _CLEANED_UP if getattr(tokenizer, "clean_up_tokenization_spaces", False) else ()
        self._ids: list[int] = []  # a window over the last tokens: all that are not out, and some before them
        self._text = ""  # text of the window
        self._out = 0  # characters of it that are out
        self._whole = ""  # text of the window with its special tokens, if it has any
        self._special: list[tuple[int, int]] = []  # where they stand in that
        self._in_bytes = False
        self._compact_at = 4 * _CONTEXT

    @property
    def window(self) -> int:
        """How many of the last tokens are kept. Each new token decodes them again."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, possibly none."""
        if self.stopped or token in self._skip:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        silent = text == self._text
        # A run of byte tokens that turns out invalid changes as a whole. Tokens without text don't end it.
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
        """The text that was still held back; call it once, after the last token."""
        return "" if self.stopped else self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._out : end]
        self._out = max(self._out, end)
        return piece

    def _first_stop(self, certain: int) -> list[int]:
        """Where the first stop string begins, or nothing. None begins in text that is out: it was held back."""
        found = [self._text.find(text, self._out, certain) for text in self._stop]
        return sorted(place for place in found if place >= 0)[:1]

    # Special tokens add no text. So only after a token that added none is the text with special tokens looked at as well.

    def _see_special(self, silent: bool) -> None:
        before = self._whole if self._special else self._text
        self._whole = self._decode(self._ids, special=True)
        added = self._whole[len(before) :]
        if silent and (literal := added.strip()):
            start = len(before) + added.index(literal)
            self._special.append((start, start + len(literal)))

    def _first_special_stop(self) -> list[int]:
        """Where in the text the first stop string begins that is a special token, or has one in it."""
        places = []
        for text in self._stop if self._special else ():
            for start, end in self._special:
                place = self._whole.find(text, max(0, start - len(text) + 1), end - 1 + len(text))
                if place >= 0:
                    places.append(max(self._out, self._shown(place)))
        return places

    def _special_certain(self) -> int:
        """How much of the text can't be the beginning of such a stop string."""
        if not self._special:
            return len(self._text)
        known = self._whole.rstrip(_INCOMPLETE)
        held = _overlap(known[max(0, self._special[0][0] - max(map(len, self._stop))) :], self._stop)
        return self._shown(len(known) - held)

    def _shown(self, place: int) -> int:
        """Where a place in the text with its special tokens is in the text without them."""
        # Counted from the end: a tokenizer may strip the space at the beginning of one of the two.
        behind = len(self._whole) - place - sum(max(0, end - max(start, place)) for start, end in self._special)
        return max(0, len(self._text) - behind)

    def _compact(self) -> None:
        """Shorten the window, if its end reads the same without its beginning."""
        for keep in range(_CONTEXT, _CONTEXT + 4):  # a window that begins inside a character would not
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
    """Length of the longest end of `text` that a pattern begins with, without being the whole pattern."""
    longest = 0
    for pattern in patterns:
        for length in range(min(len(pattern) - 1, len(text)), longest, -1):
            if text.endswith(pattern[:length]):
                longest = length
                break
    return longest
