"""Which host work a request waits for, step by step: vLLM's functions, and those of the connector, note when they begin and end.

vLLM loads `HostSteps` into its worker (`worker_extension_cls`). With one GPU, that is the process of the scheduler too, so everything but the
front end is noted there. `time.perf_counter` is one clock for all processes of a machine.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IN_FRONT, BEHIND, LOOP, WAITING, THREAD = range(5)
"""Who does a step: the front end, the thread that takes messages in, the engine's loop, the loop as it waits for the thread that puts prompts
together, and this thread."""


@dataclass(frozen=True)
class Step:
    """Something that is done for a request.

    Attributes:
        name: what it is.
        ours: whether this package does it, and not vLLM.
        place: module and name of the function.
        by: who does it.
    """

    name: str
    ours: bool
    place: tuple[str, str]
    by: int = LOOP


_ENGINE, _SCHEDULER = "vllm.v1.engine.core", "vllm.v1.core.sched.scheduler"
_PAGES = "vllm.v1.core.kv_cache_manager"
_OURS, _WORKER = "cachetune_vllm.scheduler", "cachetune_vllm.worker"
_RECOGNIZER, _EXECUTOR = "cachetune_rag.chunks.id_recognition", "cachetune_rag.answering.executor"
FRONT = (
    Step("prompt checked and taken in", False, ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs"), IN_FRONT),
    Step("first token handed out", False, ("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs"), IN_FRONT),
)  # fmt: skip
CORE = (
    Step("request made, pages hashed", False, (_ENGINE, "EngineCore.preprocess_add_request"), BEHIND),
    Step("request queued", False, (_ENGINE, "EngineCore.add_request")),
    Step("settings read, prompt made", True, (_OURS, "ReuseScheduler.arrived")),
    Step("chunks found in the token ids", True, (_RECOGNIZER, "StoreIdRecognizer.find")),
    Step("step scheduled", False, (_SCHEDULER, "Scheduler.schedule")),
    Step("prefix cache searched", False, (_PAGES, "KVCacheManager.get_computed_blocks")),
    Step("decided to reuse, pages' hashes salted", True, (_OURS, "ReuseScheduler.matched")),
    Step("pages allocated", False, (_PAGES, "KVCacheManager.allocate_slots")),
    Step("pages cached", False, (_PAGES, "KVCacheManager.cache_blocks")),
    Step("load made", True, (_OURS, "ReuseScheduler.allocated")),
    Step("message to workers", True, (_OURS, "ReuseScheduler.to_workers")),
    Step("step run, forward queued", False, ("vllm.v1.executor.uniproc_executor", "UniProcExecutor.execute_model")),
    Step("load handed to the thread", True, (_WORKER, "ReuseWorker.start")),
    Step("thread waited for, while it rests", True, (_WORKER, "ReuseWorker.finished"), WAITING),
    Step("token sampled", False, ("vllm.v1.executor.uniproc_executor", "UniProcExecutor.sample_tokens")),
    Step("step's outcome taken in", False, (_SCHEDULER, "Scheduler.update_from_output")),
    Step("report taken in", True, (_OURS, "ReuseScheduler.reported")),
    Step("thread's turn begun", True, ("cachetune_vllm.coming", "Coming.turn_of"), THREAD),
    Step("weights checked, end waited for", True, (_EXECUTOR, "Executor.reuse"), THREAD),
    Step("chunks opened", True, ("cachetune_rag.reuse.opening", "ChunkOpener.open"), THREAD),
    Step("memory taken, loader made", True, ("cachetune_rag.reuse.plan", "Planner.prepare"), THREAD),
    Step("tokens chosen", True, ("cachetune_rag.reuse.plan", "Planner.choose"), THREAD),
    Step("rows loaded, tokens computed", True, ("cachetune_rag.reuse.prompt_forward", "PromptForward.planned"), THREAD),
    Step("report made", True, (_WORKER, "ReuseWorker._told"), THREAD),
)

TO_ENGINE, BETWEEN, FROM_ENGINE = "message to the engine", "loop between steps", "message from the engine"
"""What is neither of these steps, all of it vLLM's."""


class Span(NamedTuple):
    """A step, from its beginning to its end."""

    name: str
    start: float
    end: float


def owner_of(place: tuple[str, str]) -> tuple[Any, str]:
    """What has the function of a module and a name, and the function's name there."""
    module, name = place
    *path, last = name.split(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:  # of another release of vLLM
        return None, last
    for part in path:
        owner = getattr(owner, part, None)
    return owner, last


class Notes:
    """Notes when functions begin and end.

    Args:
        steps: the functions.
    """

    def __init__(self, steps: Sequence[Step]):
        self._lock, self._spans = threading.Lock(), list[Span]()
        self.absent = [step.name for step in steps if not self._note(step)]

    def take(self) -> list[Span]:
        """What was noted since the last call."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans

    def _note(self, step: Step) -> bool:
        """Have a function noted; False if this vLLM has none of its name."""
        owner, last = owner_of(step.place)
        function: Callable[..., Any] | None = getattr(owner, last, None)
        if function is None:
            return False

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                span = Span(step.name, start, time.perf_counter())
                with self._lock:
                    self._spans.append(span)

        setattr(owner, last, noted)
        return True


_core: Notes | None = None


class HostSteps:
    """Added to vLLM's worker (`worker_extension_cls`)."""

    def note_host_steps(self) -> list[str]:
        """Begin to note; returns the names of the steps that this vLLM doesn't have."""
        global _core
        if _core is None:
            _core = Notes(CORE)
        return _core.absent

    def take_host_steps(self) -> list[Span]:
        """What was noted since the last call."""
        assert _core is not None
        return _core.take()


def waited_for(spans: Sequence[Span], start: float, end: float) -> dict[str, float]:
    """Seconds between two moments, by the step that was waited for.

    Of steps inside each other, the innermost counts. What lies between steps belongs to messages between the processes, or to vLLM's loop.
    """
    by = {step.name: step.by for step in (*FRONT, *CORE)}
    inside = [span for span in spans if span.end > start and span.start < end]
    core = [span for span in inside if by[span.name] in (LOOP, WAITING)]
    first, last = min((s.start for s in core), default=end), max((s.end for s in core), default=end)
    moments = sorted({start, end, first, last, *(m for s in inside for m in s[1:] if start < m < end)})
    found: dict[str, float] = {}
    for begin, until in itertools.pairwise(moments):
        there = [s for s in inside if s.start <= begin and s.end >= until]
        if there:
            name = _innermost(there, by)
        elif begin < first:
            name = TO_ENGINE
        else:
            name = FROM_ENGINE if begin >= last else BETWEEN
        found[name] = found.get(name, 0.0) + until - begin
    return found


def _innermost(spans: Sequence[Span], by: Mapping[str, int]) -> str:
    """The step that is waited for: the loop's, if it does something; what the thread does, if the loop waits for that; or what is done before."""

    def last(*who: int) -> Span | None:
        return max((span for span in spans if by[span.name] in who), key=lambda span: span.start, default=None)

    of_loop = last(LOOP, WAITING)
    if of_loop is None:
        return (last(BEHIND) or last(THREAD) or spans[0]).name
    waits = by[of_loop.name] == WAITING
    return ((last(THREAD) if waits else None) or of_loop).name
