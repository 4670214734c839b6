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
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.concurrency.workers import Job
from cachetune_rag.errors import CacheTuneError, ConfigError, EngineClosedError, ModelChangedError
from cachetune_rag.measuring.calibration.result import SavedCalibrations
from cachetune_rag.measuring.fidelity import FidelitySampler
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.measuring.tuning.saved import SavedTunings
from cachetune_rag.model.libraries.private import loaded_from
from cachetune_rag.model.loaded.fingerprint import tokenizer_fingerprint
from cachetune_rag.model.loading import check_loaded, check_vocabulary, load_model
from cachetune_rag.model.shared import SharedModel
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
        self._origin = this_process()
        check_vocabulary(model, tokenizer)
        self._shared = SharedModel.of(model)
        self._lock = self._shared.lock
        self._fingerprint = self._shared.read()
        self.adapter = self._shared.adapter(cuda_kernels=cuda_kernels)
        self._layout = self.adapter.layout
        self._fidelity = FidelitySampler(fidelity_sample, self.adapter, self._lock, self._check_model)
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
            model=self._fingerprint,
            tokenizer=tokenizer_fingerprint(tokenizer),
            dtype=str(self.adapter.dtype).removeprefix("torch."),
            lead_ins=given_lead_ins(lead_in, self.prompts.first_token, self.adapter.config.vocab_size),
            tenant=tenant,
        )
        self._owns_store = not isinstance(store, ChunkStore)
        path = store.path if isinstance(store, ChunkStore) else store
        check_timeout(read_timeout)  # of a store in memory too, which waits for no disk
        self._pool = DeadlinePool(None if path is None else read_timeout)
        self.store = open_store(store, self.adapter.device, store_options)
        self._prefetcher = Prefetcher(self.store)
        try:
            self._connect(namespace, choose_leads=lead_in == "auto", batch_tokens=batch_tokens)
        except BaseException:
            self._release()
            raise
        self._closed = False

    def _connect(self, namespace: Namespace, *, choose_leads: bool, batch_tokens: int | None) -> None:
        """Make what works between model and store."""
        self.lead_ins = LeadIns(
            self.store,
            namespace,
            choose=choose_leads,
            vocabulary=self.adapter.config.vocab_size,
            limit=self.adapter.max_positions,
            separator=self.prompts.separator_ids,
            call=self._pool.call,
        )
        """What stands before chunks while they are computed."""
        self.profiles = Profiles(self.store.path, self._pool.call)
        self._calibrations = SavedCalibrations(self)
        self._tunings = SavedTunings(self)
        self._assembler = Assembler(
            self.adapter,
            self.store,
            self.lead_ins,
            self._pool,
            self._prefetcher,
            self._tunings.apply,
            self._check_model,
        )
        if batch_tokens is None:
            batch_tokens = 8192 if self.adapter.device.type == "cuda" else 0
        self._recognizer = StoreRecognizer(self.store, self.lead_ins, self._pool.call)
        self._watch = FoundWatch(self._recognizer)
        self._plain = PlainPrompts(self.prompts, self._recognizer, self._watch)
        self._precomputer = Precomputer(
            self.adapter,
            self.store,
            self.lead_ins,
            self.prompts.encode,
            self._lock,
            batch_tokens,
            self._recognizer.add,
            self._shared.check,
        )
        self._missed = MissedChunks(self._precomputer, self._pool.call, self._lock)
        self._counter = RequestCounter()
        self._figures = StoreFigures(self.store, self._pool)
        self.observers = Observers()
        """Who is told about requests (`cachetune_rag.telemetry`)."""
        self._requests = RequestRunner(self)

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
    def namespace(self) -> Namespace:
        """What keys of chunks are made with; it changes when lead-ins are chosen, by this process or another."""
        self._origin.check()
        return self.lead_ins.namespace

    def close(self) -> None:
        """Store what answers have missed, then release threads and the store (if the engine opened it). Further requests are refused.

        Ctrl-C while it stores ends that behind the forward at hand, drops what still waits, and releases the rest all the same.
        A process that ends without closing its engines drops what waits.

        Where the store's disk doesn't answer, this returns after `read_timeout`, and the rest is released once the disk does. In a
        process that was forked since the engine was made, nothing is released: it all belongs to the other one.
        """
        if not self._origin.here:
            self._closed = True
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._fidelity.close()
            self._missed.close()
        finally:
            self._release()

    def _release(self) -> None:
        """End the threads and close the store, waiting for the disk as long as a request would."""

        def release() -> None:
            try:
                self._prefetcher.close()
                if self._owns_store:
                    self.store.close()
            finally:
                self._pool.close()

        if self._pool.seconds is None:
            release()
            return
        job = Job(release)
        _thread.start_new_thread(job.run, ())
        if job.wait(0 if self._pool.overdue else self._pool.seconds):
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

    def _check_open(self) -> None:
        self._origin.check()
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one.")

    def _check_model(self) -> None:
        """Refuse to go on with weights that aren't those this engine stores for. The caller holds the model's lock.

        With every request, so nothing here may take a GPU long (`Weights.change`).
        """
        self._shared.check(self._fingerprint, every=False)

    def _take_model(self) -> bool:
        """See `CacheTune.model_changed`."""
        with self._lock.reserved(), self._lock:
            found = self._shared.read()
            layout = self.adapter.layout
            if layout != self._layout:
                raise ModelChangedError(
                    f"the model was changed to {layout.told}; this engine was made for {self._layout.told}. Close it and make a new one."
                )
            changed, self._fingerprint = found != self._fingerprint, found
            self._assembler.forget()
            self._precomputer.forget()
            if changed:
                self._fidelity.drop()
                self.lead_ins.follow(found)
                self._tunings.forget()
                self._recognizer.changed()
            return changed
