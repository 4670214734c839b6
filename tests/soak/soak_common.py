"""What the parts of the soak share: a corpus, the answers that a fresh engine gives, forked workers, and outcomes."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import random
import select
import signal
import string
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.model import ModelAdapter

torch.set_num_threads(1)  # forked workers must not inherit a pool of threads

RATIO = 0.2
SELECTOR = "frequency"
NEW_TOKENS = 3
LEAD_INS = [[1, *range(40, 60)], [1, *range(80, 100)]]
TOLERANCE = 1e-5
"""How far two computations of the same logits may be apart, relative to the largest logit.

They differ in the order of sums alone: other batches, other threads, another release of torch. On its way to the logits, a value passes
sums of some 2,000 terms in all (three layers of attention over up to 500 keys, of projections, norms and blocks of 32 or 64). Rounding errors are as
often up as down, so they grow with the root of that: sqrt(2,000) * 2**-24 = 2.7e-6 for each of the two computations, 3.8e-6 for their
difference, and the largest of some 10,000 differences is 2.5 times the usual one. A token that is wrong, missing or in another place
changes logits by more than 1e-3.
"""


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far logits are apart, relative to the largest; infinity if they are not the same number of logits."""
    if found.shape != wanted.shape:
        return math.inf
    return float((found - wanted).abs().max() / wanted.abs().max())


@dataclass
class Outcome:
    """What one part of the soak found.

    Attributes:
        part: its name.
        figures: counts and measures, for the summary.
        problems: what must not have happened; empty if all is well.
        series: lists of numbers to plot.
        seconds: how long it took.
    """

    part: str
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    series: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def expect(self, fine: object, problem: str) -> None:
        """Note a problem unless `fine`."""
        if not fine:
            self.problems.append(problem)


def _words() -> tuple[str, ...]:
    rng = random.Random(0)
    return tuple("".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 9))) for _ in range(300))


WORDS = _words()
"""Words of all passages. Few, as in a language: a tokenizer remembers each word (10,000 of them, about 3 MiB), and with ever new words
memory would grow for most of a soak."""


def passage(seed: int, length: int) -> str:
    """A text of exactly `length` characters, and as many tokens of the tiny tokenizer."""
    rng = random.Random(seed)
    text = f"{seed} "
    while len(text) < length:
        text += rng.choice(WORDS) + " "
    return text[: length - 1] + "."


@dataclass(frozen=True)
class Prompt:
    """A question over three chunks whose lengths tell, by their sum, which of them were missing."""

    query: str
    chunks: tuple[str, str, str]
    document: Document

    def missing(self, tokens: int) -> frozenset[int] | None:
        """Which chunks are missing if `tokens` chunk tokens are."""
        for count in range(4):
            for subset in itertools.combinations(range(3), count):
                if sum(len(self.chunks[i]) for i in subset) == tokens:
                    return frozenset(subset)
        return None


