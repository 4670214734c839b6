"""The prompts that wait to be put together, in the order in which they came. The next one is begun before its turn."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace

import torch

from cachetune_rag.answering.request import Request
from cachetune_rag.model.heads import Heads
from cachetune_rag.readahead.batch import Prefetch
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.prompt_room import PromptRoom
from cachetune_rag.runtime import Runtime
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import Load, Missed
from cachetune_vllm.pages import PagedMemory, Pages

_log = logger(__name__)


class GivenUpError(Exception):
    """A request ended before its prompt was put together."""


@dataclass(frozen=True)
class Job:
    """A load, and the event that must have happened before its pages are written.

    Attributes:
        load: what to put together.
        free: the point on vLLM's stream behind which nothing uses the pages for the request that had them before, and those that are
            read are filled; None on a CPU.
    """

    load: Load
    free: torch.cuda.Event | None


@dataclass(frozen=True)
class Turn:
    """A load that the thread works on.

    Attributes:
        job: the load.
        engine: its tenant's engine.
        request: the load, as the engine takes it.
        memory: vLLM's pages, as the engine sees them.
        begun: the load's chunks on their way to the device, if it was begun before its turn.
    """

    job: Job
    engine: Runtime
    request: Request
    memory: PagedMemory
    begun: Begun | None = None

    def go_on(self) -> None:
        """Have some more of its chunks brought."""
        if self.begun is not None:
            self.begun.go_on()

    def close(self) -> None:
        """The load is done, or not wanted any more. Its keys and values have no memory from now on."""
        try:
            if self.begun is not None:
                self.begun.close()  # first, because that may still use the memory
        finally:
            self.memory.close()


class Coming:
    """What the thread is to do. `put` is called by any thread, everything else by the one that puts prompts together.

    Args:
        engine: gives the engine of a tenant.
        pages: vLLM's pages.
        heads: which of the model's heads this worker has.
        check_wanted: raises `GivenUpError` for the id of a request that is over.
        room: the memory that prompts are put together in.
    """

    def __init__(
        self,
        engine: Callable[[str], Runtime],
        pages: Pages,
        heads: Heads,
        check_wanted: Callable[[str], None],
        room: PromptRoom,
    ):
        self._engine, self._pages, self._heads = engine, pages, heads
        self._check_wanted, self._room = check_wanted, room
        self._jobs: queue.SimpleQueue[Job | Missed | None] = queue.SimpleQueue()
        self._taken: deque[Job | Missed | None] = deque()  # from the queue, before its turn: one at most
        self._begun: Turn | None = None  # that one
        self._tried: Job | None = None  # whether or not it could be begun
        self._read: Prefetch | None = None  # the chunks of the last one that could not

    def put(self, job: Job | Missed | None) -> None:
        """Add something to do; None ends the thread."""
        self._jobs.put(job)

    def next(self) -> Job | Missed | None:
        """Wait for the next thing to do."""
        return self._taken.popleft() if self._taken else self._jobs.get()

    def turn_of(self, job: Job) -> Turn:
        """What is needed to put a prompt together. It is there already if the prompt was begun. The caller closes it."""
        begun, self._begun = self._begun, None
        if begun is not None:  # it is for this job: nothing else is taken before its turn
            return begun
        load = job.load

        def begin() -> tuple[Runtime, Request]:
            engine = self._engine(load.tenant)
            self._check_wanted(load.request_id)
            config = engine.admission.config(load.selector, load.ratio, load.max_kl, load.min_top1)
            return engine, Request.measured(load.prompt, config)

        engine, request = self._heads.ahead(begin)  # opening its chunks is settled with peers
        return Turn(job, engine, request, PagedMemory(engine.assembler.memory, self._pages, load, self._room, job.free))

    def begin_next(self, at_hand: Turn) -> None:
        """Let the chunks of the next prompt be brought to the device while the one at hand is computed, or from disk into host memory. Called again and again.

        Whatever fails here is found again, and dealt with, when it is that prompt's turn: the one at hand must not fail for it.
        """
        if self._heads.shared or self._heads.in_turns:
            return
        try:
            if self._begun is not None:
                self._begun.go_on()
                return
            job = self._first()
            # An engine that has to be made first takes long.
            if job is None or job is self._tried or job.load.tenant != at_hand.job.load.tenant:
                return
            self._tried = job
            with ExitStack() as stack:
                turn = stack.enter_context(closing(self.turn_of(job)))
                if not turn.memory.has_room(turn.request.prompt.ids_array):
                    return  # before its chunks are opened
                begun = turn.engine.executor.begin(turn.request, turn.memory)
                if begun is not None:
                    self._begun = replace(turn, begun=begun)
                    stack.pop_all()
                elif self._read is None or self._read.wait(0):
                    # What is read by its turn, it need not wait for; reading gives way to a prompt that waits for the disk itself. Where the disk has not given
                    # the chunks of an earlier one yet, these would not come in time either, and ever more would wait.
                    chunks = turn.request.prompt.chunk_ids
                    self._read = turn.engine.executor.prefetch(lambda: chunks, turn.request.config)
        except Exception as error:
            # The error's text: whoever keeps the error keeps the prompt's tensors.
            _log.debug("a request was not begun before its turn: %s", str(error))
            self.close()

    def _first(self) -> Job | None:
        """The load that comes next, if it has come already."""
        if not self._taken:
            with suppress(queue.Empty):
                self._taken.append(self._jobs.get_nowait())
        job = self._taken[0] if self._taken else None
        return job if isinstance(job, Job) else None

    def close(self) -> None:
        """What was begun is not wanted any more."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.close()
