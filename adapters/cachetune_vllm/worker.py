"""The worker's side of the connector: prompts are put together on a thread and stream of their own, while vLLM goes on decoding."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cachetune_rag.answering.request import Finished, Request
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.runtime import Runtime
from cachetune_store import StoreError
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import FromWorker, Load, ToWorkers
from cachetune_vllm.pages import PagedMemory, Pages

IDLE_WAIT = 0.05
"""Seconds that a step with nothing to compute waits for a prompt to be ready. Without it, vLLM would plan empty steps as fast as it
can, and the thread that puts the prompt together would hardly get the interpreter's lock."""

_log = logger(__name__)


class GivenUpError(Exception):
    """A request ended before its prompt was put together."""


@dataclass(frozen=True)
class _Job:
    """A load, and the event that must have happened before its pages are written.

    Attributes:
        load: what to put together.
        free: the point on vLLM's stream behind which nothing uses the pages for the request that had them before; None on a CPU.
    """

    load: Load
    free: torch.cuda.Event | None


class ReuseWorker:
    """Puts prompts together in vLLM's pages, one after another.

    Args:
        engine: gives the engine of a tenant.
        pages: vLLM's pages.
        device: where the model is.
    """

    def __init__(self, engine: Callable[[str], Runtime], pages: Pages, device: torch.device):
        self._engine, self._pages, self._device = engine, pages, device
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting: set[str] = set()  # requests handed over to the thread, and not yet reported to vLLM as done
        self._done: set[str] = set()
        self._failed: set[int] = set()
        self._given_up: set[str] = set()
        self._reports: dict[str, dict[str, Any]] = {}
        self._thread: threading.Thread | None = None

    # -- called by vLLM's loop -----------------------------------------------------------------------------------

    def start(self, told: ToWorkers) -> None:
        """Begin to put prompts together; nothing is waited for."""
        self._given_up |= told.given_up & self._waiting
        for load in told.loads:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="cachetune-vllm", daemon=True)
                self._thread.start()
            free = None
            if self._device.type == "cuda":
                free = torch.cuda.Event()
                free.record()
            self._waiting.add(load.request_id)
            self._jobs.put(_Job(load, free))

    def finished(self, idle: bool) -> set[str]:
        """Requests whose prompts are ready, or failed. Waits a moment for one if vLLM has nothing else to do."""
        with self._changed:
            if idle and self._waiting:
                self._changed.wait_for(lambda: self._done, timeout=IDLE_WAIT)
            done, self._done = self._done, set()
            self._waiting -= done
            self._given_up -= done
        return done

    def failed_blocks(self) -> set[int]:
        """Pages that were not filled: vLLM computes their tokens."""
        with self._changed:
            failed, self._failed = self._failed, set()
        return failed

    def report(self) -> FromWorker | None:
        """The reports of prompts that were put together, or failed, since the last call."""
        with self._changed:
            reports, self._reports = self._reports, {}
        return FromWorker(reports) if reports else None

    def close(self) -> None:
        """End the thread and wait for its end. Prompts that still wait are given up."""
        self._given_up |= self._waiting
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)
        while (job := self._jobs.get()) is not None:
            load, report = job.load, None
            try:
                report = self._put_together(job, stream)
            except GivenUpError:
                pass
            except (CacheTuneError, StoreError) as error:
                _log.warning("request %s: %s vLLM computes its prompt.", load.request_id, error)
            except Exception:  # whatever it is, the request is answered: vLLM computes the prompt
                _log.exception("request %s: its chunks could not be reused; vLLM computes its prompt", load.request_id)
            with self._changed:
                if report is None:
                    self._failed.update(blocks_of(load, self._pages.block_size))
                    report = {"reused": 0, "left": "failed"}
                self._reports[load.request_id] = report
                self._done.add(load.request_id)
                self._changed.notify_all()

    def _put_together(self, job: _Job, stream: torch.cuda.Stream | None) -> dict[str, Any] | None:
        """Write a prompt's rows to its pages. Returns its report; None if nothing of it can be reused."""
        load, engine = job.load, self._engine(job.load.tenant)
        self._check_wanted(load.request_id)
        with _on(stream):
            if job.free is not None and stream is not None:
                stream.wait_event(job.free)
            memory = PagedMemory(engine.assembler.memory, self._pages, load.blocks, load.start, load.end)
            request = Request.measured(load.prompt, engine.admission.config(load.selector, load.ratio))
            state = engine.executor.reuse(request, memory, partial(self._check_wanted, load.request_id))
            if state is None:
                _log.warning(
                    "request %s: none of its chunks could be reused; vLLM computes its prompt", load.request_id
                )
                return None
            if stream is not None:
                stream.synchronize()
        return self._told(engine, request, state)

    def _told(self, engine: Runtime, request: Request, state: PrefillState) -> dict[str, Any]:
        """Tell the engine's listeners, which have missed chunks stored, and return the report as a response shows it."""
        engine.executor.prefilled(request, state.report)
        end = engine.executor.finish(Finished(request, state, state.report, None, state.report.ttft))
        said = end.report.as_dict()
        return {name: said[name] for name in _SHOWN}

    def _check_wanted(self, request_id: str) -> None:
        if request_id in self._given_up:
            raise GivenUpError(request_id)


_SHOWN = (
    "prompt_tokens", "reused", "recomputed", "missed", "bytes_read", "ratio", "selector", "ttft", "timings", "prefix_kept", "damaged",
    "unreadable", "timed_out", "storing", "unstored", "skipped",
)  # fmt: skip
"""The fields of a report that a response shows. None of them names a document, a path or another request."""


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def blocks_of(load: Load, size: int) -> Collection[int]:
    """The pages that a load writes to."""
    return load.blocks[load.start // size : -(-load.end // size)]
