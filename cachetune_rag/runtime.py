"""Everything that an engine consists of: opened together, closed together."""

from __future__ import annotations

import _thread
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch

from cachetune_rag.answering.admission import Admission
from cachetune_rag.answering.executor import Executor
from cachetune_rag.answering.listeners import BackfillListener
from cachetune_rag.answering.plain_prompts import PlainPrompts
from cachetune_rag.checking.arguments import check_tenant
from cachetune_rag.chunks.backfill import Backfill
from cachetune_rag.chunks.chunk_computer import ChunkComputer
from cachetune_rag.chunks.found_watch import FoundWatch
from cachetune_rag.chunks.lead_in_choice import given_lead_ins
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.chunks.precompute import Precomputer
from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.chunks.stored_codecs import stored_codecs
from cachetune_rag.concurrency.deadline import FAR_READERS, READERS, DeadlinePool, check_timeout
from cachetune_rag.concurrency.lifetime import Lifetime
from cachetune_rag.concurrency.workers import Job
from cachetune_rag.errors import ConfigError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.measuring.calibration.saved import SavedCalibrations
from cachetune_rag.measuring.fidelity import FidelitySampler
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.measuring.tuning.saved import SavedTunings
from cachetune_rag.model.engine_model import EngineModel
from cachetune_rag.model.heads import ALL_HEADS, Heads
from cachetune_rag.model.libraries.private import loaded_from
from cachetune_rag.model.loaded.fingerprint import tokenizer_fingerprint
from cachetune_rag.model.loading import check_loaded, check_vocabulary
from cachetune_rag.options import STORE_NAMES, EngineArguments, EngineOptions
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.reuse.config import resolve
from cachetune_rag.reuse.prefill import Assembler
from cachetune_rag.reuse.row_kernels import warm_up as warm_up_loading
from cachetune_rag.selection import get_selector
from cachetune_rag.telemetry.observer import ObserverListener, Observers
from cachetune_rag.telemetry.stats import EngineStats, LastKnownStoreStats, RequestCounter
from cachetune_rag.text.prompts.finders import finders_for
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.tokenizer import private_copy
from cachetune_store import ChunkStore, Namespace, StoreError
from cachetune_store.printing import shown
from cachetune_store.units import parse_bytes

_log = logging.getLogger(__name__)


