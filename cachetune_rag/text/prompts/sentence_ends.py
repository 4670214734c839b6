"""The marks at which sentences end, for everything that looks for sentences. What else is an end differs: `continuations.py` and `sentences.py` say what and why."""

from __future__ import annotations

MARKS = "!?…"
"""Marks that end a sentence in scripts that put a blank behind it, beside the full stop, which abbreviations and numbers have as well."""
OTHER_MARKS = "。！？।॥؟։።"
"""Marks that end a sentence in scripts that need no blank behind it."""
CLOSING = r"[\"')\]”’»」』）】》〉]*"
"""What may stand between a mark and the next sentence: a pattern."""
