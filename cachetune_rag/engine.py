"""The engine, as a user sees it.

`runtime.py` makes and connects what it consists of; docs/architecture.md follows a request through it.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from cachetune_rag.answering.answer import Answer
from cachetune_rag.answering.many import answer_many
from cachetune_rag.answering.stream import AnswerStream
from cachetune_rag.checking.arguments import check_count, check_flag, check_wait, is_count
from cachetune_rag.chunks.precompute import Progress
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.explaining.explainer import Explainer
from cachetune_rag.explaining.explanation import Explanation
from cachetune_rag.measuring.calibration.calibrator import RATIOS, CalibrationPlan, CalibrationProgress, Calibrator
from cachetune_rag.measuring.calibration.result import Calibration
from cachetune_rag.measuring.profiles import check_savable
from cachetune_rag.measuring.tuning import TuneProgress, TuningResult
from cachetune_rag.measuring.tuning.tuner import R_MAX, ROUNDS, TOKENS, Tuner, TuningPlan
from cachetune_rag.model.loading import load_model
from cachetune_rag.options import ENGINE_NAMES, LOADING_NAMES, EngineArguments, check_names
from cachetune_rag.readahead.batch import Prefetch
from cachetune_rag.report import PrecomputeSummary
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.runtime import Runtime, check_not_open
from cachetune_rag.telemetry.stats import EngineStats
from cachetune_rag.text.documents import Document, check_id
from cachetune_rag.text.prompts.prompt import Chunk, Prompt, Segment
from cachetune_store import ChunkStore, DocumentInfo, Namespace, StoreClosedError, UnknownDocumentError
from cachetune_store.histogram import Histogram
from cachetune_store.printing import shown


class CacheTune:
    """Answers prompts whose document chunks were run through the model beforehand.

    Args:
        model: a causal language model of transformers, whole on one device. It stays as it is, and yours to use: engines run its
            weights through modules of their own, in eval mode. Several engines may be made on one model.
        tokenizer: its tokenizer.
        store: a folder for the KV store, an open `ChunkStore`, or None to keep KV in memory only.
        device: the device of the store's device tier, for `device_budget`; default: the model's.
        options: everything in `cachetune_rag.options.EngineOptions` (also in docs/options.md): codec and budgets of the store,
            prompt_template, lead_in, tenant, read_timeout, ...

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
        device: str | torch.device | None = None,
        **options: Unpack[EngineArguments],
    ):
        self.runtime = Runtime(model, tokenizer, store, device=device, **options)
        """What the engine is made of: for tests, and for servers that build on this package. Any release may change it."""
        self.adapter = self.runtime.adapter
        self.tokenizer = self.runtime.tokenizer
        self.model_name = self.runtime.model_name
        self.prompts = self.runtime.prompts
        self.store = self.runtime.store
        self.lead_ins = self.runtime.lead_ins
        self.profiles = self.runtime.profiles
        self.observers = self.runtime.observers

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
        **options: Unpack[EngineArguments],
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
        names = (*ENGINE_NAMES, *LOADING_NAMES, *inspect.signature(cls).parameters)  # a subclass may have more
        check_names(options, names, "CacheTune.from_pretrained")
        check_not_open(store, options)
        loaded, tokenizer = load_model(model, gguf_file=gguf_file, device=device, dtype=dtype, revision=revision)
        return cls(loaded, tokenizer, store, **options)

    @property
    def namespace(self) -> Namespace:
        """What chunks' keys are made with; it changes when lead-ins are chosen, by this process or another."""
        self.runtime.lifetime.check_process()
        return self.runtime.namespace

    def close(self) -> None:
        """Store the chunks that requests missed, then release threads and the store (if the engine opened it). Further requests are
        refused.

        Ctrl-C meanwhile stops the storing after the current forward, drops the chunks that still wait, and releases everything else.
        A process that ends without closing its engines drops the chunks that wait.

        Where the store's disk doesn't answer, this returns after `read_timeout`, and the store is closed once the disk answers. In a
        process that was forked after the engine was made, nothing is released: it all belongs to the parent.
        """
        self.runtime.close()

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

    # -- indexing -------------------------------------------------------------------------------------------------

    def precompute(
        self,
        documents: Iterable[Document | str] | Document | str,
        *,
        replace: bool = True,
        progress: Callable[[Progress], None] | None = None,
    ) -> PrecomputeSummary:
        """Compute and store the KV of documents' chunks. Chunks that are stored already are skipped, so an interrupted run resumes.

        Args:
            documents: documents, or strings (each a document of one chunk), as any iterable: a generator is consumed
                one document at a time.
            replace: False: a document whose id is known keeps the chunks that it holds, and gets these as well (two runs that
                bring a part of it each). True: what it held before and doesn't hold any more is freed.
            progress: called after every stored batch. It may do anything but precompute.

        Raises:
            ConfigError: an argument or a document can't be used. Those before it are stored.
        """
        self.runtime.lifetime.check()
        if isinstance(documents, Document | str):
            documents = [documents]
        self.runtime.backfill.wait()  # keep the order of arrival: lead-ins are chosen from the first texts that are stored
        try:
            return self.runtime.precomputer.precompute(documents, progress, replace_documents=replace)
        except StoreClosedError:
            self.runtime.lifetime.check()  # a callback or another thread closed the engine meanwhile
            raise
        finally:
            self.runtime.recognizer.changed()  # a document that was replaced may have freed chunks

    def remove(self, document_id: str, *, missing_ok: bool = False) -> int:
        """Forget a document and free the chunks that no other document holds. Returns the bytes freed.

        Raises:
            UnknownDocumentError: there is no such document, unless `missing_ok`.
        """
        self.runtime.lifetime.check()
        check_id(document_id)
        check_flag(missing_ok, "missing_ok")
        self.runtime.backfill.forget(document_id)
        try:
            return self.store.delete_document(document_id, tenant=self.namespace.tenant)
        except UnknownDocumentError:
            if missing_ok:
                return 0
            raise
        finally:
            self.runtime.recognizer.changed()

    def documents(self) -> list[DocumentInfo]:
        """The documents of this engine's tenant, by id: each one's chunks, and how many of them and bytes the store holds now."""
        self.runtime.lifetime.check()
        return self.store.documents(tenant=self.namespace.tenant)

    # -- prompts --------------------------------------------------------------------------------------------------

    def prompt_from_text(
        self, text: str | Sequence[Segment | str], *, recognise: bool = True, retrieved: Sequence[str | Chunk] = ()
    ) -> Prompt:
        """A plain completion prompt: BOS, if the tokenizer adds one, and the text.

        Args:
            text: a string, or texts and chunks. Control tokens in it stay text.
            recognise: find chunks of the store inside the text and reuse them; each is verified in full.
            retrieved: the texts that your retriever returned, as it returned them. They change nothing in the prompt; they say
                what there was to find, so that the report and `stats()` tell which share of it was found, and the log why
                little was. A `Chunk` that names its document is found in the text even where it isn't stored: it is
                computed in this request and stored behind it, under that document.
        """
        self.runtime.lifetime.check_process()
        return self.runtime.plain_prompts.from_text(text, recognise=recognise, retrieved=retrieved)

    def prompt_from_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        recognise: bool = True,
        retrieved: Sequence[str | Chunk] = (),
        tools: Sequence[Any] | None = None,
        **template_arguments: Any,
    ) -> Prompt:
        """A conversation through the tokenizer's chat template, up to where the assistant speaks.

        Args:
            messages: each {"role": ..., "content": ...}; content is a string, or a list of `Text`, `Chunk`, strings
                and parts {"type": "text", "text": ...}. What else
                the chat template knows goes along: tool_calls, tool_call_id, name, reasoning_content.
            recognise, retrieved: as for `prompt_from_text`. A stored chunk that the template alters is no chunk there.
            tools: JSON schemas or functions that the model may call, as for transformers' `apply_chat_template`.
            template_arguments: variables of the chat template, e.g. enable_thinking=False. One that it doesn't use is refused.
                Also chat_template (another template's name, or its text), add_generation_prompt, continue_final_message.

        Raises:
            PromptError: the template refuses the conversation, drops a message, alters a chunk that was given as one, or has no
                such variable.
        """
        self.runtime.lifetime.check_process()
        return self.runtime.plain_prompts.from_messages(
            messages, recognise=recognise, retrieved=retrieved, tools=tools, **template_arguments
        )

    # -- answering ------------------------------------------------------------------------------------------------

    def generate(
        self,
        query: str | None = None,
        chunks: Iterable[str | Chunk] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        ratio: float | str = "auto",
        selector: str = "auto",
        max_kl: float | None = None,
        min_top1: float | None = None,
        min_sure: float | None = None,
        reuse: bool = True,
        max_new_tokens: int | str | None = "auto",
        stop: str | Sequence[str] | None = None,
        generation_config: Any = None,
        **sampling: Any,
    ) -> Answer:
        """Answer a query over retrieved chunks; arguments as for `stream`. Returns the whole answer."""
        with self.stream(
            query,
            chunks,
            prefix,
            prompt=prompt,
            ratio=ratio,
            selector=selector,
            max_kl=max_kl,
            min_top1=min_top1,
            min_sure=min_sure,
            reuse=reuse,
            max_new_tokens=max_new_tokens,
            stop=stop,
            generation_config=generation_config,
            **sampling,
        ) as pieces:
            for _ in pieces:
                pass
            return pieces.answer

    def stream(
        self,
        query: str | None = None,
        chunks: Iterable[str | Chunk] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        ratio: float | str = "auto",
        selector: str = "auto",
        max_kl: float | None = None,
        min_top1: float | None = None,
        min_sure: float | None = None,
        reuse: bool = True,
        max_new_tokens: int | str | None = "auto",
        stop: str | Sequence[str] | None = None,
        generation_config: Any = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Answer piece by piece: iterate over the returned stream for text; its `answer` and `report` fill on the way.

        Args:
            query: the user's question.
            chunks: the retrieved chunks, in prompt order: texts, or `Chunk`s, which can name the document that they belong to.
                Those not in the store are computed in this request, exactly, and stored behind the answer, when the model has
                time for it (see `flush`).
            prefix: text before the chunks; default: a short instruction, "" for none.
            prompt: a prompt from `engine.prompts`, instead of query, chunks and prefix.
            ratio: share of the chunk tokens to recompute, in [0, 1], or "auto": the calibrated one, if there is one.
            selector: which tokens those are: a registered name or "auto".
            max_kl, min_top1: a bound for the answer's first token: at most so many nats from full prefill, and at least this probability that
                full prefill, too, finds it the likeliest. The least ratio that is predicted to keep it is taken, and full prefill where none is.
                It needs `calibrate`, and `ratio="auto"`; docs/calibration.md says how often predictions hold.
            min_sure: the least probability that the model has to give to its likeliest token, at every token of the answer. At the first one below,
                the prompt is read again without reuse, and that token and those behind it are chosen behind full prefill; `report.read_again`
                tells. It costs a full prefill then, and no token is given twice. docs/calibration.md says what it brings.
            reuse: False computes everything (the reference).
            max_new_tokens: most tokens of the answer; fewer where the model's context ends. "auto": as `generation_config` says,
                or the model's own, or 256 where neither does. None: the same, but to the context's end where neither does.
            stop: strings that end the answer; they are not part of it.
            generation_config: a transformers GenerationConfig; default: the model's own.
            sampling: overrides of it, e.g. do_sample, temperature, top_p, repetition_penalty; and seed. A name that the chat
                template uses as a variable goes to the template: enable_thinking=False, tools=[...].

        Raises:
            ConfigError, PromptError, PromptTooLongError: the request can't be served; nothing was computed.
        """
        self.runtime.lifetime.check()
        request = self.runtime.admission.for_answer(
            query,
            chunks,
            prefix,
            prompt,
            sampling,
            started=time.perf_counter(),
            ratio=ratio,
            selector=selector,
            max_kl=max_kl,
            min_top1=min_top1,
            min_sure=min_sure,
            reuse=reuse,
            max_new_tokens=max_new_tokens,
            stop=stop,
            generation_config=generation_config,
        )
        return AnswerStream(self.runtime.executor, request)

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
        self.runtime.lifetime.check()
        return answer_many(self.stream, self.runtime.admission, self.runtime.executor, requests, options)

    def prefetch(self, chunks: Iterable[str | Chunk] = (), *, prompt: Prompt | None = None) -> Prefetch:
        """Have a coming request's chunks read from disk into host memory, on threads of their own; returns at once.

        It fills at most the store's `host_budget`. Chunks that aren't stored are left to the request, and so is any error of
        reading. A request that begins meanwhile takes its chunks over, with what was read of them so far.

        Args:
            chunks: the chunks, texts or `Chunk`s, the most wanted first.
            prompt: a prompt from `engine.prompts`, instead of chunks.
        """
        self.runtime.lifetime.check()
        return self.runtime.executor.prefetch(self.runtime.admission.chunk_ids(chunks, prompt))

    def prefill(
        self,
        query: str | None = None,
        chunks: Iterable[str | Chunk] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        ratio: float | str = "auto",
        selector: str = "auto",
        max_kl: float | None = None,
        min_top1: float | None = None,
        **template_arguments: Any,
    ) -> PrefillState:
        """Read a prompt with reuse and stop there: logits [1, vocab], cache, report. Missing chunks are stored before it returns.

        `template_arguments` are variables of the chat template, e.g. enable_thinking=False.
        """
        self.runtime.lifetime.check()
        started = time.perf_counter()
        admission = self.runtime.admission
        config = admission.config(selector, ratio, max_kl, min_top1)
        request = admission.for_prefill(
            query, chunks, prefix, prompt, template_arguments, config=config, started=started
        )
        state = self.runtime.executor.read(request)
        # The logits don't depend on whether chunks can be stored, so no error of the store ends the request.
        unstored = self.runtime.backfill.store(state.prompt, state.missed)
        return replace(state, report=replace(state.report, unstored=unstored))

    def full_prefill(
        self,
        query: str | None = None,
        chunks: Iterable[str | Chunk] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        **template_arguments: Any,
    ) -> PrefillState:
        """Read the same tokens without reuse: what `prefill` is measured against."""
        self.runtime.lifetime.check()
        started = time.perf_counter()
        request = self.runtime.admission.for_prefill(
            query, chunks, prefix, prompt, template_arguments, config=None, started=started
        )
        return self.runtime.executor.read(request)

    def warmup(
        self, computed_tokens: int = 2048, prompt_lengths: Sequence[int] = (8192, 32768), *, selector: str = "auto"
    ) -> None:
        """Make ready for requests, so that none of them pays for compiling: on a GPU, compile kernels and the model's layers and
        capture a CUDA graph for every size of request up to `computed_tokens`. Takes about a minute. Elsewhere there is
        nothing to do.

        A full pass of Python's garbage collector over all that torch and transformers consist of can take longer than a request.
        A server that wants none of them calls `gc.collect(); gc.freeze()` behind this; a library should not.

        Args:
            computed_tokens: most tokens that a request computes: ratio times its chunks' tokens, prefix and query. Larger
                requests work as well; they run without a graph, which they gain little from.
            prompt_lengths: lengths of prompts that a selector that looks at the attention is made ready for.
            selector: which selector requests will use.

        Raises:
            ConfigError: there is no such selector, or a number of tokens is none.
        """
        self.runtime.lifetime.check()
        most = (1 << 31) - 1
        check_count(computed_tokens, "computed_tokens", "a number of tokens, an int of at least 1", most=most)
        sequence = isinstance(prompt_lengths, Sequence) and not isinstance(prompt_lengths, str | bytes)
        if not sequence or not all(is_count(length, 1, most) for length in prompt_lengths):
            raise ConfigError(
                f"prompt_lengths is {shown(prompt_lengths)}: use a list of numbers of tokens, ints of at least 1; [] for none."
            )
        self.runtime.warmup(computed_tokens, prompt_lengths, selector)

    def explain(
        self,
        query: str | None = None,
        chunks: Iterable[str | Chunk] = (),
        prefix: str | None = None,
        *,
        prompt: Prompt | None = None,
        ratio: float | str = "auto",
        selector: str = "auto",
        max_kl: float | None = None,
        min_top1: float | None = None,
        compare: bool = False,
        max_new_tokens: int = 64,
        **template_arguments: Any,
    ) -> Explanation:
        """Read a prompt as a request would, and tell what became of each token and chunk, and why.

        It is no request: counters of requests and listeners are not told, and chunks that it misses are not stored. The likeliest token
        is always taken for its answers, so that only reuse makes them differ.

        Args:
            query, chunks, prefix, prompt, ratio, selector, max_kl, min_top1: as for `stream`.
            compare: compute the whole prompt as well, and say how far reuse is from that.
            max_new_tokens: most tokens of an answer.
            template_arguments: variables of the chat template, e.g. enable_thinking=False.

        Returns:
            Plain values with a JSON form; `cachetune_rag.explaining.html_page` makes a page of them. docs/explain.md says how to read it.

        Raises:
            ConfigError, PromptError, PromptTooLongError: the prompt can't be read; nothing was computed.
        """
        self.runtime.lifetime.check()
        check_flag(compare, "compare")
        check_count(max_new_tokens, "max_new_tokens", "a number of tokens, an int of at least 1")
        runtime = self.runtime
        config = runtime.admission.config(selector, ratio, max_kl, min_top1)
        built = runtime.admission.prompt(query, chunks, prefix, prompt, template_arguments)
        explainer = Explainer(runtime.bench(), runtime.recognizer, runtime.calibrations, self.model_name)
        return explainer.explain(built, config, question=query or "", compare=compare, tokens=max_new_tokens)

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
            StoreReadOnlyError: the store can't be written, so nothing could be saved; nothing was computed.
            CacheTuneError: the samples' chunks don't stay in the store.
        """
        self.runtime.lifetime.check()
        plan = CalibrationPlan.of(
            bound=bound, measure=measure, selector=selector, ratios=ratios, tokens=tokens, quantile=quantile
        )
        check_savable(self.store, "calibrated")
        return self.runtime.calibrations.save(Calibrator(self.runtime.bench(), plan, progress).calibrate(samples))

    def calibrated_ratio(self, selector: str = "auto") -> float | None:
        """The ratio that `calibrate` saved for a selector, the least that keeps its bound; None if there is none."""
        self.runtime.lifetime.check_process()
        return self.runtime.calibrations.ratio(selector)

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
            tier: "device", "host", "disk", "remote", or "auto": each that chunks can come from.
            selector: whose ratio is sought: a registered name or "auto".
            r_min: the least ratio; None: the calibrated one, or 0.15 where nothing was calibrated.
            r_max: the largest ratio.
            rounds: times that every setting is measured; the median counts.
            tokens: chunk tokens of a made prompt. Times depend on it: take your prompts' size.
            progress: called after every measured setting.

        Raises:
            ConfigError, PromptError: an argument or a sample can't be used, or there is nothing stored to measure with.
            StoreReadOnlyError: the store can't be written, so nothing could be saved; nothing was measured.
            CacheTuneError: chunks left the store while it was tuned.
        """
        self.runtime.lifetime.check()
        plan = TuningPlan.of(tier=tier, selector=selector, r_min=r_min, r_max=r_max, rounds=rounds, tokens=tokens)
        check_savable(self.store, "tuned")
        runtime = self.runtime
        return Tuner(runtime.bench(), plan, runtime.calibrations.ratio, runtime.tunings, progress).tune(samples)

    # -- state ----------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Store now the chunks that requests missed, and wait until that is done; False if it takes longer than `timeout` seconds.

        Without this call they are stored once no request has wanted the model for a moment, or after two seconds in turns with
        requests. Until then, requests that need them compute them. `close()` waits for them as well.
        """
        self.runtime.lifetime.check()
        check_wait(timeout)
        return self.runtime.backfill.wait(timeout)

    def model_changed(self) -> bool:
        """Go on with the model as it is now: for callers who change its weights (merge or switch an adapter, train on).

        An engine notices most changes by itself, and refuses requests with `ModelChangedError` until this was called;
        docs/reliability.md ("The model belongs to you") lists the changes that it can't notice. Call it after all changes and before the
        next request. It reads all weights once. From then on, chunks that were stored with other weights are misses; they stay in the
        store for engines with those weights. Call it on every engine on the same model.

        Returns:
            Whether the weights differ from those before. If they don't, nothing that is stored is lost.

        Raises:
            ModelChangedError: dtype, device or shape have changed as well (make a new engine), or weights are changing just now.
            UnsupportedModelError: the model can't be served as it is now.
        """
        self.runtime.lifetime.check()
        return self.runtime.model_changed()

    def stats(self) -> EngineStats:
        """Totals over this engine's requests, and the store's state; the last known state, `store_age` seconds old, if its disk doesn't
        answer.

        Raises:
            StoreError: the store can't be read.
        """
        self.runtime.lifetime.check_process()
        return self.runtime.stats()

    def ttft_histograms(self) -> dict[str, Histogram]:
        """Times to first token of requests with reuse, by the slowest tier that each request read from."""
        self.runtime.lifetime.check_process()
        return self.runtime.counter.ttft_histograms()
