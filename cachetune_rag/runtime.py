"""What an engine is made of: opened together, closed together."""

from __future__ import annotations

import _thread
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from cachetune_rag.answering.executor import RequestRunner
from cachetune_rag.answering.plain_prompts import PlainPrompts
from cachetune_rag.chunks.backfill import MissedChunks
from cachetune_rag.chunks.found_watch import FoundWatch
from cachetune_rag.chunks.lead_ins import LeadIns, given_lead_ins
from cachetune_rag.chunks.precompute import Precomputer
from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.concurrency.deadline import DeadlinePool, check_timeout
from cachetune_rag.concurrency.lifetime import Lifetime
from cachetune_rag.concurrency.workers import Job
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.measuring.calibration.result import SavedCalibrations
from cachetune_rag.measuring.fidelity import FidelitySampler
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.measuring.tuning.saved import SavedTunings
from cachetune_rag.model.engine_model import EngineModel
from cachetune_rag.model.libraries.private import loaded_from
from cachetune_rag.model.loaded.fingerprint import tokenizer_fingerprint
from cachetune_rag.model.loading import check_loaded, check_vocabulary, load_model
from cachetune_rag.options import ENGINE_NAMES, EngineOptions, StoreOptions, check_names
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.prefill import Assembler
from cachetune_rag.storage import check_not_open, open_store
from cachetune_rag.telemetry.figures import StoreFigures
from cachetune_rag.telemetry.observer import Observers
from cachetune_rag.telemetry.stats import RequestCounter
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.tokenizer import private_copy
from cachetune_store import ChunkStore, Namespace
from cachetune_store.printing import shown

_LOADING = ("gguf_file", "device", "dtype", "revision")
"""What `from_pretrained` takes itself: among them is what a wrong name may mean."""

_log = logging.getLogger(__name__)


def check_tenant(tenant: object) -> None:
    """Refuse what is no name of a tenant.

    Raises:
        ConfigError: it isn't.
    """
    if not isinstance(tenant, str):
        raise ConfigError(f'tenant is {shown(tenant)}: use a string, "" for the only one there is.')
    try:
        tenant.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"tenant is {shown(tenant)}, which is no valid Unicode: use another name.") from None