class Runtime:
    """Opens a model's adapter and a store, makes everything that works between the two, and closes it again.

    `CacheTune` documents the arguments; `fingerprint` and `heads` are `EngineModel`'s. Tests, and servers that build on this package, may use the attributes, but any release may
    change them.

    Attributes:
        lifetime: whether the engine may still be used.
        model: the model, its lock, and the weights that chunks are stored for.
        adapter: runs the model.
        tokenizer: the engine's own copy of the tokenizer: changes to the caller's have no effect.
        model_name: path or hub id that the model was loaded from, or its architecture.
        prompts: lays prompts out.
        store: where chunks are kept.
        pool: makes the store's disk calls, with a limit on the time that they may take.
        prefetcher: reads chunks from disk before the requests that need them.
        lead_ins: choose and know what stands before chunks while they are computed.
        profiles: saved results of measurements.
        calibrations, tunings: saved ratios.
        assembler: reads prompts, with stored chunks reused.
        recognizer: finds stored chunks inside of texts.
        found_watch: warns where little of what was retrieved is found.
        plain_prompts: builds prompts from texts and messages.
        chunk_computer: computes and stores chunks.
        precomputer: stores documents.
        backfill: stores the chunks that requests missed.
        fidelity: compares a share of the answers with full prefill.
        counter: adds up requests.
        observers: users' own listeners (`cachetune_rag.telemetry`).
        store_stats: the store's statistics, also while its disk doesn't answer.
        admission: turns callers' arguments into requests.
        executor: runs requests.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: str | os.PathLike[str] | ChunkStore | None = None,
        *,
        device: str | torch.device | None = None,
        fingerprint: str | None = None,
        heads: Heads = ALL_HEADS,
        **options: Unpack[EngineArguments],
    ):
        given = EngineOptions.of(options)
        check_loaded(model, tokenizer)
        self.lifetime = Lifetime()
        check_vocabulary(model, tokenizer)
        self.model = EngineModel(model, cuda_kernels=given.cuda_kernels, fingerprint=fingerprint, heads=heads)
        self.adapter = self.model.adapter
        self.fidelity = FidelitySampler(given.fidelity_sample, self.adapter, self.model.lock, self.model.check)
        self.tokenizer = private_copy(tokenizer)
        self.model_name: str = loaded_from(model.config) or self.adapter.architecture
        self.prompts = PromptBuilder(
            tokenizer,
            template=given.prompt_template,
            chunk_separator=given.chunk_separator,
            chat_template_kwargs=given.chat_template_kwargs,
        )
        check_tenant(given.tenant)
        namespace = Namespace(
            model=self.model.fingerprint,
            tokenizer=tokenizer_fingerprint(tokenizer),
            dtype=str(self.adapter.dtype).removeprefix("torch."),
            lead_ins=given_lead_ins(given.lead_in, self.prompts.first_token, self.adapter.config.vocab_size),
            tenant=given.tenant,
        )
        self._owns_store = not isinstance(store, ChunkStore)
        check_timeout(given.read_timeout)  # also where the store is in memory and nothing waits for a disk
        of_store: dict[str, Any] = {name: value for name, value in options.items() if name in STORE_NAMES}
        if device is not None:
            of_store["device"] = device
        self.store = opened_store(store, self.adapter.device, of_store)
        kinds = [kind for kind in self.store.tiers if not kind.in_memory]
        far = any(kind.shared_by == "machines" for kind in kinds)
        self.pool = DeadlinePool(given.read_timeout if kinds else None, readers=FAR_READERS if far else READERS)
        self.prefetcher = Prefetcher(self.store)
        try:
            self._connect(namespace, choose_lead_ins=given.lead_in == "auto", batch_tokens=given.batch_tokens)
        except BaseException:
            self._release()
            raise

    def _connect(self, namespace: Namespace, *, choose_lead_ins: bool, batch_tokens: int | None) -> None:
        """Make everything that works between model and store."""
        self.lead_ins = LeadIns(
            self.store,
            namespace,
            choose=choose_lead_ins,
            vocabulary=self.adapter.config.vocab_size,
            limit=self.adapter.max_positions,
            separator=self.prompts.separator_ids,
            call=self.pool.call,
        )
        self.profiles = Profiles(self.store.path, self.pool.call, self.store.seal)
        self.calibrations = SavedCalibrations(self.profiles, self.lead_ins, self.store, self.model_name)
        self.tunings = SavedTunings(self.profiles, self.adapter, self.lead_ins, self.calibrations.ratio)
        self.assembler = Assembler(
            self.adapter,
            self.store,
            self.lead_ins,
            self.pool,
            self.prefetcher,
            self.tunings.apply,
            self.model.check,
            finders_for(self.tokenizer, self.prompts.control_ids),
        )
        if batch_tokens is None:
            batch_tokens = 8192 if self.adapter.device.type == "cuda" else 0
        self.recognizer = StoreRecognizer(self.store, self.lead_ins, self.pool.call)
        self.found_watch = FoundWatch(self.recognizer)
        self.plain_prompts = PlainPrompts(self.prompts, self.recognizer, self.found_watch)
        self.chunk_computer = ChunkComputer(
            self.adapter,
            self.store,
            self.lead_ins,
            self.model.lock,
            batch_tokens,
            self.recognizer.chunk_stored,
            self.model.check_all,
        )
        self.precomputer = Precomputer(
            self.chunk_computer, self.store, self.lead_ins, self.prompts.encode, self.adapter.max_positions
        )
        self.backfill = Backfill(self.chunk_computer, self.pool.call, self.model.lock)
        self.counter = RequestCounter()
        self.store_stats = LastKnownStoreStats(self.store, self.pool)
        self.observers = Observers()
        self.admission = Admission(
            self.adapter,
            self.tokenizer,
            self.prompts,
            self.lead_ins,
            self.calibrations.ratio,
            self.calibrations.predictor,
        )
        listeners = (
            BackfillListener(self.backfill),
            self.counter,
            ObserverListener(self.observers),
            self.fidelity,
        )
        self.executor = Executor(self.model, self.assembler, self.prefetcher, self.lead_ins, self.lifetime, listeners)

    @property
    def namespace(self) -> Namespace:
        """What chunks' keys are made with; it changes when lead-ins are chosen, by this process or another."""
        return self.lead_ins.namespace

    def bench(self) -> Bench:
        """What measures on this engine beside its requests, for calibration and tuning."""
        return Bench(
            model=self.model,
            store=self.store,
            tokenizer=self.tokenizer,
            lead_ins=self.lead_ins,
            pool=self.pool,
            lifetime=self.lifetime,
            admission=self.admission,
            executor=self.executor,
            assembler=self.assembler,
            chunk_computer=self.chunk_computer,
            flush=self.backfill.wait,
        )

    def close(self) -> None:
        """Do what `CacheTune.close` documents."""
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
        """End the threads and close the store; wait for the disk no longer than a request would."""

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

    def warmup(self, computed_tokens: int, prompt_lengths: Sequence[int], selector: str, largest: int = 0) -> None:
        """Do what `CacheTune.warmup` documents; `largest` as for `DeviceForward.warmup`."""
        with self.model.lock.reserved(), self.model.lock:
            chosen = get_selector(resolve(selector, 0).selector)
            # Deviations are known only of chunks that are a mean over lead-ins; of others, the attention alone is looked at.
            mean = len(self.lead_ins.namespace.lead_ins) > 1
            layers = chosen.layers(self.adapter.num_layers)
            errors = mean and chosen.uses_deviations
            after = chosen.shortlist_after(self.adapter.num_layers) if errors else 0
            probe = (layers, errors, after) if layers else None
            self.adapter.warmup(computed_tokens, probe, prompt_lengths, mean and chosen.shift > 0, largest)
            for codec in self._codecs():
                warm_up_loading(self.adapter, codec)

    def _codecs(self) -> list[str]:
        """Codecs of chunks that requests will show: those in which chunks are stored, and will be. On a CPU, nobody needs to know."""
        own = self.store.codec
        if not self.adapter.cuda_kernels:
            return [own]
        try:
            stored: set[str] = self.pool.call(stored_codecs, self.store, self.lead_ins.base.tenant)
        except StoreError as error:
            _log.warning(
                "the first request with chunks in another codec than %s waits for the compiler: %s", own, error
            )
            return [own]
        return sorted({own} | stored)

    def model_changed(self) -> bool:
        """Do what `CacheTune.model_changed` documents."""
        with self.model.lock.reserved(), self.model.lock:
            changed = self.model.renew()
            self.assembler.forget()
            self.chunk_computer.forget()
            if changed:
                self.fidelity.drop()
                self.lead_ins.model_changed(self.model.fingerprint)
                self.tunings.forget()
                self.recognizer.changed()
            return changed

    def stats(self) -> EngineStats:
        """Do what `CacheTune.stats` documents."""
        store, age = (self.store.stats(), 0.0) if self.lifetime.closed else self.store_stats.get()
        return self.counter.stats(
            store,
            self.fidelity.stats(),
            store_age=age,
            unstored=self.backfill.unstored,
            withdrawn=self.backfill.withdrawn,
            storing=self.backfill.waiting,
            little_found=self.found_watch.prompts,
            cut_short=self.recognizer.cut_short,
        )


def opened_store(
    store: str | os.PathLike[str] | ChunkStore | None, device: torch.device, options: Mapping[str, Any]
) -> ChunkStore:
    """The given store if it is open already, or else a new one with these options, its device tier on the model's device.

    Raises:
        ConfigError: options for a store that is open already, or values out of range; or a device tier for a model
            on the CPU.
        StoreError: the folder can't be used.
    """
    check_not_open(store, options)
    if isinstance(store, ChunkStore):
        return store
    budget = options.get("device_budget", 0)
    try:
        if parse_bytes(budget, "device_budget") and device.type == "cpu":
            raise ConfigError(
                f"device_budget is {shown(budget)}, but the model is on the CPU, whose memory is the host tier's: leave it out "
                "and set host_budget, or load the model on a GPU."
            )
        return ChunkStore(store, **{"device": device, **options})
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def check_not_open(store: str | os.PathLike[str] | ChunkStore | None, names: Iterable[str]) -> None:
    """Refuse store options, given by name, for a store that is open already.

    Raises:
        ConfigError: names the options.
    """
    if isinstance(store, ChunkStore) and (given := [name for name in names if name in STORE_NAMES]):
        raise ConfigError(f"{', '.join(given)} belong to the store, which is open already: set them there.")
