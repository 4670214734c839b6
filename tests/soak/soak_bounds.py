"""Bounds: thousands of requests in one process, and a corpus far larger than memory; memory, files and disk stay flat."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from soak_common import Corpus, Outcome, Worker, bytes_below, open_files, passage, resident_bytes
from tiny import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from cachetune_rag import CacheTune, Document

MIB = 1 << 20
TOKENS = 100
"""Of a chunk of the large corpus: 1.6 MiB of KV."""
PATIENCE = 30.0
"""Seconds in which reads behind an answer must be over."""
Tell = Callable[..., None]


def run(folder: Path, *, requests: int, budget_mib: int, corpus: Corpus | None = None) -> Outcome:
    """So many requests; and a precompute job of ten times the budgets, `budget_mib` of host memory and twice that on disk."""
    started = time.perf_counter()
    outcome = Outcome("bounds")
    corpus = corpus or Corpus()
    _in_a_process(outcome, lambda tell: _many_requests(corpus, folder / "requests", requests, tell))
    _in_a_process(outcome, lambda tell: _large_corpus(folder / "corpus", budget_mib * MIB, tell))
    outcome.seconds = time.perf_counter() - started
    return outcome


def _in_a_process(outcome: Outcome, work: Callable[[Tell], None]) -> None:
    """A process of its own, so that its memory is its own."""
    worker = Worker(work)
    code = worker.join(3600)
    outcome.expect(code == 0, f"ended with {code}: {worker.of_kind('error')}")
    outcome.problems += [text for (text,) in worker.of_kind("wrong")]
    for kind, place in (("figures", outcome.figures), ("series", outcome.series)):
        for (found,) in worker.of_kind(kind):
            place |= found


# -- many requests ------------------------------------------------------------------------------------------------------


def _many_requests(corpus: Corpus, path: Path, requests: int, tell: Tell) -> None:
    rng = random.Random(0)
    options = {"disk_budget": "1MB", "host_budget": "300KB"}
    every = max(10, requests // 200)
    numbers, memory, files = [], [], []
    with corpus.engine(path, **options) as engine:
        for number in range(requests):
            wrong = _one_request(corpus, engine, rng, number)
            if wrong:
                tell("wrong", wrong)
            if number % every == 0:
                gc.collect()
                numbers.append(number)
                memory.append(resident_bytes())
                files.append(open_files())
        stats = engine.stats()
        pinned = _pinned_in_the_end(engine)
    if pinned:
        tell("wrong", f"{pinned} chunks stay pinned")
    late = len(numbers) // 4  # what is made once is made by then
    growth = _slope(numbers[late:], memory[late:]) * requests
    if growth > max(4 * MIB, 0.01 * memory[late]):
        tell("wrong", f"memory grows by {growth / MIB:.1f} MiB in {requests} requests")
    # Threads are made as they are needed, and each has a connection to the index.
    if _slope(numbers[late:], files[late:]) * requests > 4:
        tell("wrong", f"open files grow: {files[late:]}")
    tell(
        "figures",
        {
            "requests": requests,
            "memory at first (MiB)": round(memory[late] / MIB, 1),
            "memory at last (MiB)": round(memory[-1] / MIB, 1),
            "growth by fit (MiB)": round(growth / MIB, 2),
            "open files": [min(files[late:]), max(files[late:])],
            "evictions": stats.store.disk.evictions,
            "pinned at the end": pinned,
        },
    )
    tell("series", {"requests": {"number": numbers, "memory": memory, "files": files}})


def _pinned_in_the_end(engine: CacheTune) -> int:
    """Chunks that are held once the reads behind the last requests' answers are over."""
    until = time.monotonic() + PATIENCE
    while (pinned := engine.store.stats().disk.pinned) and time.monotonic() < until:  # type: ignore[union-attr]
        time.sleep(0.01)
    return pinned


