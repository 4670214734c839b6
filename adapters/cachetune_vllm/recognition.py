"""Finds a request's chunks in its token ids, on the scheduler's side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.chunks.id_recognition import StoreIdRecognizer
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.prompts.segments import Prompt
from cachetune_rag.text.recognising.id_spans import prompt_of_ids
from cachetune_rag.text.recognising.named_chunks import find_named, joined
from cachetune_rag.text.recognising.spelling import Spelling
from cachetune_rag.text.tokenizer import private_copy
from cachetune_store import ChunkStore
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import Hello
from cachetune_vllm.settings import TENANTS, RequestSettings, ServerSettings
from cachetune_vllm.stored import why_unusable

START_PATIENCE = 30.0
"""Seconds that a starting server waits until all chunks of its store are known. If that takes longer, it begins with those it knows."""

_log = logger(__name__)


@dataclass(frozen=True)
class Recognised:
    """What was found in a prompt's token ids.

    Attributes:
        prompt: the prompt, with its chunks; None if it has none.
        missing: numbers of the chunks that the request names and the store lacks, as far as the store's chunks are known.
        cut_short: not every place of the prompt was looked at, because that would have taken too long.
        not_shown: numbers of the texts that the request names and the prompt doesn't show.
    """

    prompt: Prompt | None
    missing: frozenset[int] = frozenset()
    cut_short: bool = False
    not_shown: tuple[int, ...] = ()


def nothing_found(ids: Sequence[int], settings: RequestSettings) -> Recognised:
    """What a server finds that reuses nothing."""
    return Recognised(None)


class Recognition:
    """Knows the chunks of a store, and finds them in prompts. Called from one thread.

    Args:
        settings: the server's.
        hello: what the workers say of their model.
        tokenizer: the model's.
    """

    def __init__(self, settings: ServerSettings, hello: Hello, tokenizer: Any):
        self._settings, self._hello = settings, hello
        self._prompts = PromptBuilder(tokenizer)
        self._spelling = Spelling(private_copy(tokenizer))
        # Only the store's texts are read here; the workers read the chunks' rows.
        self._store = ChunkStore(**settings.place, host_budget=0, disk_budget=settings.disk_budget)
        self._place = self._store.path or self._store.remote
        self._tenants: OrderedDict[str, StoreIdRecognizer] = OrderedDict()
        caught_up = self.catch_up(START_PATIENCE)
        known = self._of(settings.tenant).known
        if not caught_up:
            _log.warning("%d chunks of the store are known, and %d still to be read", known.chunks, known.waiting)
        elif known.chunks:
            _log.info("%d chunks in %s are known, and reused where a prompt shows them", known.chunks, self._place)
        else:
            wanted = self._lead_ins(settings.tenant).namespace
            _log.warning("no chunk in %s can be reused: %s", self._place, why_unusable(self._store, wanted))

    def find(self, ids: Sequence[int], settings: RequestSettings) -> Recognised:
        """The chunks that stand in a prompt: stored ones, and those that the request names."""
        recognizer = self._of(settings.tenant)
        before = recognizer.cut_short
        spans = recognizer.find(ids)
        cut_short = recognizer.cut_short > before
        texts: dict[Hashable, str] = {}
        missing: frozenset[int] = frozenset()
        not_shown: tuple[int, ...] = ()
        if settings.chunks is not None:
            named = find_named(settings.chunks, ids, self._prompts.encode, self._spelling)
            spans, not_shown = joined(named.spans, spans), named.not_found
            if self._settings.store_missed:
                texts = dict(enumerate(settings.chunks))
            # Chunks of a store that has not been read to its end may be stored: then the worker finds out.
            if recognizer.known.complete:
                missing = frozenset(n for n, span in enumerate(spans) if not recognizer.knows(span.chunk_ids(ids)))
        return Recognised(prompt_of_ids(ids, spans, texts) if spans else None, missing, cut_short, not_shown)

    def catch_up(self, seconds: float) -> bool:
        """Wait until all chunks are known that the store has for the server's own tenant; False if that takes longer."""
        return self._of(self._settings.tenant).catch_up(seconds)

    def close(self) -> None:
        """End what follows the store, and close it."""
        for recognizer in self._tenants.values():
            recognizer.close()
        self._tenants.clear()
        self._store.close()

    def _of(self, name: str) -> StoreIdRecognizer:
        """What recognises one tenant's chunks."""
        recognizer = self._tenants.get(name)
        if recognizer is None:
            lead_ins = self._lead_ins(name)
            recognizer = StoreIdRecognizer(
                self._store, lambda: (lead_ins.namespace,), self._prompts.encode_many, self._spelling
            )
            self._tenants[name] = recognizer
            if len(self._tenants) > TENANTS:  # the chunks of the oldest are read anew at its next request
                self._tenants.popitem(last=False)[1].close()
        self._tenants.move_to_end(name)
        return recognizer

    def _lead_ins(self, tenant: str) -> LeadIns:
        hello = self._hello
        assert hello.namespace is not None
        return LeadIns(
            self._store,
            replace(hello.namespace, tenant=tenant),
            choose=hello.choose_lead_ins,
            vocabulary=hello.vocabulary,
            limit=hello.max_positions,
            separator=hello.separator_ids,
        )
