"""Lead-ins: what stands before a chunk while it is computed, and the namespace of keys that follows from that.

A chunk that is computed alone knows nothing of what will stand before it. Behind several stretches of the same corpus, it
shows how much that matters: the mean of its keys and values is closer to what they will be than any one of them, and their
spread says which tokens to distrust (docs/selection.md).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import numpy as np

from cachetune_rag.checking.arguments import is_count
from cachetune_rag.concurrency.deadline import Call, call_directly
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import ConfigError
from cachetune_store import ChunkStore, Namespace, StoreError, StorePathError
from cachetune_store.printing import shown

COUNT = 4
"""Lead-ins that are chosen (docs/selection.md: 8 close 1.3 points more at ratio 0.05, at twice the cost)."""
TEXT_TOKENS = 255
"""Tokens in each behind the first: text, and what stands between the chunks of a prompt."""
LEAST_TOKENS = 1024
"""Tokens of different texts there must be to choose from."""
MOST_TOKENS = 1 << 16
"""Tokens of texts that are looked at before choosing."""
OVERLAP = 32
"""A lead-in that shares so many tokens in a row with a chunk is left out of the chunk's mean."""

LATELY = 1.0
"""Seconds for which a choice that was read is taken to stand, where requests look chunks up."""

RETRY = 5.0
"""Seconds until requests try again to write a choice that couldn't be written. Precompute tries at once."""

_FORMAT = "cachetune-lead-ins"
_MOST_LEADS, _MOST_LENGTH = 64, 1 << 14

_log = logging.getLogger(__name__)

Lead = tuple[int, ...]


