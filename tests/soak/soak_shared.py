"""One loaded model, used by everybody at once: engines of several tenants, and the program's own code beside them.

Every engine has a thread that stores passages and asks prompts, over and over; other threads of the program use the same model
object meanwhile as its owner may: `generate`, forwards with gradients, hooks of their own, `train()`, another attention
implementation, autocast, another default dtype. Every answer, and at the end every stored key and value, is compared with what an
engine of its own, on a model of its own, gave when nobody else was there; the program's own answers with what they were then.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from soak_common import LEAD_INS, TOLERANCE, Outcome, off, passage
from tiny import llama, tokenizer
from torch import Tensor

from cachetune_rag import CacheTune, Document

TENANTS = ("a", "b", "c")
SETTINGS = ({"ratio": 0.2, "selector": "frequency"}, {"ratio": 0.3, "selector": "expected_error"}, {"ratio": 0.0})
NEW_TOKENS = 4
OWN_TOKENS = 24


def loaded() -> Any:
    """The model, as anybody would load it. Its dropout shows who runs it in training mode."""
    model = llama(max_positions=4096)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model


@dataclass
class Tenant:
    """One tenant's passages and what an engine alone makes of them.

    Attributes:
        name: of the tenant.
        passages: its documents' texts; no two tenants' are alike, and all have the same length, so that rows could be mixed up.
        stored: the keys and values of a prompt of each passage, nothing recomputed.
        answers: token ids, by setting and first passage.
    """

    name: str
    passages: list[str]
    stored: list[Tensor] = field(default_factory=list)
    answers: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def prompts(self) -> Iterator[tuple[int, int]]:
        """Setting and first passage of every prompt."""
        for setting in range(len(SETTINGS)):
            for first in range(0, len(self.passages), 2):
                yield setting, first

    def answer(self, engine: CacheTune, setting: int, first: int) -> tuple[int, ...]:
        """An engine's answer over two passages."""
        chunks = [self.passages[first], self.passages[(first + 1) % len(self.passages)]]
        answer = engine.generate(f"{self.name}?", chunks, max_new_tokens=NEW_TOKENS, **SETTINGS[setting])
        return answer.token_ids if not answer.report.missed else ()

    def rows(self, engine: CacheTune, number: int) -> Tensor:
        """The keys and values of a prompt of one passage, as they come from the store."""
        state = engine.prefill("?", [self.passages[number]], ratio=0.0, selector="none")
        if state.report.missed:
            return torch.full((1,), torch.nan)  # close to nothing
        return torch.cat([part.flatten() for layer in state.cache.layers for part in (layer.keys, layer.values)])

    def learn(self) -> None:
        """What is right."""
        with engine_of(loaded(), None, self.name) as engine:
            engine.precompute([Document("all", self.passages)])
            self.stored = [self.rows(engine, i) for i in range(len(self.passages))]
            self.answers = {prompt: self.answer(engine, *prompt) for prompt in self.prompts()}


def engine_of(model: Any, store: Path | None, tenant: str) -> CacheTune:
    """An engine of one tenant."""
    return CacheTune(model, tokenizer(), store, tenant=tenant, lead_in=LEAD_INS, fidelity_sample=0.5)


def own_answer(model: Any) -> tuple[int, ...]:
    """What the program's own code asks the model."""
    ids = torch.tensor([list(range(40, 120))])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=OWN_TOKENS,
        do_sample=False,
        eos_token_id=260,
        pad_token_id=2,
    )
    return tuple(made[0, ids.shape[1] :].tolist())


def own_logits(model: Any) -> Tensor:
    """A forward of the program's own, with gradients."""
    return model(torch.tensor([list(range(60, 90))])).logits.detach()


