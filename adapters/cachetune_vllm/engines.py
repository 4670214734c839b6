"""The engine inside a worker: cachetune_rag's own parts on vLLM's weights, one for each tenant."""

from __future__ import annotations

import threading
from typing import Any

from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.runtime import Runtime
from cachetune_store import ChunkStore
from cachetune_vllm.served_fingerprint import served_fingerprint
from cachetune_vllm.served_model import ServedModel
from cachetune_vllm.settings import ServerSettings


class Engines:
    """Engines of one worker, all on one model and one open store.

    Args:
        served: transformers' layers over vLLM's weights.
        tokenizer: the model's.
        settings: the server's.
        model_config: vLLM's configuration of the model.
    """

    def __init__(self, served: ServedModel, tokenizer: Any, settings: ServerSettings, model_config: Any):
        self._model, self._tokenizer, self._settings = served.model, tokenizer, settings
        self._lock = threading.Lock()
        self._engines: dict[str, Runtime] = {}
        self.store = ChunkStore(
            settings.store,
            codec=settings.codec,
            host_budget=settings.host_budget,
            disk_budget=settings.disk_budget,
            device_budget=settings.device_budget,
            device=served.model.device,
        )
        try:
            self._fingerprint = served_fingerprint(served, model_config, Profiles(self.store.path))
            self.default = self.of(settings.tenant)
        except BaseException:
            self.store.close()
            raise

    def of(self, tenant: str) -> Runtime:
        """The engine of a tenant."""
        with self._lock:
            engine = self._engines.get(tenant)
            if engine is None:
                engine = self._engines[tenant] = Runtime(
                    self._model,
                    self._tokenizer,
                    self.store,
                    fingerprint=self._fingerprint,
                    tenant=tenant,
                    lead_in=self._settings.lead_in,
                    read_timeout=self._settings.read_timeout,
                )
            return engine

    def close(self) -> None:
        """Close them all, and the store."""
        with self._lock:
            engines, self._engines = list(self._engines.values()), {}
        for engine in engines:
            engine.close()
        self.store.close()