class LeadIns:
    """The lead-ins of an engine's chunks, and the namespace of their keys: one object for all that make or look up keys.

    Given ones are kept to. Otherwise chunks stand behind the prompt's first token alone, until texts were seen to choose
    better ones from. The choice is made once for a store (and model, tokenizer, dtype and tenant), written there as a note,
    and followed by every engine on that store, whichever process made it, until the tenant is deleted. Safe to use from many
    threads.

    Args:
        store: where the choice is kept.
        namespace: with the lead-ins that hold until then, or for good.
        choose: whether they may give way to chosen ones.
        vocabulary: token ids are below this.
        limit: most tokens that the model reads.
        separator: what stands between the chunks of a prompt, and so right before most of them.
        call: `call(work, *args)` makes a call that may touch the store's disk.
    """

    def __init__(
        self,
        store: ChunkStore,
        namespace: Namespace,
        *,
        choose: bool,
        vocabulary: int,
        limit: int | None,
        separator: Sequence[int] = (),
        call: Call = call_directly,
    ) -> None:
        self._store, self._base, self._choose, self._call = store, namespace, choose, call
        self._vocabulary, self._limit, self._separator = vocabulary, limit, tuple(separator)
        self._last_read: tuple[bytes, Namespace] | None = None
        self._read_at = 0.0
        self._lock, self._origin = threading.Lock(), this_process()
        self._seen: dict[Lead, None] = {}  # different texts that were offered, too few to choose from, in order
        self._wanted: Namespace | None = None  # a choice that is made, and couldn't be written yet
        self._retry_at, self._reason = 0.0, ""
        self._filled: bool | None = None
        self._texts_gone = 0  # the store's `texts_gone` when texts were last seen

    @property
    def namespace(self) -> Namespace:
        """That of chunks stored or looked up now. It may change at any time: take it once for all keys of a request."""
        self._origin.check()
        if not self._choose:
            return self._base
        try:
            return self._read() or self._base
        except StorePathError as error:
            # What can't be read for the moment is no reason to refuse an answer.
            _log.warning("lead-ins: %s", error)
            return self._chosen[1] if self._chosen else self._base

    @property
    def lately(self) -> Namespace:
        """`namespace` as a choice said within the last second: for looking chunks up, where all that an old one costs is a miss."""
        chosen = self._chosen
        return self.namespace if chosen is None or time.monotonic() - self._read_at > LATELY else chosen[1]

    @property
    def last_known(self) -> Namespace:
        """`namespace` as it was when last asked for; the store isn't."""
        chosen = self._chosen
        return self._base if chosen is None else chosen[1]

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """That one, and the one that held before it: its chunks are misses now, but their texts are this engine's."""
        now = self.namespace
        return (now,) if now is self._base else (now, self._base)

    def follow(self, model: str) -> None:
        """Make keys of another model's chunks from now on: that model's own choice holds, or is to be made."""
        with self._lock:
            self._base = replace(self._base, model=model)
            self._chosen, self._seen, self._filled = None, {}, None

    @property
    def base(self) -> Namespace:
        """The namespace that holds until lead-ins are chosen."""
        return self._base

    @property
    def model(self) -> str:
        """The fingerprint that all namespaces have in common."""
        return self._base.model

    @property
    def _chosen(self) -> tuple[bytes, Namespace] | None:
        """The note as it was read last, and what it says; never another model's, should one be read while `follow` changes it."""
        read = self._last_read
        return read if read is not None and read[1].model == self._base.model else None

    @_chosen.setter
    def _chosen(self, read: tuple[bytes, Namespace] | None) -> None:
        self._last_read = read

    @property
    def undecided(self) -> bool:
        """Whether lead-ins may still be chosen from texts that are offered."""
        return self._choose and self.namespace is self._base

    def offer(self, texts: Iterable[Sequence[int]], *, indexing: bool) -> Namespace:
        """Choose lead-ins from texts (token ids of chunks), if that is still to be done and there is text enough.

        Args:
            texts: what is about to be stored, in order.
            indexing: False for chunks that a request missed. They never change the lead-ins of a store that was filled
                behind the first token: whoever did that may have wanted it so.

        Returns:
            The namespace that these texts are to be stored with.

        Raises:
            StoreError: the choice can't be written.
        """
        self._origin.check()
        with self._lock:
            now = self.namespace if indexing else self.lately
            if not self._choose or now is not self._base or (self._filled_before() and not indexing):
                self._seen, self._wanted = {}, None
                return now
            if self._texts_gone != (gone := self._store.texts_gone):
                # Which of the texts seen so far were those of a removed document is not known: none of them is written any more.
                self._seen, self._wanted, self._texts_gone = {}, None, gone
            if self._wanted is None:
                self._wanted = self._choice(texts)
            elif not indexing and time.monotonic() < self._retry_at:
                raise StoreError(f"the store's lead-ins couldn't be written a moment ago: {self._reason}")
            if self._wanted is None:
                return now
            try:
                chosen = self._settle(self._wanted)
            except StoreError as error:
                self._retry_at, self._reason = time.monotonic() + RETRY, str(error)
                raise
            self._wanted = None
            return chosen

    def _choice(self, texts: Iterable[Sequence[int]]) -> Namespace | None:
        """What is chosen once these texts were seen too; None if all that was seen is still too little.

        Nothing is kept once there is a choice: one that can't be written is tried again as it is.
        """
        room = MOST_TOKENS - sum(map(len, self._seen))
        for ids in texts:
            if ids and room > 0:
                self._seen[tuple(ids)] = None
                room -= len(ids)
        leads = choose(list(self._seen), self._base.lead_ins[0], self._text_tokens(), self._separator)
        if leads is None:
            return None
        self._seen = {}
        return replace(self._base, lead_ins=leads)

    def of(self, ids: Sequence[int], namespace: Namespace) -> tuple[Lead, ...]:
        """The lead-ins over which a chunk's mean is taken: a function of the chunk and the namespace alone.

        Of several, those are left out that share a stretch with the chunk (it would see itself before itself), and
        those that don't fit into the model's context with it. If none is left, it is the token that they begin with.

        Args:
            ids: token ids of the chunk.
            namespace: what its key is made with.
        """
        leads = namespace.lead_ins
        if len(leads) == 1:
            return leads
        stretches = _stretches(tuple(ids))
        kept = tuple(
            lead
            for lead in leads
            if (self._limit is None or len(lead) + len(ids) <= self._limit) and stretches.isdisjoint(_known(lead))
        )
        return kept or (leads[0][:1],)

    @staticmethod
    def least(namespace: Namespace) -> int:
        """Tokens that stand before a chunk at least."""
        leads = namespace.lead_ins
        return len(leads[0]) if len(leads) == 1 else len(leads[0][:1])

    def _text_tokens(self) -> int:
        """Of a short context, a lead-in takes a quarter at most."""
        return TEXT_TOKENS if self._limit is None else max(1, min(TEXT_TOKENS, self._limit // 4 - 1))

    def _filled_before(self) -> bool:
        """Whether, when this engine first stored something, others had stored much behind the first token."""
        if self._filled is None:
            known = self._store.texts(namespace=self._base)
            self._filled = any(total >= LEAST_TOKENS for total in accumulate(tokens for *_, tokens in known))
        return self._filled

    def _read(self) -> Namespace | None:
        """The choice that stands in the store; the one that was read last if that can't be had now."""
        before = self._chosen
        try:
            found: Namespace | None = self._call(self._look)
            return found
        except StoreError as error:
            _log.warning("the lead-ins of store %s can't be read: %s", self._store.path, error)
            return None if before is None else before[1]

    def _look(self) -> Namespace | None:
        """The choice that stands in the store. A damaged one is set aside, and restored if this engine has read it before."""
        self._read_at = time.monotonic()
        content = self._store.note(self._base.digest, tenant=self._base.tenant)
        if content is None:
            self._chosen = None
            return None
        before = self._chosen
        if before is not None and before[0] == content:
            return before[1]
        found = _decode(content, self._base, self._vocabulary)
        if found is not None:
            self._chosen = (content, found)
            return found
        if self._store.discard_note(self._base.digest, content, tenant=self._base.tenant):
            _log.warning(
                "the lead-ins of store %s were damaged and are set aside. Unless an engine still knows them, others will be "
                "chosen, and chunks that were stored behind the old ones computed again",
                self._store.path,
            )
        return None if before is None else self._settle(before[1])

    def _settle(self, wanted: Namespace) -> Namespace:
        """Write a choice, and return the one that stands: `wanted`, if there was none."""
        for _ in range(2):
            self._store.settle_note(self._base.digest, _encode(wanted), tenant=self._base.tenant)
            self._chosen = None
            found = self._look()
            if found is not None:
                return found
        raise StoreError(
            f"lead-ins don't come back from store {self._store.path} as they were written: check its disk."
        )


def choose(
    texts: Sequence[Sequence[int]], first: Lead, length: int, separator: Lead = (), count: int = COUNT
) -> tuple[Lead, ...] | None:
    """Lead-ins from texts: as many stretches, spread evenly over all of the text; None if that has too few tokens.

    Each is taken from the middle of its part, at the beginning of the text nearest to there, and ends with the separator: in a
    prompt a chunk begins behind one, not in the midst of a sentence (docs/quality.md#what-stands-right-before-a-chunk).

    Args:
        texts: token ids of different texts, in order.
        first: what each begins with.
        length: tokens in each behind that.
        separator: what each ends with; left away where it would take more than a quarter of the length.
        count: how many.
    """
    stream = list(chain.from_iterable(texts))
    if len(stream) < max(LEAST_TOKENS, count * length):
        return None
    starts = np.cumsum([0, *map(len, texts)])
    end = separator if 4 * len(separator) <= length else ()
    leads = []
    for part in range(count):
        low, high = part * len(stream) // count, (part + 1) * len(stream) // count - length
        start = (low + high) // 2
        inside = starts[(starts >= low) & (starts <= high)]
        if len(inside):
            start = int(inside[np.abs(inside - start).argmin()])
        leads.append((*first, *stream[start : start + length - len(end)], *end))
    return tuple(leads)


def given_lead_ins(
    lead_in: Sequence[int] | Sequence[Sequence[int]] | str, first_token: int, vocabulary: int
) -> tuple[Lead, ...]:
    """The lead-ins that an engine starts with: the first token for "auto" and "first_token", else those that are given,
    token ids of one or a list of several such lists.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(lead_in, str) and lead_in in ("auto", "first_token"):
        return ((first_token,),)
    several = isinstance(lead_in, Sequence) and bool(lead_in) and all(isinstance(lead, Sequence) for lead in lead_in)
    leads: Any = lead_in if several and not isinstance(lead_in, str) else [lead_in]
    for lead in leads:
        if (
            isinstance(lead, str | bytes | bytearray)
            or not isinstance(lead, Sequence)
            or not all(is_count(i, 0, vocabulary - 1) for i in lead)
        ):
            raise ConfigError(
                f"lead_in is {shown(lead_in)}: use 'auto', 'first_token', a list of token ids from 0 to {vocabulary - 1}, or a "
                "list of such lists."
            )
    return tuple(tuple(lead) for lead in leads)


def _stretches(ids: Lead) -> frozenset[bytes]:
    """Every run of OVERLAP tokens."""
    data = np.asarray(ids, dtype="<i4").tobytes()
    return frozenset(data[4 * i : 4 * (i + OVERLAP)] for i in range(len(ids) - OVERLAP + 1))


_known = lru_cache(maxsize=64)(_stretches)


def _encode(namespace: Namespace) -> bytes:
    """A note. The digest is that of the whole namespace, lead-ins included: it shows any damage."""
    content = {"format": _FORMAT, "digest": namespace.digest, "lead_ins": [list(lead) for lead in namespace.lead_ins]}
    return json.dumps(content).encode()


def _decode(content: bytes, base: Namespace, vocabulary: int) -> Namespace | None:
    """What a note says; None if it is not one of `base`, whole and within bounds."""
    try:
        record = json.loads(content)
        leads = record["lead_ins"]
        if record["format"] != _FORMAT or not 0 < len(leads) <= _MOST_LEADS:
            return None
        if not all(
            0 < len(lead) <= _MOST_LENGTH and all(is_count(i, 0, vocabulary - 1) for i in lead) for lead in leads
        ):
            return None
        found = replace(base, lead_ins=leads)
        return found if found.digest == record["digest"] else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
