"""Logs which share of the retrieved texts was found in prompts, and the likely reason where it is small. Without that, only longer times
would show it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from cachetune_rag.chunks.alike import texts_alike
from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.text.prompts.prompt import Prompt, Segment, Text
from cachetune_rag.text.recognising.text_changes import REASONS, change_of
from cachetune_store import StoreError

MUCH = 100
"""Retrieved tokens from which on it matters whether they are found."""
LITTLE = 0.5
"""If less than this share of the retrieved tokens is found, something is wrong."""
LONG = 1000
"""If the caller does not say what was retrieved, a prompt of more tokens than these is expected to have stored chunks."""
LITTLE_OF_PROMPT = 0.1
"""If they make up less than this share of such a prompt, something is wrong."""

SECONDS = 0.1
"""The longest time for which one prompt is compared with stored texts."""
_AT_ONCE = 0.5  # seconds of comparing after which pauses begin
_SPREAD = 100  # each comparison is then followed by a pause so many times as long
_TEXTS = 4

_log = logging.getLogger("cachetune_rag.found_watch")


class FoundWatch:
    """Looks at each prompt that went through recognition. Safe to use from many threads.

    If much was retrieved and little of it found, it compares the prompt with stored texts and logs a warning with the likely reason,
    each reason once. The comparison takes at most a tenth of a second, and a hundredth of the time in the long run.

    It also logs the share of the retrieved tokens that was found: for the first prompt at INFO, so that somebody who has just set up
    a pipeline sees whether it works, and for later prompts at DEBUG. No log line contains a text.

    Args:
        recognizer: knows what is stored.

    Attributes:
        prompts: how many prompts had little found in them, so far.
    """

    def __init__(self, recognizer: StoreRecognizer):
        self._recognizer = recognizer
        self._lock, self._comparing = threading.Lock(), threading.Lock()
        self._told: set[str] = set()
        self._said_share = False
        self._spent = self._due = 0.0
        self.prompts = 0

    def look(self, prompt: Prompt, segments: Sequence[Segment | str], retrieved: Sequence[str]) -> None:
        """Look at a prompt that was built.

        Args:
            prompt: the prompt.
            segments: its contents, cut into the chunks that were found and other texts.
            retrieved: the texts that were retrieved, if the caller said which.
        """
        found = sum(span.end - span.start for span in prompt.spans)
        if retrieved:
            self._say_share(prompt)
            little = prompt.retrieved >= MUCH and found < LITTLE * prompt.retrieved
        else:
            little = len(prompt.ids) > LONG and found < LITTLE_OF_PROMPT * len(prompt.ids) and len(self._recognizer) > 0
        if not little:
            return
        with self._lock:
            self.prompts += 1
        if time.monotonic() < self._due or not self._comparing.acquire(blocking=False):
            return
        try:
            self._explain(prompt, found, segments, retrieved)
        finally:
            self._comparing.release()

    def _say_share(self, prompt: Prompt) -> None:
        if not prompt.retrieved:
            return
        with self._lock:
            level, self._said_share = logging.DEBUG if self._said_share else logging.INFO, True
        if not _log.isEnabledFor(level):
            return
        # The prompt's chunks also include retrieved texts that stand in it and aren't stored yet: these don't count.
        chunks = zip(prompt.spans, prompt.chunk_texts, strict=True)
        stored = sum(span.end - span.start for span, text in chunks if self._recognizer.knows(text))
        found, retrieved = min(stored, prompt.retrieved), prompt.retrieved
        _log.log(
            level, "found %d of %d retrieved tokens in the store (%d%%)", found, retrieved, 100 * found // retrieved
        )

    def _explain(self, prompt: Prompt, found: int, segments: Sequence[Segment | str], retrieved: Sequence[str]) -> None:
        started = time.monotonic()
        shown = "\n".join(s.text if isinstance(s, Text) else s for s in segments if isinstance(s, Text | str))
        reason = self._reason(shown, retrieved)
        took = time.monotonic() - started
        self._spent += took
        if self._spent > _AT_ONCE:
            self._due = time.monotonic() + _SPREAD * took
        if reason is None or reason in self._told:
            return
        self._told.add(reason)
        what = (
            f"of {prompt.retrieved} retrieved tokens, {found} were found as stored chunks in their prompt"
            if retrieved
            else f"of {len(prompt.ids)} tokens of a prompt, {found} were found to be stored chunks"
        )
        _log.warning(
            "%s. The likely reason: %s (%s). What is not found is computed as plain text, which is as right and slower. A stored "
            "chunk is found where the prompt shows it to the character: docs/operations.md, 'Little was found'. Each reason is "
            "said once; stats() counts such prompts",
            what,
            reason,
            REASONS[reason],
        )

    def _reason(self, shown: str, retrieved: Sequence[str]) -> str | None:
        """The likely reason, a key of `REASONS`; None if the store's texts can't be read."""
        stored = [text for text in retrieved[:64] if self._recognizer.knows(text)]
        reasons = Counter(change_of(text, shown) or "not shown" for text in stored[:_TEXTS] if text not in shown)
        if not reasons:
            try:
                alike = texts_alike(self._recognizer, shown, _TEXTS, SECONDS)
            except StoreError:
                return None
            reasons = Counter(kind for text in alike if (kind := change_of(text, shown)) is not None)
        return reasons.most_common(1)[0][0] if reasons else "not stored"
