"""Opens the stored chunks of a prompt, and lets them go when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model.heads import Heads
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.foreseen import Foreseen
from cachetune_rag.reuse.lookup import ChunkLookup, Faults, FoundChunks, OpenReaders, slowest
from cachetune_rag.reuse.slow_rows import CANT_READ
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkLayout, ChunkReader, ChunkStore
from cachetune_store.chunk import ChunkHead
from cachetune_store.tier_kinds import TierKind


def _nothing() -> None:
    """Lets nothing go on."""


@dataclass(frozen=True)
class Opened:
    """A prompt's chunks, open.

    Attributes:
        found: the chunks.
        config: the settings, tuned for where the chunks are if they were left to the engine.
        readers: closes the chunks.
        faults: chunks that could not be opened.
        waits: whether rows may have to be waited for, because a chunk isn't in memory. Where workers share the model: on any of them.
    """

    found: FoundChunks
    config: ReuseConfig
    readers: OpenReaders
    faults: Faults
    waits: bool


class ChunkOpener:
    """Opens the chunks of prompts. The caller holds the model's lock.

    Args:
        store: where chunks are.
        lead_ins: know the namespace of the chunks' keys.
        heads: of the model; where workers share it, all of them open the same chunks.
        pool: threads that look chunks up.
        prefetcher: goes on reading chunks that a request read in part; None: what a request leaves unread stays on disk.
        tuned: replaces settings that a request left to the engine by those tuned for a tier and codec.
    """

    def __init__(
        self,
        store: ChunkStore,
        lead_ins: LeadIns,
        heads: Heads,
        pool: DeadlinePool,
        prefetcher: Prefetcher | None,
        tuned: Callable[[ReuseConfig, str, str], ReuseConfig] | None,
    ):
        self._lead_ins, self._heads, self._pool = lead_ins, heads, pool
        self._store, self._prefetcher, self._tuned = store, prefetcher, tuned
        self._lookup = ChunkLookup(store, pool, prefetcher)

    def open(self, prompt: Prompt, config: ReuseConfig, faults: Faults, stack: ExitStack) -> Opened:
        """Open a prompt's chunks, which `stack` closes. They and the settings are the same on all peers.

        Args:
            prompt: the prompt.
            config: its settings.
            faults: chunks that could not be read before; those that can't be opened now are added.
            stack: closes them.
        """
        readers = OpenReaders()
        stack.callback(readers.close)

        def find() -> tuple[tuple[FoundChunks, ReuseConfig], tuple[list[str], ReuseConfig, bool]]:
            found = self._find(prompt, config, readers, faults)
            settings = self.settings(config, found)
            open_readers = found.readers
            # In one order on all of them, and without what all of them have: what all say alike is told quickly.
            keys = sorted(reader.key.digest for reader in open_readers) if self._heads.shared else []
            waits = not all(reader.in_memory for reader in open_readers)
            return (found, settings), (keys, replace(settings, namespace=None), waits)

        (found, settings), told = self._heads.agreed(find, CANT_READ)
        if self._heads.shared:
            # A chunk that one of them can't read is recomputed by all, and one of them says which settings were tuned.
            everywhere = set.intersection(*(set(keys) for keys, *_ in told))
            found = found.only({reader.key for reader in found.readers if reader.key.digest in everywhere})
            settings = replace(told[0][1], namespace=settings.namespace)
        return Opened(found, settings, readers, faults, any(waits for *_, waits in told))

    def open_in_memory(self, prompt: Prompt, config: ReuseConfig, stack: ExitStack) -> Opened | None:
        """As `open`, without waiting for anything; None if a chunk isn't in memory."""
        memory_alone = Faults()
        memory_alone.disk_gone = True
        opened = self.open(prompt, config, memory_alone, stack)
        return None if memory_alone.timed_out else replace(opened, faults=Faults())

    def find(self, prompt: Prompt, readers: OpenReaders) -> FoundChunks:
        """Look a prompt's chunks up without a deadline; `readers` closes them."""
        return self._lookup.find(prompt, self._lead_ins.recent_namespace, readers, Faults())

    def settings(self, config: ReuseConfig, found: FoundChunks) -> ReuseConfig:
        """The settings of a request, tuned for where its chunks are if it left them to the engine."""
        return self.tuned(config, *found.slowest()) if found.chunks else config

    def tuned(self, config: ReuseConfig, tier: str, codec: str) -> ReuseConfig:
        """The settings of a request for chunks of a tier and codec."""
        return config if self._tuned is None or not config.tunable else self._tuned(config, tier, codec)

    def claim_disk(self, found: FoundChunks, stack: ExitStack) -> Callable[[], None]:
        """Stop background reads while the prompt's rows are read from disk, which would slow them; gives what lets them go on."""
        keys = found.on_disk
        if self._prefetcher is None or not keys:
            return _nothing
        priority = self._prefetcher.priority(keys)
        stack.callback(priority.end)
        priority.claim()
        return priority.release

    def seconds_to_read(self, found: FoundChunks, rows: Callable[[ChunkReader], int]) -> float:
        """The least time in which the rows that have to be waited for are likely to be read, by how fast their tiers have read lately. The workers of a shared
        model say the same: the longest of theirs.

        Args:
            found: the open chunks. Where nothing is known of a tier's speed, its rows count as read.
            rows: how many rows of each layer of a chunk are needed.
        """
        waiting = Counter[str]()
        for reader in found.readers:
            if not reader.in_memory:
                waiting[reader.tier] += bytes_to_read(reader, rows(reader))
        return max(self._heads.tell(self._seconds(waiting)))

    def _seconds(self, waiting: Mapping[str, int]) -> float:
        """The least time in which so many bytes of tiers are likely to be read."""
        speeds = {tier: self._store.read_speed(tier) for tier in waiting}
        # Tiers are read at the same time.
        return max((waiting[tier] / speed for tier, speed in speeds.items() if speed), default=0.0)

    def foresee(
        self, prompt: Prompt, config: ReuseConfig, rows: Callable[[ReuseConfig, ChunkLayout], int]
    ) -> Foreseen | None:
        """What is known of a prompt's chunks before any is opened. Nothing is waited for.

        None where that isn't enough: where some are not known to be stored, or are partly read, or where workers share the model, whose chunks may be in different tiers.

        Args:
            prompt: the prompt.
            config: its settings.
            rows: how many rows of each layer of a chunk are needed at tuned settings.
        """
        if self._heads.shared or not prompt.spans:
            return None
        keys = self._lookup.keys(prompt, config.namespace or self._lead_ins.known_namespace)
        known: dict[ChunkKey, tuple[TierKind, ChunkHead]] = {}
        for key in keys:
            if key is None or key in known:
                continue
            found = self._store.foresee(key)
            if found is None or (self._prefetcher is not None and self._prefetcher.has_begun(key)):
                return None
            known[key] = found
        spans = tuple(span for span in prompt.spans if keys[span.chunk] is not None)
        if not spans:
            return None
        places = [(span, *known[key]) for span in spans if (key := keys[span.chunk]) is not None]
        config = self.tuned(config, *slowest((span, kind.name, head.layout.codec) for span, kind, head in places))
        bytes_of = Counter[str]()
        waiting: dict[ChunkKey, ChunkHead] = {}
        for key, (kind, head) in known.items():
            if not kind.in_memory:
                waiting[key], wanted = head, rows(config, head.layout)
                bytes_of[kind.name] += sum(form.size(wanted) for form in head.plan.rows)
        return Foreseen(spans, tuple(known), config, waiting, self._seconds(bytes_of))

    def read_on(self, opened: Opened, rows: Callable[[ChunkReader], int], after: float) -> int:
        """The prompt doesn't use its chunks after all: read those that aren't in memory into host memory, in the background, as far as there is room, `after` so many
        seconds. Returns how many have no room."""
        waiting = [reader for reader in opened.found.readers if not reader.in_memory]
        if self._prefetcher is None or not waiting:
            return len(waiting)
        for reader in waiting:
            opened.readers.release(reader)
        return self._prefetcher.go_on(waiting, rows, after)

    def read_later(self, foreseen: Foreseen, rows: Callable[[ChunkReader], int], after: float) -> int:
        """As `read_on`, of chunks that were not opened: they are when they are read. All of the prompt's count as used now, as if they had been opened: what is
        in memory would have to make room for the others."""
        for key in foreseen.keys:
            self._store.touch(key)
        if self._prefetcher is None:
            return len(foreseen.waiting)
        sizes = {key: self._store.memory.size_of(head.plan.total) for key, head in foreseen.waiting.items()}
        return self._prefetcher.read_later(sizes, rows, after)

    def let_go(self, opened: Opened) -> None:
        """Hand chunks on: the prefetcher reads the rest of those on disk; those in host memory go to the device, if it keeps chunks."""
        for reader in opened.found.readers:
            if reader.in_memory:
                reader.promote()
            elif self._prefetcher is not None:
                opened.readers.release(reader)
                self._prefetcher.finish(reader)

    def _find(self, prompt: Prompt, config: ReuseConfig, readers: OpenReaders, faults: Faults) -> FoundChunks:
        """Look the prompt's chunks up, within the deadline of disk reads."""
        namespace = config.namespace or self._lead_ins.known_namespace
        if faults.disk_gone:
            return self._lookup.find(prompt, namespace, readers, faults)
        return self._pool.call(self._lookup.find, prompt, namespace, readers, faults)


def bytes_to_read(reader: ChunkReader, rows: int) -> int:
    """Bytes of the first `rows` rows of every layer of an open chunk that have to be waited for."""
    sizes = enumerate(reader.head.plan.rows)
    return sum(form.size(rows) - form.size(min(rows, reader.rows_there(layer))) for layer, form in sizes)
