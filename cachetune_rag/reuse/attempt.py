"""One attempt at a prompt with reuse: open its chunks, plan, load and compute layer by layer, report. Where it fails, `prefill.py` starts over."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.account import Account, account_of
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.lookup import Faults, FoundChunks
from cachetune_rag.reuse.memory import KVMemory
from cachetune_rag.reuse.on_device import Clock, current, wait
from cachetune_rag.reuse.opening import ChunkOpener, Opened
from cachetune_rag.reuse.plan import Chosen, Loaders, Planner
from cachetune_rag.reuse.prompt_forward import PromptForward
from cachetune_rag.reuse.reading import Reading, reading_of, rows_of
from cachetune_rag.reuse.slow_rows import CANT_READ
from cachetune_rag.reuse.state import NothingReused, PrefillState, report_of
from cachetune_rag.text.prompts.finders import NO_FINDERS, Finders
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkReader, ChunkStore


@dataclass(frozen=True)
class Call:
    """What a caller asked the assembler for.

    Attributes:
        prompt, config, started, chunks_open, answer_tokens: see `Assembler.prefill`.
        memory: owns the rows.
        only_reuse: compute nothing where nothing is reused.
        begun: the prompt, if it was begun before its turn.
        meanwhile: called while the device computes.
        account: is given the account of the prompt.
        too_slow: says where that takes so long to read that nothing is reused.
    """

    prompt: Prompt
    config: ReuseConfig
    started: float
    chunks_open: Callable[[], None]
    answer_tokens: int
    memory: KVMemory
    only_reuse: bool = False
    begun: Begun | None = None
    meanwhile: Callable[[], None] | None = None
    account: Callable[[Account], None] | None = None
    too_slow: Callable[[Reading], float | None] | None = None


class Attempts:
    """Reads prompts with reuse, each in one attempt. The caller holds the model's lock.

    Args:
        adapter: the model.
        store: where chunks are.
        opener: opens the chunks of prompts.
        loaders: make what brings their rows.
        check: refuses a model whose weights were changed; called before and after each prompt.
        finders: find what a prompt's tokens spell.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        store: ChunkStore,
        opener: ChunkOpener,
        loaders: Loaders,
        check: Callable[[], None],
        finders: Finders,
    ):
        self._adapter, self._store, self._opener, self._loaders = adapter, store, opener, loaders
        self._check, self._finders = check, finders
        self._planner = Planner(adapter, loaders, finders)
        self._forward = PromptForward(adapter)

    def begin(self, call: Call) -> Begun | None:
        """Begin a prompt before its turn. None where a chunk isn't in memory."""
        prompt, memory = call.prompt, call.memory
        with ExitStack() as stack:
            stack.enter_context(current(self._adapter.device))
            kept = stack.enter_context(ExitStack())
            clock = Clock()
            opened = self._opener.open_in_memory(prompt, call.config, kept)
            if opened is None:
                return None
            seconds = clock.lap()
            plan = None
            with self._loaders.beside():
                prepared = self._planner.prepare(prompt, opened.found, opened.config, memory, kept, call.answer_tokens)
                if prepared is not None and not prepared.looks:
                    plan = self._planner.choose(prompt, prepared, opened.config).plan
            if prepared is not None:
                prepared.loader.bring()  # this may fail, so what was begun is handed over behind it
            return Begun(opened, memory, prepared, plan, seconds, kept.pop_all())

    def read(self, call: Call, faults: Faults) -> PrefillState | NothingReused:
        """Read a prompt.

        Args:
            call: what is asked for, with the namespace of the model's weights as they are now.
            faults: chunks that could not be read in earlier attempts; those that can't be opened in this one are added.

        Raises:
            DamagedSourceError: a chunk is damaged, which showed while its rows were read.
            StoreTimeoutError: the disk didn't answer in time.
            PeerError: another worker of a shared model failed.
        """
        prompt, memory = call.prompt, call.memory
        clock = Clock()
        if call.too_slow is not None and call.begun is None and not faults.any:
            asked, left = self._foreseen(call, call.too_slow, clock)
            if left is not None:
                return left
            if asked:
                call = replace(call, too_slow=None)
        with ExitStack() as stack:
            stack.enter_context(current(self._adapter.device))
            opened = self._opened(call, faults, stack, clock)
            found, config = opened.found, opened.config
            timings = {"lookup": clock.lap() + (0.0 if call.begun is None else call.begun.seconds)}

            def nothing(chosen: Chosen) -> NothingReused:
                self._adapter.heads.together(self._check)
                report = report_of(
                    prompt, config, found, chosen, faults, self._finders, kept=0, skipped=0,
                    ttft=time.perf_counter() - call.started, timings=timings,
                )  # fmt: skip
                return NothingReused(report, found.to_store)

            if call.too_slow is not None and (reading := self._reading(prompt, opened)) is not None:
                after = call.too_slow(reading)
                if after is not None:
                    left = nothing(Chosen(None))
                    on_disk = self._opener.read_on(opened, partial(_rows, config), after)
                    return replace(left, reading=reading, left_on_disk=on_disk)
            claim = _Claim(partial(self._opener.claim_disk, found, stack), call.chunks_open)
            chosen = self._planned(call, opened, stack, claim)
            plan = chosen.plan
            timings["select"] = clock.lap()
            if plan is None and call.only_reuse:
                return nothing(chosen)
            if plan is None:
                claim.free()
                done = self._forward.whole(prompt, memory, any_stored=bool(found.chunks))
            else:
                done = self._forward.planned(prompt, plan, memory, claim.free)

            def end() -> PrefillState:
                # No other prompt is begun before an account is made: making it may fail for a disk, and the next prompt may have this one's memory by then.
                last = None if done.phases is None else done.phases.end
                wait(self._adapter.device, call.meanwhile if call.account is None else None, last)
                ended = time.perf_counter()
                timings.update({"compute": clock.lap()} if done.phases is None else done.phases.timings(ended))
                self._check()
                # Now, while the device has nothing to do: threads that read ahead while it computes would have to wait for it.
                self._store.settle_memory()
                # Before the readers are handed on, which may read more.
                report = report_of(
                    prompt, config, found, chosen, faults, self._finders, kept=done.kept, skipped=done.skipped,
                    ttft=ended - call.started, timings=timings,
                )  # fmt: skip
                if call.account is not None:
                    assert config.namespace is not None  # see `call`
                    call.account(account_of(prompt, config.namespace, found, plan, faults, done.kept))
                self._opener.let_go(opened)
                buffers, exact = (None, len(prompt.ids)) if plan is None else (plan.buffers, plan.exact)
                memory.keep(prompt.ids_array, exact, buffers, done.cache)
                return PrefillState(done.logits, done.cache, report, prompt, found.to_store, buffers)

            return self._adapter.heads.together(end, CANT_READ)

    def _foreseen(
        self, call: Call, too_slow: Callable[[Reading], float | None], clock: Clock
    ) -> tuple[bool, NothingReused | None]:
        """Ask whether the prompt's disk is too slow before its chunks are opened, which takes many milliseconds. Says whether that could be asked, and what is left then."""
        prompt = call.prompt
        foreseen = self._opener.foresee(prompt, call.config, rows_of)
        if foreseen is None or not foreseen.seconds:
            return False, None
        config, layers, in_turns = foreseen.config, self._adapter.num_layers, self._adapter.heads.in_turns
        reading = reading_of(foreseen.seconds, prompt, config, foreseen.spans, layers, in_turns=in_turns)
        after = too_slow(reading)
        if after is None:
            return True, None
        self._check()
        report = report_of(
            prompt, config, FoundChunks(()), Chosen(None), Faults(), NO_FINDERS, kept=0, skipped=0,
            ttft=time.perf_counter() - call.started, timings={"lookup": clock.lap()},
        )  # fmt: skip
        on_disk = self._opener.read_later(foreseen, partial(_rows, config), after)
        return True, NothingReused(replace(report, recomputed=foreseen.tokens), reading=reading, left_on_disk=on_disk)

    def _opened(self, call: Call, faults: Faults, stack: ExitStack, clock: Clock) -> Opened:
        """The prompt's chunks and settings, if the model's weights are those that the chunks belong to."""
        with clock.stopped():  # it is not part of the lookup
            self._adapter.heads.ahead(self._check)
        if call.begun is None:
            return self._opener.open(call.prompt, call.config, faults, stack)
        stack.enter_context(call.begun.hand_over())
        return call.begun.opened

    def _reading(self, prompt: Prompt, opened: Opened) -> Reading | None:
        """What has to be read of the prompt's chunks, and what is computed meanwhile and behind it; None if nothing has to be waited for. The workers of a shared
        model all ask for it, or none does."""
        if not opened.waits:
            return None
        found, config = opened.found, opened.config
        seconds = self._opener.seconds_to_read(found, partial(_rows, config))
        if not seconds:
            return None
        in_turns = self._adapter.heads.in_turns
        spans = [span for span, _ in found.chunks]
        return reading_of(seconds, prompt, config, spans, self._adapter.num_layers, in_turns=in_turns)

    def _planned(self, call: Call, opened: Opened, stack: ExitStack, claim: _Claim) -> Chosen:
        """What is computed of the prompt, once background reads are stopped."""
        prompt, begun = call.prompt, call.begun
        if begun is not None and begun.prepared is not None:
            claim()
            prepared = begun.prepared
            prepared.loader.take_turn()
            if begun.plan is not None:
                return Chosen(begun.plan)
        else:
            made = self._planner.prepare(
                prompt, opened.found, opened.config, call.memory, stack, call.answer_tokens, claim
            )
            if made is None:
                return Chosen(None)
            prepared = made
        return self._planner.choose(prompt, prepared, opened.config)


class _Claim:
    """Stops background reads, and tells the caller that a prompt's chunks are open.

    Attributes:
        free: lets background reads go on; it does nothing before they were stopped.
    """

    def __init__(self, claim_disk: Callable[[], Callable[[], None]], chunks_open: Callable[[], None]):
        self._claim_disk, self._chunks_open = claim_disk, chunks_open
        self.free: Callable[[], None] = _nothing

    def __call__(self) -> None:
        self.free = self._claim_disk()
        self._chunks_open()


def _rows(config: ReuseConfig, reader: ChunkReader) -> int:
    """`rows_of` an open chunk."""
    return rows_of(config, reader.layout)


def _nothing() -> None:
    """Lets nothing go on: nothing was stopped yet."""
