"""What a run measures on: one model, one engine, and for each tier a store over the same folder."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from cachetune_rag import CacheTune, Document
from cachetune_rag.report import Report
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_store import ChunkStore, make_key

from .machine import Attention, fastest_attention, synchronize
from .shapes import build, letters, tokenizer

QUERY = "q" * 64
_TEMPLATE = "<s>{prefix}{chunks}{query}"  # as prompts of real tokenizers begin
_NO_LIMIT = 1 << 62
DEVICE_BUDGET = 24 << 30
"""Bytes of the device tier: a prompt of 32,768 tokens of an 8B model in `exact`, `int8` and `int4` takes 7 GiB."""


class WrongTierError(RuntimeError):
    """A request read from another tier than the one that was to be timed."""


class Subject:
    """Model, engine and stores of a run. A context manager.

    Args:
        shape, device: the model's shape, and where it is.
        folder: the store's folder. None keeps chunks in host memory only; there are no disk and device tiers then.
        contexts: chunk tokens of the prompts. A short prompt has the first chunks of a long one.
        chunk_tokens: tokens of a chunk.
        lead_in: as for CacheTune.
        cuda_kernels: as for CacheTune.
        stored: the share of a prompt's chunks that are reused. The others, spread evenly, are new text in it.

    Attributes:
        timings: seconds of each part of the preparation.
    """

    def __init__(
        self,
        shape: str,
        device: str,
        folder: Path | None,
        contexts: list[int],
        chunk_tokens: int,
        lead_in: str = "auto",
        cuda_kernels: bool = True,
        stored: float = 1.0,
    ):
        self._share = stored
        self.device, self.contexts, self.chunk_tokens = device, contexts, chunk_tokens
        self.timings: dict[str, float] = {}
        self._folder = folder
        self._stack = ExitStack()
        self._stores: dict[str, ChunkStore] = {}
        self._codecs: set[str] = set()
        self._on_device: set[str] = set()
        self._tuned: dict[Any, tuple[float, float]] = {}
        with self._timed("model"):
            self.model = build(shape, device)
        with self._timed("engine"):
            store = self._stack.enter_context(
                ChunkStore(folder, host_budget=_NO_LIMIT // 2, disk_budget=_NO_LIMIT, device=device)
            )
            self.engine = self._stack.enter_context(
                CacheTune(
                    self.model,
                    tokenizer(),
                    store,
                    prompt_template=_TEMPLATE,
                    chunk_separator="\n",
                    lead_in=lead_in,
                    cuda_kernels=cuda_kernels,
                )
            )
        self._benches = {"host": self.engine.runtime.bench().on(store)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- preparing --------------------------------------------------------------------------------------------------

    def warmup(self) -> None:
        """Compile the layers and the kernels. Graphs for the sizes in use are captured in the rounds that don't count.

        Call this after `store`, because the default selector's work depends on the lead-ins that are chosen there.
        """
        with self._timed("warmup"):
            self.engine.warmup(64, ())

    def store(self, codec: str, tier: str) -> None:
        """Store all chunks of a codec, and bring them to the device if that is the tier.

        Each codec has its own texts, because keys are the same for all codecs. So one store has the chunks of all.
        """
        if codec not in self._codecs:
            with self._timed(f"precompute {codec}"):
                self.engine.store.codec = codec
                self.engine.precompute(Document(codec, self._texts(codec)))
            self._codecs.add(codec)
        self._open(tier)
        if tier == "device" and codec not in self._on_device:
            with self._timed(f"to device {codec}"):
                self._bring_up(codec)
            self._on_device.add(codec)

    def stored(self, codec: str) -> bool:
        """Whether the chunks of a codec are stored."""
        return codec in self._codecs

    def tuned(self, context: int, codec: str, selector: str) -> tuple[float, float]:
        """The tuned ratio of the disk tier, and the share of it that is skipped."""
        key = context, codec, selector
        if key not in self._tuned:
            sample = {"query": QUERY, "chunks": self.chunks(context, codec), "prefix": ""}
            with self._timed("tune " + " ".join(map(str, key))):
                found = self.engine.tune([sample], tier="disk", selector=selector, rounds=1).tiers[0]
            self._tuned[key] = found.ratio, found.skipped
        return self._tuned[key]

    # -- requests ---------------------------------------------------------------------------------------------------

    def chunks(self, context: int, codec: str) -> list[str]:
        """The chunks of a prompt, in order."""
        return self._texts(codec)[: context // self.chunk_tokens]

    def ids(self, context: int, codec: str = "exact", step: int = 1) -> list[int]:
        """The ids of the whole prompt. With a step of -1, its chunks are in reverse order."""
        chunks = self.chunks(context, codec)[::step]
        return list(self.engine.prompts.build(query=QUERY, chunks=chunks, prefix="").ids)

    def reuse(self, tier: str, context: int, codec: str, config: ReuseConfig) -> Report:
        """One request as `CacheTune.prefill` serves it. Every chunk is on one tier, and none is moved to another tier afterwards.

        Raises:
            WrongTierError: a chunk came from another tier, or was not stored.
        """
        chunks = self.chunks(context, codec)
        started = time.perf_counter()
        prompt = self.engine.prompts.build(query=QUERY, chunks=chunks, prefix="")
        ends = [int(number * self._share + 0.5) for number in range(len(chunks) + 1)]
        stored = tuple(span for span in prompt.spans if ends[span.chunk] < ends[span.chunk + 1])
        prompt = replace(prompt, spans=stored)
        report = self._benches[tier].assembler.prefill(prompt, config, started).report
        if report.missed or report.damaged or set(report.bytes_read) - {tier}:
            raise WrongTierError(f"wanted {tier}, and got {report}")
        return report

    def engine_full(self, context: int, codec: str) -> float:
        """Seconds of the engine's own full prefill."""
        return self.engine.full_prefill(query=QUERY, chunks=self.chunks(context, codec), prefix="").report.ttft

    @torch.no_grad()
    def full(self, ids: torch.Tensor, attention: Attention | None = None) -> float:
        """Seconds of full prefill by transformers alone, from token ids [tokens] in host memory to the last token's logits."""
        started = time.perf_counter()
        with (attention or self.attention[1])():
            self.model(input_ids=ids[None].to(self.device), use_cache=True, logits_to_keep=1)
        synchronize(self.device)
        return time.perf_counter() - started

    @cached_property
    def attention(self) -> tuple[str, Attention]:
        """The attention backend with which full prefill is fastest here."""
        ids = torch.tensor(self.ids(min(max(self.contexts), 8192)))
        with self._timed("attention"):
            return fastest_attention(lambda: self.full(ids, nullcontext), self.device)

    # -- memory -----------------------------------------------------------------------------------------------------

    @cached_property
    def model_bytes(self) -> int:
        """Bytes of the weights and buffers."""
        every = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in every)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        layers = self.engine.adapter.layers
        return sum(spec.heads * (spec.head_dim + spec.v_head_dim) for spec in layers) * self.model.dtype.itemsize

    @property
    def device_tier_bytes(self) -> int:
        """Bytes that the device tier holds."""
        held = None if "device" not in self._stores else self._stores["device"].stats().device
        return 0 if held is None else held.bytes

    # -- inside -----------------------------------------------------------------------------------------------------

    def _texts(self, codec: str) -> list[str]:
        return letters(codec, max(self.contexts) // self.chunk_tokens, self.chunk_tokens)

    def _open(self, tier: str) -> None:
        """Open the store of a tier if it isn't open: the disk without host memory, and for the device tier with the device's memory."""
        if tier in self._benches:
            return
        if self._folder is None:
            raise ValueError(f"the tier {tier!r} needs a folder")
        store = ChunkStore(
            self._folder, host_budget=0, disk_budget=_NO_LIMIT, read_memory=_NO_LIMIT,
            device=self.device, device_budget=DEVICE_BUDGET if tier == "device" else 0,
        )  # fmt: skip
        self._stores[tier] = self._stack.enter_context(store)
        self._benches[tier] = self._benches["host"].on(store)

    def _bring_up(self, codec: str) -> None:
        for text in self._texts(codec):
            reader = self._stores["device"].open(make_key(self.engine.namespace, self.engine.prompts.encode(text)))
            if reader is None:
                raise WrongTierError(f"a chunk of {codec} is not stored")
            with reader:
                reader.promote()
        synchronize(self.device)

    def _timed(self, what: str) -> Any:
        return _Timed(self.timings, what)


class _Timed:
    def __init__(self, timings: dict[str, float], what: str):
        self._timings, self._what = timings, what

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self._started
        self._timings[self._what] = round(self._timings.get(self._what, 0.0) + took, 2)
        print(f"{self._what}: {took:.1f} s", flush=True)
