"""The worker's side of the connector: prompts are put together on a thread of their own, while vLLM goes on decoding.

Where several workers share a model's heads, each has such a thread, and all of them do the same, at the same pace (`pace.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cachetune_rag.answering.request import Finished, Request
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.explaining.served import EXPLAINED, explained
from cachetune_rag.model.heads import Heads
from cachetune_rag.reuse.account import Account
from cachetune_rag.reuse.prompt_room import PromptRoom
from cachetune_rag.reuse.reading import Reading
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_rag.runtime import Runtime
from cachetune_store import StoreError
from cachetune_vllm.coming import Coming, GivenUpError, Job
from cachetune_vllm.failures import left_after
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import FromWorker, Load, Missed, ToWorkers
from cachetune_vllm.pace import Pace
from cachetune_vllm.pages import Pages
from cachetune_vllm.responses import shown, why_nothing
from cachetune_vllm.slow_disk import FromDisk, Plain, SlowDisk
from cachetune_vllm.turns import TurnsEndedError

IDLE_WAIT = 0.05
"""Seconds that a step with nothing to compute waits for a prompt to be ready. Without it, vLLM would plan empty steps as fast as it
can, and the thread that puts the prompt together would hardly get the interpreter's lock."""

CLOSE_WAIT = 5.0
"""Seconds that closing waits for the thread, where workers share a model: it may wait for one that is gone."""

_log = logger(__name__)


@dataclass(frozen=True)
class _Ended:
    """A load that has ended.

    Attributes:
        load: the load.
        report: what its response says; it has "left" if nothing was put together.
    """

    load: Load
    report: dict[str, Any]


