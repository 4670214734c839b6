"""Why a text of a prompt is no stored chunk: the stored text that is most like it, and where the two begin to differ."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from heapq import nlargest

from cachetune_rag.chunks.alike import texts_alike
from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.explaining.explanation import NearText
from cachetune_rag.text.recognising.text_changes import REASONS, change_of, likeness, pieces_of
from cachetune_store import StoreError

_CANDIDATES = 8
_COMPARED = 4000  # characters of two texts that are compared to find the nearer one
_EXCERPT = 60
_ALTERED = "a text much like it is stored, with other words in it"
_PART = "a stored text is a part of it"
_WORD = re.compile(r"\w+")
_LIKE = 0.3  # the least likeness that is worth showing


def nearest(recognizer: StoreRecognizer, missed: Sequence[str], until: float) -> dict[str, NearText]:
    """For each text of a chunk that is not stored, the stored text that is most like it, if one is.

    All are looked for in one pass over the stored texts, which ends at `until` (`time.monotonic`): what was found until then is returned.
    Nothing is found where the store can't be read.
    """
    wanted = {shown: (pieces_of(shown), {word for word, _ in _words(shown[:_COMPARED])}) for shown in missed}
    alike: dict[str, list[tuple[float, str]]] = {shown: [] for shown in wanted}

    def look(texts: Iterable[str]) -> None:
        for text in texts if wanted else ():
            words = {word for word, _ in _words(text[:_COMPARED])}
            for shown, (pieces, of_shown) in wanted.items():
                share = max(likeness(text, pieces), len(words & of_shown) / max(1, len(words | of_shown)))
                if share > _LIKE and text != shown:
                    alike[shown] = nlargest(_CANDIDATES, [*alike[shown], (share, text)])
            if time.monotonic() > until:
                break

    try:
        recognizer.scan(look)
    except StoreError:
        return {}
    return {
        shown: found for shown, each in alike.items() if (found := _nearest([t for _, t in each], shown)) is not None
    }


def _nearest(candidates: Sequence[str], shown: str) -> NearText | None:
    best = max(candidates, key=lambda stored: _likeness(stored, shown), default=None)
    if best is None:
        return None
    if best in shown:
        return difference(shown, best, "altered", _PART)
    change = change_of(best, shown)
    if change is None and _likeness(best, shown) < _LIKE:
        return None
    if change in (None, "altered") or (change == "truncated" and shown.strip() not in best):
        return difference(shown, best, "altered", _ALTERED)
    return difference(shown, best, change)


def near_misses(recognizer: StoreRecognizer, seconds: float, shown: str, most: int = 4) -> tuple[NearText, ...]:
    """Stored texts that a text outside of all chunks shows in another form; nothing if the store can't be read."""
    try:
        candidates = texts_alike(recognizer, shown, most, seconds)
    except StoreError:
        return ()
    changed = [(stored, change_of(stored, shown)) for stored in candidates]
    return tuple(_placed(shown, stored, change) for stored, change in changed if change is not None)


def difference(shown: str, stored: str, change: str, meaning: str | None = None) -> NearText:
    """Where two texts begin to differ, with what stands there in both; `meaning` replaces that of the change."""
    at = _same(shown, stored)
    return NearText(
        change,
        meaning or REASONS[change],
        at,
        shown[max(0, at - _EXCERPT) : at],
        shown[at : at + _EXCERPT],
        stored[at : at + _EXCERPT],
    )


def _placed(shown: str, stored: str, change: str) -> NearText:
    """The difference to the place of `shown` where the longest stretch of the stored text's words stands."""
    here, there = _words(shown), _words(stored[:_COMPARED])
    match = _compared([word for word, _ in there], [word for word, _ in here]).find_longest_match()
    start = here[match.b][1] - there[match.a][1] if match.size else 0
    return difference(shown[max(0, start) :], stored, change)


def _same(one: str, other: str) -> int:
    """How many characters both begin with."""
    least = min(len(one), len(other))
    return next((at for at in range(least) if one[at] != other[at]), least)


def _likeness(stored: str, shown: str) -> float:
    """Share of their words that two texts have in common, in order, from 0 to 1."""
    one, other = ([word for word, _ in _words(text[:_COMPARED])] for text in (stored, shown))
    return _compared(one, other).ratio()


def _compared(one: Sequence[str], other: Sequence[str]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, one, other, autojunk=False)


def _words(text: str) -> list[tuple[str, int]]:
    """The words of a text, without case, each with its place."""
    return [(match[0].casefold(), match.start()) for match in _WORD.finditer(text)]