class EngineParts:
    """A model, a store and all that works between them: opened here, and closed here.

    Users make a `CacheTune`, which says what the arguments mean. What runs requests and measures (`RequestRunner`, `Calibrator`,
    `Tuner`) uses the parts whose names begin with an underscore; nothing outside of the package should.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: str | os.PathLike[str] | ChunkStore | None = None,
        *,
        prompt_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chunk_separator: str = "\n\n",
        lead_in: Sequence[int] | Sequence[Sequence[int]] | str = "auto",
        tenant: str = "",
        batch_tokens: int | None = None,
        cuda_kernels: bool = True,
        fidelity_sample: float = 0.0,
        read_timeout: float | None = 30.0,
        **store_options: Unpack[StoreOptions],
    ):
        check_loaded(model, tokenizer)
        self.lifetime = Lifetime()
        check_vocabulary(model, tokenizer)
        self.model = EngineModel(model, cuda_kernels=cuda_kernels)
        self.adapter = self.model.adapter
        self.fidelity = FidelitySampler(fidelity_sample, self.adapter, self.model.lock, self.model.check)
        self.tokenizer = private_copy(tokenizer)
        """The engine's own: what happens to the caller's later has no effect."""
        self.model_name: str = loaded_from(model.config) or self.adapter.architecture
        self.prompts = PromptBuilder(
            tokenizer,
            template=prompt_template,
            chunk_separator=chunk_separator,
            chat_template_kwargs=chat_template_kwargs,
        )
        check_tenant(tenant)
        namespace = Namespace(
            model=self.model.fingerprint,
            tokenizer=tokenizer_fingerprint(tokenizer),
            dtype=str(self.adapter.dtype).removeprefix("torch."),
            lead_ins=given_lead_ins(lead_in, self.prompts.first_token, self.adapter.config.vocab_size),
            tenant=tenant,
        )
        self._owns_store = not isinstance(store, ChunkStore)
        path = store.path if isinstance(store, ChunkStore) else store
        check_timeout(read_timeout)  # of a store in memory too, which waits for no disk
        self.pool = DeadlinePool(None if path is None else read_timeout)
        self.store = open_store(store, self.adapter.device, store_options)
        self.prefetcher = Prefetcher(self.store)
        try:
            self._connect(namespace, choose_leads=lead_in == "auto", batch_tokens=batch_tokens)
        except BaseException:
            self._release()
            raise

    def _connect(self, namespace: Namespace, *, choose_leads: bool, batch_tokens: int | None) -> None:
        """Make what works between model and store."""
        self.lead_ins = LeadIns(
            self.store,
            namespace,
            choose=choose_leads,
            vocabulary=self.adapter.config.vocab_size,
            limit=self.adapter.max_positions,
            separator=self.prompts.separator_ids,
            call=self.pool.call,
        )
        """What stands before chunks while they are computed."""
        self.profiles = Profiles(self.store.path, self.pool.call)
        self.calibrations = SavedCalibrations(self)
        self.tunings = SavedTunings(self)
        self.assembler = Assembler(
            self.adapter,
            self.store,
            self.lead_ins,
            self.pool,
            self.prefetcher,
            self.tunings.apply,
            self.model.check,
        )
        if batch_tokens is None:
            batch_tokens = 8192 if self.adapter.device.type == "cuda" else 0
        self.recognizer = StoreRecognizer(self.store, self.lead_ins, self.pool.call)
        self.found_watch = FoundWatch(self.recognizer)
        self.plain_prompts = PlainPrompts(self.prompts, self.recognizer, self.found_watch)
        self.precomputer = Precomputer(
            self.adapter,
            self.store,
            self.lead_ins,
            self.prompts.encode,
            self.model.lock,
            batch_tokens,
            self.recognizer.add,
            self.model.check_all,
        )
        self.backfill = MissedChunks(self.precomputer, self.pool.call, self.model.lock)
        self.counter = RequestCounter()
        self.store_stats = StoreFigures(self.store, self.pool)
        self.observers = Observers()
        """Who is told about requests (`cachetune_rag.telemetry`)."""
        self.admission = self.executor = RequestRunner(self)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        store: str | os.PathLike[str] | ChunkStore | None = None,
        *,
        gguf_file: str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Load model and tokenizer by path or hub id, and open the store.

        Args:
            model: a folder or a hub id, as transformers takes it.
            store: see the class.
            gguf_file: name of a GGUF file in that folder; its weights are dequantised.
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
            dtype: "auto" (the checkpoint's own; float32 on a CPU, where half types are slow), or a torch dtype or its name.
            revision: branch, tag or commit on the hub.
            options: further arguments of the class, and of its store.

        Raises:
            ConfigError: an option that doesn't exist; nothing was loaded.
            ModelLoadError: nothing loadable at `model`.
        """
        names = (*ENGINE_NAMES, *_LOADING, *inspect.signature(cls).parameters)  # a subclass may have more
        check_names(options, names, "CacheTune.from_pretrained")
        check_not_open(store, options)
        loaded, tokenizer = load_model(model, gguf_file=gguf_file, device=device, dtype=dtype, revision=revision)
        return cls(loaded, tokenizer, store, **options)

    @property
    def runtime(self) -> Self:
        """What the engine is made of: for tests and for servers that build on it. It may change in any release."""
        return self

    @property
    def namespace(self) -> Namespace:
        """What keys of chunks are made with; it changes when lead-ins are chosen, by this process or another."""
        self.lifetime.check_process()
        return self.lead_ins.namespace

    def close(self) -> None:
        """Store what answers have missed, then release threads and the store (if the engine opened it). Further requests are refused.

        Ctrl-C while it stores ends that behind the forward at hand, drops what still waits, and releases the rest all the same.
        A process that ends without closing its engines drops what waits.

        Where the store's disk doesn't answer, this returns after `read_timeout`, and the rest is released once the disk does. In a
        process that was forked since the engine was made, nothing is released: it all belongs to the other one.
        """
        if not self.lifetime.here:
            self.lifetime.end()
            return
        with self.model.lock:
            if not self.lifetime.end():
                return
        try:
            self.fidelity.close()
            self.backfill.close()
        finally:
            self._release()

    def _release(self) -> None:
        """End the threads and close the store, waiting for the disk as long as a request would."""

        def release() -> None:
            try:
                self.prefetcher.close()
                if self._owns_store:
                    self.store.close()
            finally:
                self.pool.close()

        if self.pool.seconds is None:
            release()
            return
        job = Job(release)
        _thread.start_new_thread(job.run, ())
        if job.wait(0 if self.pool.overdue else self.pool.seconds):
            job.result()
        else:
            _log.warning("the disk of store %s doesn't answer: it is closed once it does", self.store.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheTuneError(
            "an engine can't be pickled or copied: it has threads, locks and an open store. Threads may share one; another process "
            "makes its own, of the same model and store."
        )

    def _take_model(self) -> bool:
        """See `CacheTune.model_changed`."""
        with self.model.lock.reserved(), self.model.lock:
            changed = self.model.renew()
            self.assembler.forget()
            self.precomputer.forget()
            if changed:
                self.fidelity.drop()
                self.lead_ins.follow(self.model.fingerprint)
                self.tunings.forget()
                self.recognizer.changed()
            return changed