class Program:
    """The program around the engines: threads that run until it ends, and what went wrong in them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}
        self._stop = threading.Event()
        self._mutex = threading.Lock()
        self._endless: list[threading.Thread] = []
        self._work: list[threading.Thread] = []

    def beside(self, name: str, step: Callable[[], str | None]) -> None:
        """Do `step` over and over until all work is done."""

        def loop() -> None:
            while not self._stop.is_set():
                self._count(name, step)

        self._endless.append(threading.Thread(target=loop, name=name, daemon=True))

    def work(self, name: str, steps: Callable[[], Iterator[str | None]]) -> None:
        """Go through `steps` once."""

        def through() -> None:
            todo = steps()
            while self._count(name, lambda: next(todo, "")) != "":
                pass

        self._work.append(threading.Thread(target=through, name=name, daemon=True))

    def run(self) -> None:
        """All at once, until the work is done."""
        for thread in (*self._endless, *self._work):
            thread.start()
        for thread in self._work:
            thread.join()
        self._stop.set()
        for thread in self._endless:
            thread.join()

    def _count(self, name: str, step: Callable[[], str | None]) -> str | None:
        try:
            problem = step()
        except Exception:
            problem = traceback.format_exc()
        with self._mutex:
            if problem:
                self.problems.append(f"{name}: {problem}")
            if problem != "":
                self.counts[name] = self.counts.get(name, 0) + 1
        return "" if problem and "Traceback" in problem else problem


def run(folder: Path, *, rounds: int, passages: int = 12, tenants: int = 3) -> Outcome:
    """Store and ask for so many rounds: half of them beside code that uses the model, half beside code that changes its settings."""
    started = time.perf_counter()
    outcome = Outcome("shared")
    everybody = [
        Tenant(name, [passage(1000 * n + i, 160) for i in range(passages)]) for n, name in enumerate(TENANTS[:tenants])
    ]
    for tenant in everybody:
        tenant.learn()
    alone = loaded()
    answer, logits = own_answer(alone), own_logits(alone)
    counts: dict[str, int] = {}
    for number in range(rounds):
        model, program = loaded(), Program()
        engines = {t.name: engine_of(model, folder / f"{number}-{t.name}", t.name) for t in everybody}
        for tenant in everybody:
            program.work(f"engine {tenant.name}", partial(_serve, tenant, engines[tenant.name]))
        if number % 2:
            _stir(program, model)
        else:
            _use(program, model, answer, logits)
        with _defaults_kept():
            program.run()
        for tenant in everybody:
            engine = engines[tenant.name]
            engine.flush()
            wrong = [i for i in range(passages) if not _close(tenant.rows(engine, i), tenant.stored[i])]
            outcome.expect(
                not wrong, f"round {number}: tenant {tenant.name}: passages stored wrong or not at all: {wrong}"
            )
            outcome.expect(engine.stats().unstored == 0, f"round {number}: tenant {tenant.name}: chunks not stored")
            engine.close()
        outcome.problems += [f"round {number}: {problem}" for problem in program.problems]
        for name, count in program.counts.items():
            counts[name] = counts.get(name, 0) + count
    outcome.figures |= {
        "rounds": rounds,
        "engines on one model": tenants,
        "keys and values compared": rounds * tenants * passages,
        "answers": sum(count for name, count in counts.items() if name.startswith("engine")),
    } | {name: count for name, count in sorted(counts.items()) if not name.startswith("engine")}
    outcome.seconds = time.perf_counter() - started
    return outcome


def _serve(tenant: Tenant, engine: CacheTune) -> Iterator[str | None]:
    """Half of the passages are indexed, the others are missed by requests and stored behind their answers."""
    half = len(tenant.passages) // 2
    engine.precompute([Document("half", tenant.passages[:half])])
    yield None
    for number in range(half, len(tenant.passages)):
        engine.generate("?", [tenant.passages[number]], max_new_tokens=2)
        yield None
    engine.flush()
    for prompt in tenant.prompts():
        found = tenant.answer(engine, *prompt)
        yield (
            None if found == tenant.answers[prompt] else f"prompt {prompt}: {found} instead of {tenant.answers[prompt]}"
        )


def _use(program: Program, model: Any, answer: tuple[int, ...], logits: Tensor) -> None:
    """The program's own code asks the model too, and looks at its layers; its answers are what they were."""

    def generate() -> str | None:
        return None if (found := own_answer(model)) == answer else f"{found} instead of {answer}"

    def forward() -> str | None:
        return None if _close(found := own_logits(model), logits) else f"logits off by {off(found, logits):.3g}"

    def look() -> str | None:
        """A hook of the program's sees its own thread's forwards, and other threads of the program's; never an engine's."""
        seen: list[tuple[int, ...]] = []
        handles = [
            layer.self_attn.k_proj.register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape)))
            for layer in model.model.layers
        ]
        try:
            with torch.inference_mode():
                found = own_logits(model)
        finally:
            for handle in handles:
                handle.remove()
        # 30 tokens are `own_logits`; 80 and single ones are `own_answer`'s.
        strange = {shape for shape in seen if shape[1] not in (1, 30, 80)}
        if strange:
            return f"a hook saw forwards that the program has not run: {sorted(strange)}"
        return None if _close(found, logits) else "other logits with a hook"

    program.beside("the program's answers", generate)
    program.beside("the program's forwards", forward)
    program.beside("the program's hooks", look)


def _stir(program: Program, model: Any) -> None:
    """The program changes how its model runs, and how torch does; what it runs itself is its own affair."""

    def train() -> None:
        model.train()
        own_logits(model)
        model.eval()

    def attend() -> None:
        model.set_attn_implementation("eager")
        own_logits(model)
        model.set_attn_implementation("sdpa")

    def hook() -> None:
        def noise(_module: Any, _args: Any, out: Tensor) -> Tensor:
            return out + 1.0

        handles = [layer.self_attn.v_proj.register_forward_hook(noise) for layer in model.model.layers]
        own_logits(model)
        for handle in handles:
            handle.remove()

    def settings() -> None:
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
                own_logits(model)
        finally:
            torch.set_default_dtype(torch.float32)

    for name, step in {"train": train, "attend": attend, "hook": hook, "settings": settings}.items():
        program.beside(f"changes by {name}", step)


@contextmanager
def _defaults_kept() -> Iterator[None]:
    """Whatever becomes of a round, the next one begins with torch's own default."""
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return off(found, wanted) <= TOLERANCE