def _one_request(corpus: Corpus, engine: CacheTune, rng: random.Random, number: int) -> str | None:
    """A request of some kind."""
    prompt = corpus.prompts[rng.randrange(len(corpus.prompts))]
    kind = rng.random()
    if kind < 0.5:
        return corpus.ask(engine, corpus.prompts.index(prompt))
    if kind < 0.7:
        return corpus.generate(engine, corpus.prompts.index(prompt))
    if kind < 0.8:  # an answer that is given up
        stream = engine.stream(query=prompt.query, chunks=prompt.chunks, max_new_tokens=4)
        next(iter(stream), None)
        stream.close()
    elif kind < 0.85:  # a prompt that is new
        engine.generate(query=f"{number}?", chunks=[passage(number, 80)], max_new_tokens=1)
    elif kind < 0.9:
        engine.precompute([prompt.document])
    elif kind < 0.95:
        engine.remove(prompt.document.id, missing_ok=True)
    else:
        text = f"{prompt.chunks[0]}\n\n{prompt.query}"
        engine.prefill(prompt=engine.prompt_from_text(text), ratio=rng.random())
    return None


def _slope(x: list[int], y: list[int]) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 2 else 0.0


# -- a corpus larger than memory -----------------------------------------------------------------------------------------


def _large_corpus(path: Path, host: int, tell: Tell) -> None:
    disk = 2 * host
    with CacheTune(
        _wide_model(), tokenizer(), path, host_budget=host, disk_budget=disk, lead_in="first_token"
    ) as engine:
        engine.precompute([Document("warm", [passage(1, TOKENS)])])
        per_token = engine.store.stats().disk.bytes / TOKENS
        largest = engine.store.stats().disk.bytes
        tokens = int(10 * (host + disk) / per_token)
        gc.collect()
        before = resident_bytes()
        watch = _Watch(path)
        watch.start()
        summary = engine.precompute(_documents(tokens))
        watch.end()
        stats = engine.store.stats()
    grown = watch.most - before
    # Beside the host tier: one chunk that computes, one that is written, and what the model works with.
    allowed = host + 4 * largest + 32 * MIB
    if grown > allowed:
        tell("wrong", f"memory grew by {grown / MIB:.0f} MiB; {allowed / MIB:.0f} MiB would be within the budget")
    if watch.fullest > disk + 2 * largest:
        tell("wrong", f"{watch.fullest} bytes on disk in a budget of {disk}")
    if stats.host.bytes > host or stats.disk.bytes > disk:
        tell("wrong", f"over budget: {stats}")
    tell(
        "figures",
        {
            "precomputed (MiB)": round(summary.bytes / MIB, 1),
            "host budget (MiB)": host // MIB,
            "disk budget (MiB)": disk // MIB,
            "memory grew by at most (MiB)": round(grown / MIB, 1),
            "fullest disk (MiB)": round(watch.fullest / MIB, 1),
        },
    )
    tell(
        "series", {"corpus": {"seconds": watch.seconds, "memory": watch.memory, "before": before, "host budget": host}}
    )


def _documents(tokens: int) -> Iterator[Document]:
    number = 0
    while tokens > 0:
        number += 1
        yield Document(f"{number}", [passage(1000 + number, TOKENS)])
        tokens -= TOKENS


def _wide_model() -> LlamaForCausalLM:
    """Little to compute and much to keep: 16 KiB of KV a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


class _Watch(threading.Thread):
    """Samples memory and disk."""

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self._path, self._ending = path, threading.Event()
        self.seconds: list[float] = []
        self.memory: list[int] = []
        self.fullest = 0

    @property
    def most(self) -> int:
        """The most memory that was seen."""
        return max(self.memory)

    def run(self) -> None:
        started = time.perf_counter()
        while not self._ending.wait(0.02):
            self.seconds.append(round(time.perf_counter() - started, 3))
            self.memory.append(resident_bytes())
            self.fullest = max(self.fullest, bytes_below(self._path / "chunks") + bytes_below(self._path / "tmp"))

    def end(self) -> None:
        self._ending.set()
        self.join()
