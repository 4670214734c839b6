"""How lead-ins are chosen from texts, which of them a chunk is computed behind, and how a choice is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from cachetune_rag.checking.arguments import is_count
from cachetune_rag.errors import ConfigError
from cachetune_store import Namespace
from cachetune_store.printing import shown

COUNT = 4
"""Lead-ins that are chosen (docs/selection.md: 8 close 1.3 points more at ratio 0.05, at twice the cost)."""
TEXT_TOKENS = 255
"""Tokens of a lead-in behind its first one: text, and the separator."""
LEAST_TOKENS = 1024
"""Tokens of different texts that are needed to choose from."""
MOST_TOKENS = 1 << 16
"""Tokens of texts that are looked at before the choice."""
OVERLAP = 32
"""A lead-in that has so many tokens in a row in common with a chunk is left out of that chunk's mean."""

_FORMAT = "cachetune-lead-ins"
_MOST_LEAD_INS, _MOST_LENGTH = 64, 1 << 14

LeadIn = tuple[int, ...]


def choose_lead_ins(
    texts: Sequence[Sequence[int]], first: LeadIn, length: int, separator: LeadIn = (), count: int = COUNT
) -> tuple[LeadIn, ...] | None:
    """Choose stretches of texts, spread evenly over all of them. Returns None if the texts have too few tokens.

    The texts, one behind the other, are cut into as many parts as there will be lead-ins. From each part a stretch near its middle is
    taken, from the beginning of a text if one begins there. It ends with the separator, because in a prompt a chunk stands behind a
    separator and not in the midst of a sentence (docs/quality-closeness.md#what-stands-right-before-a-chunk).

    Args:
        texts: token ids of different texts, in order.
        first: what each lead-in begins with.
        length: tokens of each behind that.
        separator: what each ends with. It is left away if it would take more than a quarter of the length.
        count: how many lead-ins.
    """
    stream = list(chain.from_iterable(texts))
    if len(stream) < max(LEAST_TOKENS, count * length):
        return None
    starts = np.cumsum([0, *map(len, texts)])
    end = separator if 4 * len(separator) <= length else ()
    lead_ins = []
    for part in range(count):
        low, high = part * len(stream) // count, (part + 1) * len(stream) // count - length
        start = (low + high) // 2
        inside = starts[(starts >= low) & (starts <= high)]
        if len(inside):
            start = int(inside[np.abs(inside - start).argmin()])
        lead_ins.append((*first, *stream[start : start + length - len(end)], *end))
    return tuple(lead_ins)


def given_lead_ins(
    lead_in: Sequence[int] | Sequence[Sequence[int]] | str, first_token: int, vocabulary: int
) -> tuple[LeadIn, ...]:
    """The lead-ins that an engine starts with: the first token for "auto" and "first_token", else the given ones.

    Args:
        lead_in: what the user gave: one of these words, a list of token ids, or a list of such lists.
        first_token: the first token of all prompts.
        vocabulary: token ids are below this.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(lead_in, str) and lead_in in ("auto", "first_token"):
        return ((first_token,),)
    several = isinstance(lead_in, Sequence) and bool(lead_in) and all(isinstance(one, Sequence) for one in lead_in)
    lead_ins: Any = lead_in if several and not isinstance(lead_in, str) else [lead_in]
    for one in lead_ins:
        if (
            isinstance(one, str | bytes | bytearray)
            or not isinstance(one, Sequence)
            or not all(is_count(i, 0, vocabulary - 1) for i in one)
        ):
            raise ConfigError(
                f"lead_in is {shown(lead_in)}: use 'auto', 'first_token', a list of token ids from 0 to {vocabulary - 1}, or a "
                "list of such lists."
            )
    return tuple(tuple(one) for one in lead_ins)


def lead_ins_for(ids: Sequence[int], namespace: Namespace, limit: int | None = None) -> tuple[LeadIn, ...]:
    """The lead-ins over which a chunk's mean is taken: a function of the chunk and the namespace alone.

    Of several, those are left out that share a stretch with the chunk (it would see itself before itself), and
    those that don't fit into the model's context with it. If none is left, it is the token that they begin with.

    Args:
        ids: token ids of the chunk.
        namespace: what its key is made with.
        limit: most tokens that the model reads; None: any number.
    """
    lead_ins = namespace.lead_ins
    if len(lead_ins) == 1:
        return lead_ins
    stretches = _stretches(tuple(ids))
    kept = tuple(
        one
        for one in lead_ins
        if (limit is None or len(one) + len(ids) <= limit) and stretches.isdisjoint(_stretches_of_lead_in(one))
    )
    return kept or (lead_ins[0][:1],)


def least_tokens(namespace: Namespace) -> int:
    """Tokens that stand before a chunk at least, while it is computed."""
    lead_ins = namespace.lead_ins
    return len(lead_ins[0]) if len(lead_ins) == 1 else len(lead_ins[0][:1])


def note_of(namespace: Namespace) -> bytes:
    """A choice as it is written to a store. The digest is that of the whole namespace, lead-ins included: it shows any damage."""
    lead_ins = [list(one) for one in namespace.lead_ins]
    return json.dumps({"format": _FORMAT, "digest": namespace.digest, "lead_ins": lead_ins}).encode()


def choice_in(note: bytes, base: Namespace, vocabulary: int) -> Namespace | None:
    """The choice that a note holds.

    Args:
        note: made by `note_of`, perhaps damaged.
        base: the namespace before the choice.
        vocabulary: token ids are below this.

    Returns:
        `base` with the chosen lead-ins; None if the note is damaged, or not one of this namespace.
    """
    try:
        record = json.loads(note)
        lead_ins = record["lead_ins"]
        if record["format"] != _FORMAT or not 0 < len(lead_ins) <= _MOST_LEAD_INS:
            return None
        if not all(
            0 < len(one) <= _MOST_LENGTH and all(is_count(i, 0, vocabulary - 1) for i in one) for one in lead_ins
        ):
            return None
        found = replace(base, lead_ins=lead_ins)
        return found if found.digest == record["digest"] else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _stretches(ids: LeadIn) -> frozenset[bytes]:
    """Every run of `OVERLAP` tokens."""
    data = np.asarray(ids, dtype="<i4").tobytes()
    return frozenset(data[4 * i : 4 * (i + OVERLAP)] for i in range(len(ids) - OVERLAP + 1))


_stretches_of_lead_in = lru_cache(maxsize=64)(_stretches)
