"""The lead-ins of a store: the tokens that stand before a chunk while it is computed, and so a part of all chunk keys.

What will stand before a chunk in a prompt is not known when the chunk is computed. So it is computed behind several stretches of the
same corpus. The mean of its keys and values is closer to what they will be in a prompt than those behind any single stretch, and how far
they are apart says which tokens to recompute (docs/selection.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from cachetune_rag.chunks.lead_in_choice import (
    LEAST_TOKENS,
    MOST_TOKENS,
    TEXT_TOKENS,
    LeadIn,
    choice_in,
    choose_lead_ins,
    note_of,
)
from cachetune_rag.concurrency.deadline import Call, call_directly
from cachetune_rag.concurrency.forks import this_process
from cachetune_store import ChunkStore, Namespace, StoreError, StorePathError

RECENT_SECONDS = 1.0
"""Seconds for which a request that looks chunks up takes a choice for valid without reading it again."""

RETRY_SECONDS = 5.0
"""Seconds until requests try again to write a choice that couldn't be written. Precompute tries at once."""

_log = logging.getLogger(__name__)


class LeadIns:
    """The lead-ins of an engine's chunks, and the namespace of their keys. All that make or look up keys share one object.

    Lead-ins that a user gives are used unchanged. Otherwise chunks are computed behind the prompt's first token alone, until there are
    enough texts to choose lead-ins from. The choice is made once for a store, model, tokenizer, dtype and tenant, and written to the store
    as a note. Every engine on the store follows it, in whichever process, until the tenant is deleted. Safe to use from many threads.

    Args:
        store: where the choice is kept.
        namespace: holds the lead-ins that are used until others are chosen.
        choose: whether others may be chosen.
        vocabulary: token ids are below this.
        limit: most tokens that the model reads; None: any number.
        separator: what stands between the chunks of a prompt, and so right before most of them.
        call: makes the calls that may touch the store's disk.
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
        self._seen: dict[LeadIn, None] = {}  # see `waiting_texts`
        self._wanted: Namespace | None = None  # see `choice_to_write`
        self._retry_at, self._reason = 0.0, ""
        self._filled: bool | None = None
        self._texts_gone = 0  # the store's `texts_gone` when texts were last seen

    @property
    def namespace(self) -> Namespace:
        """The namespace of chunks that are stored or looked up now. It may change at any time: take it once for all keys of a request."""
        self._origin.check()
        if not self._choose:
            return self._base
        try:
            return self._read() or self._base
        except StorePathError as error:
            # No reason to refuse an answer: at worst, chunks are missed.
            _log.warning("lead-ins: %s", error)
            return self._chosen[1] if self._chosen else self._base

    @property
    def recent_namespace(self) -> Namespace:
        """`namespace`, but the store is read only once a second. For looking chunks up, where an old namespace costs no more than a miss."""
        chosen = self._chosen
        return self.namespace if chosen is None or time.monotonic() - self._read_at > RECENT_SECONDS else chosen[1]

    @property
    def known_namespace(self) -> Namespace:
        """`namespace` as it was read last. The store is not read."""
        chosen = self._chosen
        return self._base if chosen is None else chosen[1]

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """`namespace`, and the one before the choice: chunks of that are missed now, but their texts are recognised in prompts."""
        now = self.namespace
        return (now,) if now is self._base else (now, self._base)

    def model_changed(self, model: str) -> None:
        """From now on, make keys for a model with this fingerprint, with the lead-ins that were, or will be, chosen for that model."""
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
        """The note that was read last, and the choice in it. None if it was read for the model before `model_changed`."""
        read = self._last_read
        return read if read is not None and read[1].model == self._base.model else None

    @_chosen.setter
    def _chosen(self, read: tuple[bytes, Namespace] | None) -> None:
        self._last_read = read

    @property
    def undecided(self) -> bool:
        """Whether lead-ins are still to be chosen."""
        return self._choose and self.namespace is self._base

    @property
    def waiting_texts(self) -> list[LeadIn]:
        """Different texts that were seen so far, in order, while they are too few to choose from."""
        return list(self._seen)

    @property
    def choice_to_write(self) -> Namespace | None:
        """A choice that was made and could not be written to the store yet."""
        return self._wanted

    def choose_from(self, texts: Iterable[Sequence[int]], *, indexing: bool) -> Namespace:
        """Choose lead-ins from texts, if none are chosen yet and there are enough texts.

        Args:
            texts: token ids of chunks that are about to be stored, in order.
            indexing: False for chunks that a request missed. If a store was filled behind the first token, these never change its
                lead-ins, because that may have been done on purpose.

        Returns:
            The namespace that these chunks are to be stored with.

        Raises:
            StoreError: the choice can't be written.
        """
        self._origin.check()
        with self._lock:
            now = self.namespace if indexing else self.recent_namespace
            if not self._choose or now is not self._base or (self._filled_before() and not indexing):
                self._seen, self._wanted = {}, None
                return now
            if self._texts_gone != (gone := self._store.texts_gone):
                # Texts were removed from the store, perhaps some of these: no lead-in may be made of them.
                self._seen, self._wanted, self._texts_gone = {}, None, gone
            if self._wanted is None:
                self._wanted = self._choice(texts)
            elif not indexing and time.monotonic() < self._retry_at:
                raise StoreError(f"the store's lead-ins couldn't be written a moment ago: {self._reason}")
            if self._wanted is None:
                return now
            try:
                chosen = self._write_choice(self._wanted)
            except StoreError as error:
                self._retry_at, self._reason = time.monotonic() + RETRY_SECONDS, str(error)
                raise
            self._wanted = None
            return chosen

    def _choice(self, texts: Iterable[Sequence[int]]) -> Namespace | None:
        """The choice from all texts seen so far, these included; None if they are too few. Once there is a choice, no texts are kept."""
        room = MOST_TOKENS - sum(map(len, self._seen))
        for ids in texts:
            if ids and room > 0:
                self._seen[tuple(ids)] = None
                room -= len(ids)
        lead_ins = choose_lead_ins(list(self._seen), self._base.lead_ins[0], self._text_tokens(), self._separator)
        if lead_ins is None:
            return None
        self._seen = {}
        return replace(self._base, lead_ins=lead_ins)

    def _text_tokens(self) -> int:
        """Tokens of a lead-in behind its first one. In a short context, a lead-in takes a quarter at most."""
        return TEXT_TOKENS if self._limit is None else max(1, min(TEXT_TOKENS, self._limit // 4 - 1))

    def _filled_before(self) -> bool:
        """Whether much had been stored behind the first token before this engine stored anything."""
        if self._filled is None:
            known = self._store.texts(namespace=self._base)
            self._filled = any(total >= LEAST_TOKENS for total in accumulate(tokens for *_, tokens in known))
        return self._filled

    def _read(self) -> Namespace | None:
        """The choice in the store, or the one that was read last if the store can't be read now."""
        before = self._chosen
        try:
            found: Namespace | None = self._call(self._read_choice)
            return found
        except StoreError as error:
            _log.warning("the lead-ins of store %s can't be read: %s", self._store.path, error)
            return None if before is None else before[1]

    def _read_choice(self) -> Namespace | None:
        """The choice in the store. A damaged note is set aside, and written again if this engine has read it before."""
        self._read_at = time.monotonic()
        content = self._store.note(self._base.digest, tenant=self._base.tenant)
        if content is None:
            self._chosen = None
            return None
        before = self._chosen
        if before is not None and before[0] == content:
            return before[1]
        found = choice_in(content, self._base, self._vocabulary)
        if found is not None:
            self._chosen = (content, found)
            return found
        if self._store.discard_note(self._base.digest, content, tenant=self._base.tenant):
            _log.warning(
                "the lead-ins of store %s were damaged and are set aside. Unless an engine still knows them, others will be "
                "chosen, and chunks that were stored behind the old ones computed again",
                self._store.path,
            )
        return None if before is None else self._write_choice(before[1])

    def _write_choice(self, wanted: Namespace) -> Namespace:
        """Write a choice, and return the one that holds: `wanted`, unless another engine wrote one first."""
        for _ in range(2):
            self._store.settle_note(self._base.digest, note_of(wanted), tenant=self._base.tenant)
            self._chosen = None
            found = self._read_choice()
            if found is not None:
                return found
        raise StoreError(
            f"lead-ins don't come back from store {self._store.path} as they were written: check its disk."
        )
