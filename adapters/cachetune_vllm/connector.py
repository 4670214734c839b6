"""The class that vLLM loads. It only passes calls on: to `ReuseScheduler` in the scheduler's process, to `ReuseWorker` in workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cachetune_rag.errors import CacheTuneError
from cachetune_store import StoreError
from cachetune_vllm.engines import Engines
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import FromWorker, Hello, ToWorkers
from cachetune_vllm.metrics import ReuseMetrics, ReuseStats
from cachetune_vllm.recognition import Recognition, nothing_found
from cachetune_vllm.resting import rest_between_steps
from cachetune_vllm.scheduler import ReuseScheduler
from cachetune_vllm.settings import ServerSettings
from cachetune_vllm.start import Started, start_worker, tokenizer_of
from cachetune_vllm.worker import ReuseWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logger(__name__)


class CacheTuneConnector(KVConnectorBase_V1):
    """Reuses stored chunks in prompts of a vLLM server (docs/vllm.md)."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = ServerSettings.of(transfer.kv_connector_extra_config)
        self._config, self._page_count = vllm_config, kv_cache_config.num_blocks
        self._scheduler: ReuseScheduler | None = None
        self._recognition: Recognition | None = None
        self._started: Started | None = None
        self._pool: BlockPool | None = None
        if role == KVConnectorRole.SCHEDULER:
            # If reuse fails (a damaged chunk, a disk that is gone), vLLM is to compute the prompt; by default it would fail the request.
            # vLLM reads this setting right after it has made the connector.
            transfer.kv_load_failure_policy = "recompute"

    # -- scheduler's side ----------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Called when the workers are ready. They say which model they have, or why nothing is reused."""
        hello = metadata[min(metadata)]
        assert isinstance(hello, Hello)
        rest_between_steps(hello.process)
        recognise = nothing_found
        if hello.refusal is not None:
            _log.warning("no chunks are reused by this server: %s", hello.refusal)
        else:
            self._recognition = Recognition(self._settings, hello, tokenizer_of(self._config))
            recognise = self._recognition.find
        self._scheduler = ReuseScheduler(self._settings, hello, self._config.cache_config.block_size, recognise)
        if self._pool is not None:
            self._scheduler.pages.bind(self._pool)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """See the base class."""
        self._pool = gpu_block_pool
        if self._scheduler is not None:
            self._scheduler.pages.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """See the base class."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class."""
        return (0, False) if self._scheduler is None else self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See the base class."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See the base class."""
        if self._scheduler is None:
            return ToWorkers()
        return self._scheduler.to_workers(scheduler_output.total_num_scheduled_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See the base class."""
        if self._scheduler is None:
            return
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, FromWorker):
            self._scheduler.reported(told)
        self._scheduler.loaded(connector_output.finished_recving or ())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See the base class. vLLM may free the request's pages at once."""
        return False, None if self._scheduler is None else self._scheduler.finished(request)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """See the base class. Everything is counted on the scheduler's side."""
        return None if self._scheduler is None else self._scheduler.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """See the base class."""
        return ReuseStats(data={} if data is None else data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """See the base class."""
        return ReuseMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker's side -------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The model is loaded and its pages exist: make the engine that fills them."""
        self._started = start_worker(self._config, self._settings, self._page_count)

    def get_handshake_metadata(self) -> Hello:
        """See the base class. vLLM's own warm-up is over, and no step is planned yet."""
        assert self._started is not None
        return self._started.ready()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See the base class."""
        if (worker := self._worker) is not None:
            worker.start(self._told)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See the base class."""
        worker = self._worker
        return None, None if worker is None else worker.finished(self._told.idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See the base class."""
        return set() if (worker := self._worker) is None else worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """See the base class."""
        return None if (worker := self._worker) is None else worker.report()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: vLLM runs a request only once its prompt is completely put together."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing to save: the rows of missed chunks are computed separately, behind lead-ins."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        """See the base class."""
        if self._recognition is not None:
            self._recognition.close()
        if self._started is not None:
            try:
                self._started.close()
            except (CacheTuneError, StoreError) as error:
                _log.warning("closing: %s", error)

    @property
    def engines(self) -> Engines | None:
        """What a worker works with; None on the scheduler's side, and where nothing is reused."""
        return None if self._started is None else self._started.engines

    @property
    def recognition(self) -> Recognition | None:
        """What the scheduler's side finds chunks with; None on workers, and where nothing is reused."""
        return self._recognition

    @property
    def _worker(self) -> ReuseWorker | None:
        return None if self._started is None else self._started.worker

    @property
    def _told(self) -> ToWorkers:
        told = self._get_connector_metadata()
        assert isinstance(told, ToWorkers)
        return told
