"""The text of stretches of a prompt's tokens. Control tokens are spelt out, and no character is lost where it spans two stretches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8
"""Tokens before a stretch that are decoded with it: they decide whether it begins with a blank."""
_INCOMPLETE = "\ufffd"


class Spelling:
    """Spells the tokens of one prompt.

    Args:
        tokenizer: the model's.
        ids: all of the prompt's tokens.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]):
        self._tokenizer, self._ids = tokenizer, list(ids)

    def text(self, start: int, end: int) -> str:
        """What the tokens [start, end) spell; texts of neighbouring stretches, joined, are the text of both.

        A character whose bytes are in two stretches belongs to the second one.
        """
        first = max(0, start - _CONTEXT)
        whole, before = self._decode(first, end), self._decode(first, start)
        if end < len(self._ids):
            whole = whole.rstrip(_INCOMPLETE)
        return whole[len(before.rstrip(_INCOMPLETE)) :]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
