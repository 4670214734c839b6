"""The engine inside a worker: cachetune_rag's own parts on vLLM's weights, one for each tenant."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.readahead.warming import Warming
from cachetune_rag.runtime import Runtime
from cachetune_store import ChunkKey, ChunkStore
from cachetune_vllm.served_fingerprint import served_fingerprint
from cachetune_vllm.served_model import ServedModel
from cachetune_vllm.settings import TENANTS, ServerSettings


class Engines:
    """Engines of one worker, all on one model and one open store. They are asked for by one thread, and used only until it asks again.

    Args:
        served: transformers' layers over vLLM's weights.
        tokenizer: the model's.
        settings: the server's.
        model_config: vLLM's configuration of the model.
    """

    def __init__(self, served: ServedModel, tokenizer: Any, settings: ServerSettings, model_config: Any):
        self._served, self._tokenizer, self._settings = served, tokenizer, settings
        self._model_config = model_config
        self._lock = threading.Lock()
        self._engines: OrderedDict[str, Runtime] = OrderedDict()
        self._warming: Warming | None = None
        # Before an engine tries the model: workers that share it have to reach that together.
        self.store, self._fingerprint = served.heads.together(self._opened)
        try:
            self.default = self.of(settings.tenant)
        except BaseException:
            self.store.close()
            raise

    def _opened(self) -> tuple[ChunkStore, str | None]:
        """The store, and the model's fingerprint if it has to be given."""
        settings = self._settings
        store = ChunkStore(
            **settings.place,
            codec=settings.codec,
            host_budget=settings.host_budget,
            disk_budget=settings.disk_budget,
            device_budget=settings.device_budget,
            device=self._served.model.device,
        )
        try:
            return store, served_fingerprint(self._served, self._model_config, Profiles(store.path, seal=store.seal))
        except BaseException:
            store.close()
            raise

    def of(self, tenant: str) -> Runtime:
        """The engine of a tenant."""
        with self._lock:
            engine = self._engines.get(tenant)
            if engine is None:
                self._make_room()
                engine = self._engines[tenant] = Runtime(
                    self._served.model,
                    self._tokenizer,
                    self.store,
                    fingerprint=self._fingerprint,
                    heads=self._served.heads,
                    tenant=tenant,
                    lead_in=self._settings.lead_in,
                    read_timeout=self._settings.read_timeout,
                )
            self._engines.move_to_end(tenant)
            return engine

    def warm(self, keys: Sequence[str]) -> None:
        """Begin to read chunks into memory that are likely to be asked for, as far as there is free room; the most wanted first. While it is still reading,
        further ones are not taken."""
        if self._warming is None or not self._warming.running:
            self._warming = Warming(self.store, self.default.prefetcher, [ChunkKey(key) for key in keys])
            self._warming.start()

    def warmed(self) -> tuple[bool, int, int]:
        """Whether `warm` is still reading, how many chunks it has read, and their bytes."""
        warming = self._warming
        return (False, 0, 0) if warming is None else (warming.running, warming.chunks, warming.bytes)

    def _make_room(self) -> None:
        """Close engines so that there is room for one more: those whose last request is oldest, but not one that has chunks to store."""
        for tenant, engine in list(self._engines.items()):
            if len(self._engines) < TENANTS:
                return
            if tenant != self._settings.tenant and not engine.backfill.waiting:
                del self._engines[tenant]
                engine.close()

    def close(self) -> None:
        """Close them all, and the store."""
        with self._lock:
            engines = list(self._engines.values())
            self._engines.clear()
        for engine in engines:
            engine.close()
        self.store.close()
