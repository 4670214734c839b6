"""What an engine is made of: opened together, closed together."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from cachetune_rag.assembly import Assembler
from cachetune_rag.calibration import SavedCalibrations
from cachetune_rag.deadline import DeadlinePool, StoreTimeoutError, check_timeout
from cachetune_rag.errors import EngineClosedError
from cachetune_rag.fidelity import FidelitySampler
from cachetune_rag.figures import StoreFigures
from cachetune_rag.found_watch import FoundWatch
from cachetune_rag.leads import LeadIns, given_lead_ins
from cachetune_rag.loading import check_loaded, load_model
from cachetune_rag.missed import MissedChunks
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from cachetune_rag.model_lock import ModelLock
from cachetune_rag.options import ENGINE_NAMES, EngineOptions, StoreOptions, check_names
from cachetune_rag.pipeline.prefetch import Prefetcher
from cachetune_rag.plain_prompts import PlainPrompts
from cachetune_rag.precompute import Precomputer
from cachetune_rag.profiles import Profiles
from cachetune_rag.prompt import PromptBuilder
from cachetune_rag.recognition import StoreRecognizer
from cachetune_rag.request_runner import RequestRunner
from cachetune_rag.stats import RequestCounter
from cachetune_rag.storage import check_not_open, open_store
from cachetune_rag.telemetry.observer import Observers
from cachetune_rag.tokens import private_copy
from cachetune_rag.tuning.saved import SavedTunings
from cachetune_store import ChunkStore, Namespace

_LOADING = ("gguf_file", "device", "dtype", "revision")
"""What `from_pretrained` takes itself: among them is what a wrong name may mean."""


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
        self._lock = ModelLock()
        self.adapter = ModelAdapter(model, cuda_kernels=cuda_kernels)
        self._fidelity = FidelitySampler(fidelity_sample, self.adapter, self._lock)
        self.tokenizer = private_copy(tokenizer)
        """The engine's own: what happens to the caller's later has no effect."""
        self.model_name: str = getattr(model.config, "_name_or_path", "") or self.adapter.architecture
        self.prompts = PromptBuilder(
            tokenizer,
            template=prompt_template,
            chunk_separator=chunk_separator,
            chat_template_kwargs=chat_template_kwargs,
        )
        namespace = Namespace(
            model=model_fingerprint(model),
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
            self.adapter, self.store, self.lead_ins, self._pool, self._prefetcher, self._tunings.apply
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
        return self.lead_ins.namespace

    def close(self) -> None:
        """Store what answers have missed, then release threads and the store (if the engine opened it). Further requests are refused.

        Ctrl-C while it stores ends that behind the forward at hand, drops what still waits, and releases the rest all the same.
        A process that ends without closing its engines drops what waits.
        """
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
        with suppress(StoreTimeoutError):
            self._pool.call(self._prefetcher.close)
            if self._owns_store:
                self._pool.call(self.store.close)
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one.")
