"""The text that token ids spell, put together from the pieces in a tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_BYTE_LENGTH = len("<0x0A>")
_MARKS = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n", "\u0109": "\t", "\u010d": "\r"})
"""How vocabularies write white space: SentencePiece's lower block, and byte-level BPE's letters for blank, line feed, tab and return."""


class Spelling:
    """Gives the text that tokens spell, for comparing stretches of tokens.

    The pieces stay as the vocabulary writes them and are not decoded, since one token may be a part of a character. Safe to use from many
    threads.

    Args:
        tokenizer: a tokenizer of transformers; give a private copy if other code may change it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> str:
        """The pieces, joined."""
        pieces = self._pieces
        return "".join([pieces[i] if i in pieces else self._piece(i) for i in ids])

    def _piece(self, number: int) -> str:
        try:
            token = self._tokenizer.convert_ids_to_tokens(number)
        except (LookupError, ValueError, OverflowError, TypeError):  # of tokenizers in Python
            token = None
        if token is None:  # no token of the vocabulary: there are too many such numbers to keep them
            return ""
        piece = (
            token.decode("latin-1") if isinstance(token, bytes) else str(token)
        )  # bytes: as tokenizers on tiktoken have them
        if len(piece) == _BYTE_LENGTH and piece.startswith("<0x") and piece.endswith(">"):
            piece = chr(int(piece[3:5], 16))
        piece = self._pieces[number] = piece.translate(_MARKS)
        return piece