class Corpus:
    """Prompts over disjoint documents, and what a fresh engine answers to each, whichever chunks it misses."""

    def __init__(self, prompts: int = 6, length: int = 60):
        self.model = llama()
        self.adapter = ModelAdapter(self.model)
        self.tokenizer = tokenizer()
        self.prompts = []
        for i in range(prompts):
            sizes = (length + i, 2 * (length + i), 4 * (length + i))  # no two sets of them have the same sum
            chunks = tuple(passage(10 * i + j, size) for j, size in enumerate(sizes))
            self.prompts.append(Prompt(f"question {i}?", chunks, Document(f"document {i}", chunks)))
        self._expected: dict[tuple[int, frozenset[int]], tuple[torch.Tensor, tuple[int, ...]]] = {}
        for count in range(4):
            for missing in map(frozenset, itertools.combinations(range(3), count)):
                self._compute(missing)

    def engine(self, store: Any = None, **options: Any) -> CacheTune:
        """An engine of the corpus's model, which is checked once and not again for every engine."""
        # Given lead-ins, because chosen ones depend on which texts an engine sees first.
        options = {"lead_in": LEAD_INS, **options}
        with mock.patch("cachetune_rag.model.shared.ModelAdapter", return_value=self.adapter):
            return CacheTune(self.model, self.tokenizer, store, **options)

    def ask(self, engine: CacheTune, number: int) -> str | None:
        """Ask prompt `number`; what is wrong with the answer."""
        prompt = self.prompts[number]
        options = {"ratio": RATIO, "selector": SELECTOR}
        state = engine.prefill(query=prompt.query, chunks=prompt.chunks, **options)
        missing = prompt.missing(state.report.missed)
        if missing is None:
            return f"prompt {number}: {state.report.missed} missed tokens are no set of chunks"
        logits, tokens = self._expected[number, missing]
        error = off(state.logits, logits)
        if not error <= TOLERANCE:
            return f"prompt {number}: logits differ by {error:.3g} of the largest with chunks {sorted(missing)} missing"
        if int(state.logits.argmax()) != tokens[0]:
            return f"prompt {number}: another first token than a fresh engine's"
        return None

    def generate(self, engine: CacheTune, number: int) -> str | None:
        """Let prompt `number` be answered; what is wrong with the answer."""
        prompt = self.prompts[number]
        answer = engine.generate(
            query=prompt.query, chunks=prompt.chunks, ratio=RATIO, selector=SELECTOR, max_new_tokens=NEW_TOKENS
        )
        missing = prompt.missing(answer.report.missed)
        if missing is None:
            return f"prompt {number}: {answer.report.missed} missed tokens are no set of chunks"
        if answer.token_ids != self._expected[number, missing][1]:
            return f"prompt {number}: another answer than a fresh engine's with chunks {sorted(missing)} missing"
        return None

    def _compute(self, missing: frozenset[int]) -> None:
        with self.engine() as engine:
            for number, prompt in enumerate(self.prompts):
                stored = [text for i, text in enumerate(prompt.chunks) if i not in missing]
                options = {"ratio": RATIO, "selector": SELECTOR}
                engine.precompute([Document(f"{number}", stored)])
                state = engine.prefill(query=prompt.query, chunks=prompt.chunks, **options)
                assert prompt.missing(state.report.missed) == missing
                engine.remove(f"{number}")
                for i in missing:  # computed and stored by that request
                    engine.store.discard(engine.runtime.assembler.key(state.prompt.chunk_ids[i]))
                engine.precompute([Document(f"{number}", stored)])
                answer = engine.generate(query=prompt.query, chunks=prompt.chunks, max_new_tokens=NEW_TOKENS, **options)
                assert prompt.missing(answer.report.missed) == missing
                self._expected[number, missing] = state.logits, answer.token_ids


class Worker:
    """A forked process that reports by lines of JSON. Forked from a process that has torch loaded, it starts at once."""

    def __init__(self, work: Callable[[Callable[..., None]], None]):
        gc.collect()
        receive, send = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(receive)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                work(lambda *message: _send(send, message))
                status = 0
            except BaseException:
                _send(send, ("error", traceback.format_exc()))
            finally:
                os._exit(status)
        os.close(send)
        self._receive, self._rest, self._ended = receive, b"", False
        self.messages: list[list[Any]] = []

    def wait_for(self, kind: str, timeout: float) -> bool:
        """Read messages until one of `kind` came (True), the worker ended or the time is up."""
        until = time.monotonic() + timeout
        while not any(message[0] == kind for message in self.messages):
            if self._ended or not self._read(until - time.monotonic()):
                return False
        return True

    def read(self) -> None:
        """Read the messages that are there by now."""
        while not self._ended and self._read(0.0):
            pass

    def kill(self) -> None:
        """SIGKILL it."""
        os.kill(self.pid, signal.SIGKILL)

    def join(self, timeout: float) -> int | None:
        """Read all messages and wait for the end; exit code (negative: signal), or None if the time is up."""
        until = time.monotonic() + timeout
        while not self._ended:
            if not self._read(until - time.monotonic()) and not self._ended:
                return None
        os.close(self._receive)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def of_kind(self, kind: str) -> list[list[Any]]:
        """The rest of all messages of a kind."""
        return [message[1:] for message in self.messages if message[0] == kind]

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._receive], [], [], max(0.0, timeout))
        if not ready:
            return False
        data = os.read(self._receive, 1 << 16)
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.messages += [json.loads(line) for line in lines]
        return bool(data)


def _send(fd: int, message: tuple[Any, ...]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def resident_bytes() -> int:
    """Memory of this process that is its own: resident, without file mappings."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon")


def open_files() -> int:
    """Descriptors that this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def bytes_below(folder: Path) -> int:
    """Sizes of the files below a folder that may change meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except OSError:
            continue
    return total
