"""The engine, as a user sees it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from cachetune_rag.answer import Answer, AnswerStream
from cachetune_rag.assembly import Assembler, PrefillState
from cachetune_rag.calibration import Calibration, profile_key, save, saved_ratio
from cachetune_rag.calibrator import RATIOS, CalibrationPlan, CalibrationProgress, Calibrator
from cachetune_rag.config import ReuseConfig, resolve
from cachetune_rag.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.decoding import prepare
from cachetune_rag.documents import Document
from cachetune_rag.errors import ConfigError, EngineClosedError, PromptTooLongError
from cachetune_rag.fidelity import FidelitySampler
from cachetune_rag.leads import LeadIns, given_lead_ins
from cachetune_rag.loading import load_model
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from cachetune_rag.model_lock import ModelLock
from cachetune_rag.pipeline.device import warm_up as warm_up_loading
from cachetune_rag.pipeline.prefetch import Prefetch, Prefetcher
from cachetune_rag.precompute import Precomputer, Progress
from cachetune_rag.profiles import Profiles
from cachetune_rag.prompt import Chunk, Prompt, PromptBuilder, Segment
from cachetune_rag.recognition import StoreRecognizer
from cachetune_rag.report import PrecomputeSummary
from cachetune_rag.request_queue import generate_many
from cachetune_rag.selection.expected_error import ExpectedErrorSelector
from cachetune_rag.stats import EngineStats, RequestCounter
from cachetune_rag.storage import open_store
from cachetune_rag.telemetry.observer import Observers, new_request_id
from cachetune_rag.tuning import TuneProgress, TuningResult
from cachetune_rag.tuning.saved import SavedTunings
from cachetune_rag.tuning.tuner import R_MAX, ROUNDS, TOKENS, Tuner, TuningPlan
from cachetune_store import ChunkKey, ChunkStore, Namespace, StoreError, UnknownDocumentError
from cachetune_store.histogram import Histogram

_log = logging.getLogger(__name__)


class CacheTune:
    """Answers prompts whose document chunks were run through the model beforehand.

    Args:
        model: a causal language model of transformers, whole on one device. It is put into eval mode.
        tokenizer: its tokenizer.
        store: a folder for the KV store, an open `ChunkStore`, or None to keep KV in memory only.
        prompt_template: text with {prefix}, {chunks} and {query}; default: the tokenizer's chat template.
        chunk_separator: text between chunks; it is computed, never stored.
        lead_in: what is put before a chunk when it is precomputed. "auto": stretches of the texts that are stored, once they
            have 1,024 tokens, and the prompt's first token before that; the mean of the KV behind them is kept. They are
            chosen once for a store, model and tenant, and stay. "first_token": the prompt's first token. Or token ids, or a
            list of several lists of these. Behind a single lead-in, KV is exact where the chunk stands right behind it.
        tenant: chunks of different tenants never meet.
        batch_tokens: tokens that precompute runs at once; default: 8192 on a GPU, one chunk at a time on a CPU.
        cuda_kernels: on a GPU that can (Ampere or newer, with Triton), run requests through this package's kernels, CUDA graphs
            and copy streams: several times sooner (docs/gpu.md). False: as on a CPU.
        fidelity_sample: share of the answers, from 0 (off) to 1, that are compared with full prefill once they are out and the
            model is idle; `stats()` gives the result. Up to two prompts' KV is kept for it (docs/calibration.md).
        read_timeout: seconds that a request waits for the store's disk each time it needs it; then it goes on without it, and
            computes what isn't in host memory. None: as long as it takes.
        store_options: further arguments of `ChunkStore` (codec, host_budget, disk_budget, device_budget, ...).

    Raises:
        UnsupportedModelError: reuse can't be exact for this architecture; the message says why.
        ConfigError: an argument is out of range.

    Any number of threads may use one engine; the model runs one forward at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: str | os.PathLike[str] | ChunkStore | None = None,
        *,
        prompt_template: str | None = None,
        chunk_separator: str = "\n\n",
        lead_in: Sequence[int] | Sequence[Sequence[int]] | str = "auto",
        tenant: str = "",
        batch_tokens: int | None = None,
        cuda_kernels: bool = True,
        fidelity_sample: float = 0.0,
        read_timeout: float | None = 30.0,
        **store_options: Any,
    ):
        self._lock = ModelLock()
        self.adapter = ModelAdapter(model, cuda_kernels=cuda_kernels)
        self._fidelity = FidelitySampler(fidelity_sample, self.adapter, self._lock)
        self.tokenizer = tokenizer
        self.model_name: str = getattr(model.config, "_name_or_path", "") or self.adapter.architecture
        self.prompts = PromptBuilder(tokenizer, template=prompt_template, chunk_separator=chunk_separator)
        namespace = Namespace(
            model=model_fingerprint(model),
            tokenizer=tokenizer_fingerprint(tokenizer),
            dtype=str(self.adapter.dtype).removeprefix("torch."),
            lead_ins=given_lead_ins(lead_in, self.prompts.first_token, self.adapter.config.vocab_size),
            tenant=tenant,
        )
        self._owns_store = not isinstance(store, ChunkStore)
        self.store = open_store(store, self.adapter.device, store_options)
        self._pool = DeadlinePool(None if self.store.path is None else read_timeout)
        self.lead_ins = LeadIns(
            self.store,
            namespace,
            choose=lead_in == "auto",
            vocabulary=self.adapter.config.vocab_size,
            limit=self.adapter.max_positions,
            call=self._pool.call,
        )
        """What stands before chunks while they are computed."""
        self.profiles = Profiles(self.store.path, self._pool.call)
        self._prefetcher = Prefetcher(self.store)
        self._tunings = SavedTunings(self)
        self._assembler = Assembler(
            self.adapter, self.store, self.lead_ins, self._pool, self._prefetcher, self._tunings.apply
        )
        if batch_tokens is None:
            batch_tokens = 8192 if self.adapter.device.type == "cuda" else 0
        self._recognizer = StoreRecognizer(self.store, self.lead_ins, self._pool.call)
        self._precomputer = Precomputer(
            self.adapter,
            self.store,
            self.lead_ins,
            self.prompts.encode,
            self._lock,
            batch_tokens,
            self._recognizer.add,
        )
        self._counter = RequestCounter()
        self.observers = Observers()
        """Who is told about requests (`cachetune_rag.telemetry`)."""
        self._closed = False

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
        **options: Any,
    ) -> Self:
        """Load model and tokenizer by path or hub id, and open the store.

        Args:
            model: a folder or a hub id, as transformers takes it.
            store: see the class.
            gguf_file: name of a GGUF file in that folder; its weights are dequantised.
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
            dtype: "auto" (the checkpoint's own; float32 on a CPU, where half types are slow), or a torch dtype or its name.
            revision: branch, tag or commit on the hub.
            options: further arguments of the class.
        """
        loaded, tokenizer = load_model(model, gguf_file=gguf_file, device=device, dtype=dtype, revision=revision)
        return cls(loaded, tokenizer, store, **options)

    @property
    def namespace(self) -> Namespace:
        """What keys of chunks are made with; it changes when lead-ins are chosen, by this process or another."""
        return self.lead_ins.namespace

    # -- indexing -------------------------------------------------------------------------------------------------

    def precompute(
        self,
        documents: Iterable[Document | str] | Document | str,
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> PrecomputeSummary:
        """Compute and store the KV of documents' chunks. What is stored already is skipped, so a cut-off run resumes.

        Args:
            documents: documents, or strings (each a document of one chunk), as any iterable: a generator is consumed
                one document at a time.
            progress: called after every stored batch.
        """
        self._check_open()
        if isinstance(documents, Document | str):
            documents = [documents]
        try:
            return self._precomputer.run(documents, progress)
        finally:
            self._recognizer.changed()  # a document that was replaced may have freed chunks

    def remove(self, document_id: str, *, missing_ok: bool = False) -> int:
        """Forget a document and free the chunks that no other document holds. Returns the bytes freed.

        Raises:
            UnknownDocumentError: there is no such document, unless `missing_ok`.
        """
        self._check_open()
        try:
            return self.store.delete_document(document_id, tenant=self.namespace.tenant)
        except UnknownDocumentError:
            if missing_ok:
                return 0
            raise
        finally:
            self._recognizer.changed()

    # -- prompts --------------------------------------------------------------------------------------------------

    def prompt_from_text(self, text: str | Sequence[Segment | str], *, recognise: bool = True) -> Prompt:
        """A plain completion prompt: BOS, if the tokenizer adds one, and the text.

        Args:
            text: a string, or texts and chunks. Control tokens in it stay text.
            recognise: find chunks of the store inside the text and reuse them; each is verified in full.
        """
        if not recognise:
            return self.prompts.build_text([text] if isinstance(text, str) else text)
        segments = self._recognizer.segments(text)
        given = 0 if isinstance(text, str) else _count_chunks(text)
        return replace(self.prompts.build_text(segments), recognised=_count_chunks(segments) - given)

    def prompt_from_messages(self, messages: Sequence[Mapping[str, Any]], *, recognise: bool = True) -> Prompt:
        """A conversation through the tokenizer's chat template, up to where the assistant speaks.

        Args:
            messages: each {"role": ..., "content": ...}; content is a string, or a list of `Text`, `Chunk` and strings.
            recognise: as for `prompt_from_text`.
        """
        if not recognise:
            return self.prompts.build_messages(messages)
        found = self._recognizer.messages(messages)
        given = sum(_count_chunks(m["content"]) for m in messages if not isinstance(m["content"], str))
        recognised = sum(_count_chunks(m["content"]) for m in found) - given
        return replace(self.prompts.build_messages(found), recognised=recognised)

    # -- answering ------------------------------------------------------------------------------------------------

    def generate(
        self, query: str | None = None, chunks: Sequence[str] = (), prefix: str | None = None, **options: Any
    ) -> Answer:
        """Answer a query over retrieved chunks; arguments as for `stream`. Returns the whole answer."""
        with self.stream(query, chunks, prefix, **options) as pieces:
            for _ in pieces:
                pass
            return pieces.answer

    def stream(
        self,
        query: str | None = None,
        chunks: Sequence[str] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        ratio: float | str = "auto",
        selector: str = "auto",
        reuse: bool = True,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] | None = None,
        generation_config: Any = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Answer piece by piece: iterate over the returned stream for text; its `answer` and `report` fill on the way.

        Args:
            query: the user's question.
            chunks: texts of the retrieved chunks, in prompt order. Those not in the store are computed in this request,
                exactly, and stored after the answer.
            prefix: text before the chunks; default: a short instruction, "" for none.
            prompt: a prompt from `engine.prompts`, instead of query, chunks and prefix.
            ratio: share of the chunk tokens to recompute, in [0, 1], or "auto": the calibrated one, if there is one.
            selector: which tokens those are: a registered name or "auto".
            reuse: False computes everything (the reference).
            max_new_tokens: most tokens of the answer; fewer where the model's context ends.
            stop: strings that end the answer; they are not part of it.
            generation_config: a transformers GenerationConfig; default: the model's own.
            sampling: overrides of it, e.g. do_sample, temperature, top_p, repetition_penalty; and seed.

        Raises:
            ConfigError, PromptError, PromptTooLongError: the request can't be served; nothing was computed.
        """
        self._check_open()
        started = time.perf_counter()
        config = self._config(selector, ratio)
        prompt = self._prompt(query, chunks, prefix, prompt)
        room = max_new_tokens
        if self.adapter.max_positions is not None:
            room = min(room, self.adapter.max_positions - len(prompt.ids))
        plan = prepare(
            self.adapter.model,
            self.tokenizer,
            list(prompt.ids),
            generation_config=generation_config,
            max_new_tokens=room,
            stop=[stop] if isinstance(stop, str) else list(stop or ()),
            **sampling,
        )
        return AnswerStream(self, prompt, config if reuse else None, plan, started)

    def generate_many(self, requests: Iterable[Any], **options: Any) -> Iterator[Answer]:
        """Answer requests one after another, in order; while one computes, the next one's chunks are read from disk.

        They are read into host memory, within the store's `host_budget`; answers are those of `generate`. The next request is
        taken from `requests` before the one at hand is answered.

        Args:
            requests: dicts of arguments of `generate`, or prompts; any iterable.
            options: arguments for all of them, such as max_new_tokens; a request's own go first.

        Raises:
            ConfigError, PromptError, PromptTooLongError: on a request's turn; those before it were answered.
        """
        self._check_open()
        return generate_many(self, requests, options)

    def prefetch(self, chunks: Sequence[str] = (), *, prompt: Prompt | None = None) -> Prefetch:
        """Have a coming request's chunks read from disk into host memory, on threads of their own; returns at once.

        It fills at most the store's `host_budget`. Chunks that aren't stored are left to the request, and so is any error of
        reading. A request that begins meanwhile ends the prefetch of its own chunks.

        Args:
            chunks: texts of the chunks, the most wanted first.
            prompt: a prompt from `engine.prompts`, instead of chunks.
        """
        self._check_open()
        if isinstance(chunks, str) or (chunks and prompt is not None):
            raise ConfigError("prefetch takes either chunks=, a list of strings, or prompt=.")
        texts = tuple(chunks)

        def keys() -> list[ChunkKey]:
            every = map(self.prompts.encode, texts) if prompt is None else prompt.chunk_ids
            return [self._assembler.key(ids) for ids in every if ids]

        return self._prefetcher.fetch(keys)

    def prefill(
        self,
        query: str | None = None,
        chunks: Sequence[str] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        ratio: float | str = "auto",
        selector: str = "auto",
    ) -> PrefillState:
        """Read a prompt with reuse and stop there: logits [1, vocab], cache, report. Missing chunks are stored."""
        self._check_open()
        started = time.perf_counter()
        config = self._config(selector, ratio)
        state = self._run_prefill(self._prompt(query, chunks, prefix, prompt), config, started)
        return replace(state, report=replace(state.report, unstored=self._store_missed(state)))

    def full_prefill(
        self,
        query: str | None = None,
        chunks: Sequence[str] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
    ) -> PrefillState:
        """Read the same tokens without reuse: what `prefill` is measured against."""
        self._check_open()
        started = time.perf_counter()
        return self._run_prefill(self._prompt(query, chunks, prefix, prompt), None, started)

    def warmup(self, computed_tokens: int = 2048, prompt_lengths: Sequence[int] = (8192, 32768)) -> None:
        """Make ready for requests, so that none of them pays for compiling: on a GPU, compile kernels and the model's layers and
        capture a CUDA graph for every size of request up to `computed_tokens`. Takes about a minute. Elsewhere there is
        nothing to do.

        A full pass of Python's garbage collector over all that torch and transformers consist of can take longer than a request.
        A server that wants none of them calls `gc.collect(); gc.freeze()` behind this; a library should not.

        Args:
            computed_tokens: most tokens that a request computes: ratio times its chunks' tokens, prefix and query. Larger
                requests work as well; they run without a graph, which they gain little from.
            prompt_lengths: lengths of prompts that the default selector, which looks at the attention, is made ready for.
        """
        self._check_open()
        with self._lock.reserved(), self._lock:
            selector = ExpectedErrorSelector()
            # What "auto" does with chunks that are a mean over lead-ins; with others it looks at the attention alone.
            mean = len(self.lead_ins.namespace.lead_ins) > 1
            probe = selector.layers(self.adapter.num_layers), mean
            self.adapter.warmup(computed_tokens, probe, prompt_lengths, mean and selector.shift > 0)
            warm_up_loading(self.adapter, self.store.codec)

    # -- fidelity -------------------------------------------------------------------------------------------------

    def calibrate(
        self,
        samples: Iterable[Any],
        *,
        bound: float | None = None,
        measure: str = "kl",
        selector: str = "auto",
        ratios: Sequence[float] = RATIOS,
        tokens: int = 32,
        quantile: float | None = None,
        progress: Callable[[CalibrationProgress], None] | None = None,
    ) -> Calibration:
        """Find the smallest ratio that keeps reuse within a bound of full prefill on some of your own prompts, and save it.

        For every sample, full prefill's greedy continuation is the reference; at each ratio, the distributions of the same
        tokens behind a reused prompt are compared with it. Chunks that aren't stored are precomputed first. From then on
        `ratio="auto"` means the ratio found, for this selector, in this engine and in later ones with the same model,
        tokenizer, dtype, lead-in, tenant and codec on this store. docs/calibration.md says more.

        Args:
            samples: dicts (or objects) with query, chunks and perhaps prefix, as for `generate`; or prompts.
            bound: what has to hold: at most so many nats a token ("kl"; default 0.05), or at least this share of tokens
                ("top1"; default 0.95).
            measure: "kl": KL(full || reuse) of each token; "top1": whether both find the same token the likeliest.
            selector: whose ratio is sought: a registered name or "auto".
            ratios: those to try.
            tokens: most tokens of a continuation.
            quantile: None: the mean over samples has to keep the bound; q in (0, 1]: at least this share of samples has to.
            progress: called after every prefill.

        Raises:
            ConfigError, PromptError: an argument or a sample can't be used; nothing was computed.
            CacheTuneError: the samples' chunks don't stay in the store.
        """
        self._check_open()
        plan = CalibrationPlan.of(
            bound=bound, measure=measure, selector=selector, ratios=ratios, tokens=tokens, quantile=quantile
        )
        found = Calibrator(self, plan, progress).run(samples)
        return save(found, self.profiles, self._profile_key(found.selector), self.model_name)

    def calibrated_ratio(self, selector: str = "auto") -> float | None:
        """The ratio that `calibrate` saved for a selector, the least that keeps its bound; None if there is none."""
        return saved_ratio(self.profiles, self._profile_key(resolve(selector, 0).selector))

    # -- tuning ---------------------------------------------------------------------------------------------------

    def tune(
        self,
        samples: Iterable[Any] | None = None,
        *,
        tier: str = "auto",
        selector: str = "auto",
        r_min: float | None = None,
        r_max: float = R_MAX,
        rounds: int = ROUNDS,
        tokens: int = TOKENS,
        progress: Callable[[TuneProgress], None] | None = None,
    ) -> TuningResult:
        """Measure, for each tier, at which ratio the first token comes soonest on this machine, and save it.

        From then on `ratio="auto"` means that ratio for requests whose slowest chunk comes from that tier, in this engine and in
        later ones on this store with the same model, hardware and codec. docs/tuning.md says how it is sought.

        Args:
            samples: dicts with query, chunks and perhaps prefix, as for `generate`, or prompts; chunks that aren't stored are
                precomputed. None: prompts made of stored chunks.
            tier: "device", "host", "disk", or "auto": each that chunks can come from.
            selector: whose ratio is sought: a registered name or "auto".
            r_min: the least ratio; None: the calibrated one, or 0.15 where nothing was calibrated.
            r_max: the largest ratio.
            rounds: times that every setting is measured; the median counts.
            tokens: chunk tokens of a made prompt. Times depend on it: take your prompts' size.
            progress: called after every measured setting.

        Raises:
            ConfigError, PromptError: an argument or a sample can't be used, or there is nothing stored to measure with.
            CacheTuneError: chunks left the store while it was tuned.
        """
        self._check_open()
        plan = TuningPlan.of(tier=tier, selector=selector, r_min=r_min, r_max=r_max, rounds=rounds, tokens=tokens)
        return Tuner(self, plan, progress).run(samples)

    # -- state ----------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Totals over this engine's requests, and the store's state."""
        return self._counter.stats(self.store.stats(), self._fidelity.stats())

    def ttft_histograms(self) -> dict[str, Histogram]:
        """Times to first token of requests with reuse, by the slowest tier that each read from."""
        return self._counter.ttft_histograms()

    def close(self) -> None:
        """Release threads and the store (if the engine opened it). Further requests are refused."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._fidelity.close()
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

    # -- inside ---------------------------------------------------------------------------------------------------

    def _prompt(self, query: str | None, chunks: Sequence[str], prefix: str | None, prompt: Prompt | None) -> Prompt:
        if prompt is None:
            if query is None:
                raise ConfigError("a request needs query= (with chunks=), or prompt= built by engine.prompts.")
            if isinstance(chunks, str):
                raise ConfigError("chunks is a string: use a list of strings, one a retrieved passage.")
            prompt = self.prompts.build(query=query, chunks=chunks, prefix=prefix)
        elif query is not None or chunks or prefix is not None:
            raise ConfigError("a request takes either prompt= or query=, chunks= and prefix=, not both.")
        if not prompt.ids:
            raise ConfigError("the prompt has no tokens: give a query or a prefix.")
        limit = self.adapter.max_positions
        if limit is not None and len(prompt.ids) >= limit:
            raise PromptTooLongError(
                f"the prompt has {len(prompt.ids)} tokens and the model's context is {limit}, which must also hold the "
                "answer: retrieve fewer or shorter chunks."
            )
        return prompt

    def _config(self, selector: str, ratio: float | str) -> ReuseConfig:
        config = resolve(selector, ratio)
        calibrated = self.calibrated_ratio(config.selector) if ratio == "auto" else None
        return config if calibrated is None else replace(config, ratio=calibrated)

    def _profile_key(self, selector: str) -> dict[str, str]:
        return profile_key(self.namespace, selector, self.store.codec)

    def _run_prefill(
        self,
        prompt: Prompt,
        config: ReuseConfig | None,
        started: float,
        when_read: Callable[[], None] = lambda: None,
    ) -> PrefillState:
        with self._lock.reserved(), self._lock:
            self._check_open()
            if config is None:
                when_read()
                state = self._assembler.full_prefill(prompt, started)
            else:
                state = self._assembler.prefill(prompt, config, started, when_read)
        report = replace(state.report, request_id=new_request_id())
        self._counter.add(report)
        self.observers.prefilled(report)
        return replace(state, report=report)

    def _store_missed(self, state: PrefillState) -> int:
        """Keep what a request had to compute, for the next one; how many chunks could not be kept.

        The answer doesn't depend on it, so no error ends it.
        """
        if not state.missed:
            return 0
        prompt = state.prompt
        kept: list[ChunkKey] = []
        try:
            given = [(prompt.chunk_ids[i], prompt.chunk_texts[i]) for i in state.missed]
            self._precomputer.store_chunks(given, call=self._pool.call, kept=kept.append)
        except StoreError as error:
            _log.warning(
                "%d chunks of a request could not be stored and will be computed again: %s",
                len(state.missed) - len(kept),
                error,
            )
        return len(state.missed) - len(kept)

    def _forward(self, token: int, cache: Any) -> torch.Tensor:
        """One decoding step: logits [1, vocab] after `token`."""
        with self._lock:
            self._check_open()
            return self.adapter.forward(torch.tensor([token], device=self.adapter.device), cache)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one.")


def _count_chunks(segments: Sequence[Segment | str]) -> int:
    return sum(isinstance(segment, Chunk) for segment in segments)
