"""Finds a request's chunks in its token ids, on the scheduler's side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace
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
from cachetune_vllm.settings import RequestSettings, ServerSettings
from cachetune_vllm.stored import why_unusable

START_PATIENCE = 30.0
"""Seconds that a starting server waits until all chunks of its store are known. If that takes longer, it begins with those it knows."""
TENANTS = 64
"""Tenants whose chunks are followed at the same time; beyond that, the one whose last request is oldest is dropped, and
its chunks are read anew at its next request."""

_log = logger(__name__)


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
        self._store = ChunkStore(settings.store, host_budget=0, disk_budget=settings.disk_budget)
        self._tenants: OrderedDict[str, StoreIdRecognizer] = OrderedDict()
        recognizer = self._of(settings.tenant)
        caught_up = recognizer.catch_up(START_PATIENCE)
        known = recognizer.known
        if not caught_up:
            _log.warning("%d chunks of the store are known, and %d still to be read", known.chunks, known.waiting)
        elif known.chunks:
            _log.info("%d chunks in %s are known, and reused where a prompt shows them", known.chunks, self._store.path)
        else:
            wanted = self._lead_ins(settings.tenant).namespace
            _log.warning("no chunk in %s can be reused: %s", self._store.path, why_unusable(self._store, wanted))

    def find(self, ids: Sequence[int], settings: RequestSettings) -> Prompt | None:
        """A prompt with the chunks that stand in it; None if there are none."""
        spans = self._of(settings.tenant).find(ids)
        texts: dict[Hashable, str] = {}
        if settings.chunks is not None:
            named = find_named(settings.chunks, ids, self._prompts.encode, self._spelling)
            spans = joined(named.spans, spans)
            if self._settings.store_missed:
                texts = dict(enumerate(settings.chunks))
        return prompt_of_ids(ids, spans, texts) if spans else None

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
            if len(self._tenants) > TENANTS:
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
