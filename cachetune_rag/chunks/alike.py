"""Stored texts that are much like a given one: what was meant, where the exact text is not found."""

from __future__ import annotations

import time
from collections.abc import Iterable
from heapq import nlargest

from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.text.recognising.text_changes import likeness, pieces_of

SURE = 0.5
"""A text of which more than this share is found in another one is surely a form of it."""


def texts_alike(recognizer: StoreRecognizer, shown: str, most: int, seconds: float) -> list[str]:
    """Stored texts that `shown` seems to have in another form, the likeliest first.

    Texts that stand in it to the character are left out: they are found.

    Args:
        recognizer: knows what is stored.
        shown: a prompt, or a part of one.
        most: how many texts are wanted. The search ends once it has so many that surely are forms of what is shown.
        seconds: the longest that the search takes; then what was found until then is returned.

    Raises:
        StoreError: the store's texts can't be read.
    """
    pieces = pieces_of(shown)
    until = time.monotonic() + seconds

    def look(texts: Iterable[str]) -> list[str]:
        shares: list[tuple[float, str]] = []
        sure = 0
        for text in texts:
            share = likeness(text, pieces)
            if share and text not in shown:
                shares = nlargest(most, [*shares, (share, text)])
                sure += share > SURE
            if sure == most or time.monotonic() > until:
                break
        return [text for _, text in shares]

    return recognizer.scan(look)