class ReuseWorker:
    """Puts prompts together in vLLM's pages, one after another. Missed chunks are stored when neither that nor vLLM has work, or after
    some seconds in turns with it (`Backfill`).

    Args:
        engine: gives the engine of a tenant.
        pages: vLLM's pages.
        device: where the model is.
        heads: which of the model's heads this worker has.
        pace: when the thread may compute.
        lock: the model's, which all engines share.
        room: the memory that prompts are put together in.
    """

    def __init__(
        self,
        engine: Callable[[str], Runtime],
        pages: Pages,
        device: torch.device,
        heads: Heads,
        pace: Pace,
        lock: ModelLock,
        room: PromptRoom,
    ):
        self._engine, self._pages, self._device, self._heads = engine, pages, device, heads
        self._pace, self._lock = pace, lock
        self._busy: ExitStack | None = None  # open while vLLM computes
        self._coming = Coming(engine, pages, heads, self._check_wanted, room)
        self._slow_disk = SlowDisk()
        self._changed = self._pace.changed
        self._stream: torch.cuda.Stream | None = None
        # Loads that read pages: vLLM may be filling these pages in the step that tells of the load.
        self._behind_step: list[Load] = []
        self._waiting: set[str] = set()  # requests handed over to the thread, and not yet reported to vLLM as done
        self._given = self._reported = 0  # loads that were handed over, and those that were reported
        self._ended: list[_Ended] = []  # not yet reported
        self._failed: set[int] = set()
        self._given_up: set[str] = set()
        self._reports: dict[str, dict[str, Any]] = {}
        self._storing: dict[str, dict[str, int]] = {}
        self._step: int | None = None
        self._thread: threading.Thread | None = None

    # -- called by vLLM's loop -----------------------------------------------------------------------------------

    def start(self, told: ToWorkers) -> None:
        """Begin to put prompts together; nothing is waited for."""
        self._set_busy(not told.idle)
        self._step = told.step
        self._given_up |= told.given_up & self._waiting
        for missed in told.missed:
            self._hand_over(missed)
        for load in told.loads:
            self._waiting.add(load.request_id)
            if self._pages.worth_reading(load.exact):
                self._behind_step.append(load)
            else:
                self._hand_over(self._job(load))

    def finished(self, idle: bool) -> set[str]:
        """vLLM's step is over. Returns requests whose prompts are ready, or failed. Waits a moment for one if vLLM has nothing else to
        do."""
        behind, self._behind_step = self._behind_step, []
        for load in behind:
            self._hand_over(self._job(load))
        count = self._agreed(idle) - self._reported
        with self._changed:
            ready, self._ended = self._ended[:count], self._ended[count:]
        self._reported += count
        for end in ready:
            if "left" in end.report:
                self._failed.update(blocks_of(end.load, self._pages.block_size))
            self._reports[end.load.request_id] = end.report
        done = {end.load.request_id for end in ready}
        self._waiting -= done
        self._given_up -= done
        return done

    def _agreed(self, idle: bool) -> int:
        """How many loads have ended that vLLM may be told of. Where vLLM has nothing to compute and prompts take turns, the step lasts until a prompt
        that had its turn in it is done: before each further step, that prompt would wait for vLLM's loop and its messages between processes."""
        while True:
            with self._changed:
                if idle and self._waiting:
                    self._changed.wait_for(lambda: self._ended or self._pace.waits, timeout=IDLE_WAIT)
                ended = self._reported + len(self._ended)
            agreed, had_turn = self._pace.step(self._given, ended, idle)
            if not (idle and had_turn) or agreed > self._reported:
                return agreed

    def failed_blocks(self) -> set[int]:
        """Pages that were not filled: vLLM computes their tokens."""
        failed, self._failed = self._failed, set()
        return failed

    def report(self) -> FromWorker | None:
        """What was done since the last call, and whose step is over; None if there is nothing to say."""
        reports, self._reports = self._reports, {}
        step, self._step = self._step, None
        with self._changed:
            storing, self._storing = self._storing, {}
        return FromWorker(reports, storing, step) if reports or storing or step is not None else None

    def close(self) -> None:
        """End the thread and wait for its end. Prompts that still wait are given up."""
        self._set_busy(False)
        self._given_up |= self._waiting
        self._pace.end()
        self._coming.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_WAIT if self._heads.shared else None)

    def _set_busy(self, busy: bool) -> None:
        """Keep background work away from the model while vLLM computes: on a GPU, it would slow vLLM's steps."""
        if self._busy is not None and not busy:
            self._busy.close()
            self._busy = None
        elif self._busy is None and busy:
            self._busy = ExitStack()
            self._busy.enter_context(self._lock.reserved())

    def _job(self, load: Load) -> Job:
        free = None
        if self._device.type == "cuda":
            free = torch.cuda.Event()
            free.record()
        self._given += 1
        return Job(load, free)

    def _hand_over(self, job: Job | Missed) -> None:
        if self._thread is None:
            if self._device.type == "cuda":
                self._stream = self._pace.stream(self._device)
            self._thread = threading.Thread(target=self._work, name="cachetune-vllm", daemon=True)
            self._thread.start()
        self._coming.put(job)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        stream = self._stream
        if stream is not None:
            torch.cuda.set_device(self._device)
        while (job := self._coming.next()) is not None:
            if isinstance(job, Missed):
                self._store(job)
                continue
            load = job.load
            try:
                report = self._told(load, *self._attempt(job, stream))
            except TurnsEndedError:
                return
            except Exception as error:
                report = left_after(error, load.request_id)
            with self._changed:
                self._ended.append(_Ended(load, report))
                self._changed.notify_all()
        self._coming.close()

    def _store(self, missed: Missed) -> None:
        """Have chunks stored that a request missed."""
        storing = 0
        try:
            if not self._heads.in_turns:  # see `_told`
                storing = self._engine(missed.tenant).backfill.offer(missed.prompt, missed.chunks)
        except (CacheTuneError, StoreError) as error:
            _log.warning("request %s: its missed chunks are not stored: %s", missed.request_id, error)
        with self._changed:
            self._storing[missed.request_id] = {"storing": storing, "unstored": len(missed.chunks) - storing}

    def _attempt(
        self, job: Job, stream: torch.cuda.Stream | None
    ) -> tuple[Runtime, Request, PrefillState | NothingReused, list[Account]]:
        """As `_put_together`. Where it fails, peers hear of it."""
        try:
            return self._put_together(job, stream)
        except TurnsEndedError:
            raise
        except Exception as error:
            self._pace.failed(error)
            raise

    def _put_together(
        self, job: Job, stream: torch.cuda.Stream | None
    ) -> tuple[Runtime, Request, PrefillState | NothingReused, list[Account]]:
        """Write a prompt's rows to its pages, if anything of it is reused. Meanwhile, begin the next one."""
        with _on(stream), closing(self._coming.turn_of(job)) as turn:
            engine, request = turn.engine, turn.request
            if job.free is not None and stream is not None:
                stream.wait_event(job.free)
            wanted = partial(self._check_wanted, job.load.request_id)
            # Where prompts take turns, none is begun before its own turn, so there is nothing to do while this one's end is waited for.
            meanwhile = None if self._heads.in_turns else partial(self._coming.begin_next, turn)
            accounts: list[Account] = []
            account = accounts.append if job.load.explain else None
            plain = plain_of(job.load)
            too_slow = None if plain is None else partial(self._too_slow, plain)
            state: PrefillState | NothingReused | None = None
            try:
                state = engine.executor.reuse(request, turn.memory, wanted, turn.begun, meanwhile, account, too_slow)
            finally:
                # Where it failed, vLLM gives the pages back, and what is queued must not write to them any more. Where the prompt was put together, its end was
                # waited for, and what else is on the stream may be vLLM's next steps.
                if stream is not None and not isinstance(state, PrefillState):
                    stream.synchronize()
        # The rows are in vLLM's pages, and the next prompt gets this memory.
        return engine, request, state if isinstance(state, NothingReused) else state.without_memory(), accounts

    def _told(
        self,
        load: Load,
        engine: Runtime,
        request: Request,
        state: PrefillState | NothingReused,
        accounts: Sequence[Account],
    ) -> dict[str, Any]:
        """Tell the engine's listeners, which have missed chunks stored, and return the report as a response shows it."""
        missed = len(state.missed)
        if self._heads.in_turns:
            state = replace(state, missed=())  # what stores them runs the model when there is time, and not in turns
        if isinstance(state, NothingReused):
            said, report = why_nothing(state, plain_of(load)), state.report
            storing = engine.backfill.offer(request.prompt, state.missed)
            return said | shown(replace(report, storing=storing, unstored=missed - storing))
        engine.executor.prefilled(request, state.report)
        report = engine.executor.finish(Finished(request, state, state.report, None, state.report.ttft)).report
        said = shown(replace(report, unstored=report.unstored + missed - len(state.missed)))
        # Of several, the last one: the prompt started over.
        return said | {EXPLAINED: explained(load.prompt, accounts[-1], engine.tokenizer)} if accounts else said

    def _too_slow(self, plain: Plain, reading: Reading) -> float | None:
        """Seconds after which a prompt's chunks are read behind it: those of vLLM's prefill, which reading would slow. None: it isn't left."""
        return plain.seconds if self._slow_disk.leaves(FromDisk.of(plain, reading)) else None

    def _check_wanted(self, request_id: str) -> None:
        if request_id in self._given_up:
            raise GivenUpError(request_id)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def plain_of(load: Load) -> Plain | None:
    """What vLLM takes for a load's prompt: its last token, too, which is not put together. None: not known, or not to be asked."""
    return None if load.plain is None else Plain(load.plain, load.start, load.end + 1 - load.start)


def blocks_of(load: Load, size: int) -> Collection[int]:
    """The pages that a load writes to."""
    return load.blocks[load.start // size : -(-load.end // size)]
