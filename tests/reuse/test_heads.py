"""A model whose heads are divided between two peers, here two threads: both put prompts together alike, whatever happens to one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from tiny import llama, tokenizer
from torch import Tensor, nn

from cachetune_rag import CacheTune
from cachetune_rag.concurrency.deadline import StoreTimeoutError
from cachetune_rag.errors import CacheTuneError, ModelChangedError
from cachetune_rag.model.heads import PeerError, SharedHeads
from cachetune_rag.model.shared import SharedModel
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.phases import ForwardPhases
from cachetune_rag.reuse.plan import Loaders
from cachetune_rag.reuse.reading import Reading
from cachetune_rag.reuse.selection_context import BEHIND, BETWEEN
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_rag.runtime import Runtime
from cachetune_rag.selection import get_selector
from cachetune_store import LayerSpec

_T = TypeVar("_T")
SECONDS = 20
PEERS = 2
CHUNKS = [
    "The river rises in the hills behind the town, and nobody knows where it ends.",
    "A second passage, about something else entirely: how bread is made from rye.",
    "And a third one. It says that the museum is closed on Mondays and on holidays.",
]


class Meeting:
    """Where the peers exchange what they have."""

    def __init__(self) -> None:
        self._all_there = threading.Barrier(PEERS, timeout=SECONDS)
        self._values: list[Any] = [None] * PEERS

    def gather(self, number: int, value: _T) -> list[_T]:
        self._values[number] = value
        self._all_there.wait()
        told = list(self._values)
        self._all_there.wait()
        return told


class Half(SharedHeads):
    """Half of the heads, in a thread.

    Attributes:
        exchanges: how often it exchanged something with the other one while it did not compute.
    """

    def __init__(self, number: int, kv_heads: int, meetings: dict[str, Meeting]):
        self.number, self._kv_heads, self._meetings = number, kv_heads, meetings
        self.computes, self.exchanges = False, 0

    def stored(self, spec: LayerSpec) -> LayerSpec:
        return LayerSpec(self._kv_heads, spec.head_dim, spec.v_head_dim)

    def own(self, spec: LayerSpec) -> slice:
        first = 0 if self._kv_heads == 1 else self.number * spec.heads
        return slice(first, first + spec.heads)

    def total(self, numbers: Tensor) -> Tensor:
        return torch.stack(self._meetings["sum"].gather(self.number, numbers)).sum(0)

    def mean(self, numbers: Tensor) -> Tensor:
        return self.total(numbers) / PEERS

    def every(self, states: Tensor) -> Tensor:
        parts = self._meetings["sum"].gather(self.number, states)
        return parts[0] if self._kv_heads == 1 else torch.cat(parts, 1)

    def exchanged(self, value: _T) -> list[_T]:
        assert not self.computes
        self.exchanges += 1
        return self._meetings["talk"].gather(self.number, value)

    @contextmanager
    def computing(self, meanwhile: Callable[[], None] | None = None) -> Iterator[None]:
        self.computes = True
        yield
        self.computes = False


class Summed(nn.Linear):
    heads: Half

    def forward(self, input: Tensor) -> Tensor:
        return self.heads.total(F.linear(input, self.weight))


def half_of(whole: Any, heads: Half) -> Any:
    """A model with half of the heads and of the MLP's width."""
    config, number = type(whole.config).from_dict(whole.config.to_dict()), heads.number
    config.head_dim = whole.config.hidden_size // whole.config.num_attention_heads
    config.num_attention_heads //= PEERS
    config.num_key_value_heads = max(1, config.num_key_value_heads // PEERS)
    config.intermediate_size //= PEERS
    made = type(whole)(config).eval()
    state = whole.state_dict()
    for name, tensor in made.state_dict().items():
        full = state[name]
        for dim in range(full.dim()):
            if full.shape[dim] != tensor.shape[dim]:
                full = full.chunk(PEERS, dim)[number]
        tensor.copy_(full)
    for layer in made.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.__class__ = Summed
            linear.heads = heads
    return made


def model_of(kv_heads: int) -> Any:
    whole = llama()
    if kv_heads == 1:
        config = whole.config
        config.num_key_value_heads = 1
        torch.manual_seed(0)
        whole = type(whole)(config).eval()
    return whole


class Pair:
    """Two engines, each with half of the heads and a store of its own over the same folder."""

    def __init__(self, whole: Any, store: Path, kv_heads: int, host_budget: int = 0):
        meetings = {"sum": Meeting(), "talk": Meeting()}
        self.heads = [Half(number, kv_heads, meetings) for number in range(PEERS)]
        models = [half_of(whole, heads) for heads in self.heads]
        with CacheTune(whole, tokenizer(), store) as engine:
            fingerprint = engine.runtime.model.fingerprint
        self.pool = ThreadPoolExecutor(PEERS)

        def opened(number: int) -> Runtime:
            return Runtime(
                models[number],
                tokenizer(),
                store,
                fingerprint=fingerprint,
                heads=self.heads[number],
                host_budget=host_budget,
            )

        self.engines = list(self.pool.map(opened, range(PEERS)))

    def reuse(
        self,
        chunks: Sequence[str],
        selector: str,
        ratio: float,
        opened: Sequence[Callable[[], None]] = (),
        too_slow: Callable[[Reading], float | None] | None = None,
    ) -> list[PrefillState | NothingReused | Exception]:
        def one(number: int) -> PrefillState | NothingReused | Exception:
            engine = self.engines[number]
            config = engine.admission.config(selector, ratio)
            request = engine.admission.for_prefill("what?", list(chunks), None, None, {}, config=config, started=0.0)
            try:
                memory = engine.assembler.memory
                return engine.executor.reuse(request, memory, *opened[number : number + 1], too_slow=too_slow)
            except CacheTuneError as error:
                return error
            except ZeroDivisionError as error:
                return error

        return list(self.pool.map(one, range(PEERS)))

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.pool.shutdown()


@pytest.fixture(params=[2, 1], ids=["own key-value heads", "the same key-value head"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Pair, Path]]:
    whole = model_of(request.param)
    with CacheTune(whole, tokenizer(), tmp_path) as engine:
        engine.precompute(CHUNKS)
    pair = Pair(whole, tmp_path, request.param)
    yield whole, pair, tmp_path
    pair.close()


def check(whole: Any, pair: Pair, states: Sequence[Any], wanted: PrefillState) -> None:
    """The peers have the engine's logits, and their heads of its keys and values."""
    for heads, state in zip(pair.heads, states, strict=True):
        assert isinstance(state, PrefillState)
        assert (state.report.reused, state.report.recomputed, state.report.missed) == (
            wanted.report.reused,
            wanted.report.recomputed,
            wanted.report.missed,
        )
        torch.testing.assert_close(state.logits, wanted.logits, atol=1e-4, rtol=0)
        for mine, theirs in zip(state.cache.layers, wanted.cache.layers, strict=True):
            own = heads.own(LayerSpec(mine.keys.shape[1], 8, 8))
            torch.testing.assert_close(mine.keys, theirs.keys[:, own], atol=1e-4, rtol=0)
            torch.testing.assert_close(mine.values, theirs.values[:, own], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("selector", "ratio"),
    [
        ("expected_error", 0.2),
        ("probe", 0.2),
        ("frequency", 0.2),
        ("kv_deviation", 0.2),
        ("layer0_value", 0.2),
        ("none", 0),
    ],
)
def test_peers_put_a_prompt_together_as_one_engine_does(
    pair: tuple[Any, Pair, Path], selector: str, ratio: float
) -> None:
    whole, peers, store = pair
    with CacheTune(whole, tokenizer(), store) as engine:
        wanted = engine.prefill(query="what?", chunks=CHUNKS, selector=selector, ratio=ratio)
    check(whole, peers, peers.reuse(CHUNKS, selector, ratio), wanted)


@pytest.mark.parametrize("selector", ["expected_error", "expected_error_early", "expected_error_tokens", "probe"])
def test_peers_leave_the_same_new_passages_out_of_their_looks(pair: tuple[Any, Pair, Path], selector: str) -> None:
    whole, peers, store = pair
    chunks = ["A new one in front.", CHUNKS[0], "Nobody has seen this passage before. " * 3, *CHUNKS[1:], "New. " * 60]
    states = peers.reuse(chunks, selector, 0.2)  # before the engine, which stores what it missed
    with CacheTune(whole, tokenizer(), store) as engine:
        wanted = engine.prefill(query="what?", chunks=chunks, selector=selector, ratio=0.2)
        assert wanted.report.missed > BETWEEN + BEHIND
        looked_at = wanted.report.probed / engine.adapter.num_layers
    assert 0 < looked_at < wanted.report.missed
    check(whole, peers, states, wanted)
    assert [state.report.probed for state in states if isinstance(state, PrefillState)] == [wanted.report.probed] * 2


def test_rows_that_one_peer_finds_damaged_are_computed_by_both(
    pair: tuple[Any, Pair, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, peers, store = pair
    with CacheTune(whole, tokenizer(), store) as engine:
        wanted = engine.prefill(query="what?", chunks=[*CHUNKS[:2], "none"], selector="expected_error", ratio=0.2)
        key = engine.runtime.assembler.key(tokenizer()(CHUNKS[1], add_special_tokens=False).input_ids)
    assert wanted.report.reused
    file = next(store.rglob(f"*{key}*.safetensors"))
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    file.write_bytes(data)
    states = peers.reuse(CHUNKS, "expected_error", 0.2)
    reports = [state.report for state in states if isinstance(state, PrefillState)]
    assert [r.missed for r in reports] == [len(tokenizer()(CHUNKS[1], add_special_tokens=False).input_ids)] * 2
    torch.testing.assert_close(states[0].logits, states[1].logits)  # type: ignore[union-attr]


def test_a_disk_that_is_late_for_one_peer_is_left_out_by_both(
    pair: tuple[Any, Pair, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, peers, _ = pair
    slow = peers.engines[1].pool
    before = slow.result

    def late(job: Any) -> Any:
        before(job)
        raise StoreTimeoutError("late")

    monkeypatch.setattr(slow, "result", late)
    states = peers.reuse(CHUNKS, "expected_error", 0.2)
    assert all(isinstance(state, NothingReused) for state in states)
    monkeypatch.undo()
    assert all(isinstance(state, PrefillState) for state in peers.reuse(CHUNKS, "expected_error", 0.2))


def test_what_fails_on_one_peer_fails_on_both(pair: tuple[Any, Pair, Path]) -> None:
    _, peers, _ = pair
    first, second = peers.reuse(CHUNKS, "expected_error", 0.2, [lambda: None, lambda: 1 // 0 and None])
    assert isinstance(first, PeerError)
    assert not first.again
    assert isinstance(second, ZeroDivisionError)
    assert all(isinstance(state, PrefillState) for state in peers.reuse(CHUNKS, "expected_error", 0.2))


@pytest.mark.parametrize("slow", [False, True])
def test_where_one_peer_has_a_slow_disk_both_decide_by_that(pair: tuple[Any, Pair, Path], slow: bool) -> None:
    _, peers, _ = pair
    speeds = (None, 1000.0) if slow else (1e6, 1e6)
    for engine, speed in zip(peers.engines, speeds, strict=True):
        engine.store.read_speed = partial(lambda said, tier: said, speed)  # type: ignore[method-assign]
    asked: list[Reading] = []

    def too_slow(reading: Reading) -> float | None:
        asked.append(reading)
        return 0.0 if reading.seconds > 1 else None

    states = peers.reuse(CHUNKS, "expected_error", 0.2, too_slow=too_slow)
    assert all(isinstance(state, NothingReused if slow else PrefillState) for state in states)
    assert len(asked) == PEERS
    assert asked[0] == asked[1]
    assert asked[0].before == 1
    assert asked[0].reused > 0
    assert all(isinstance(state, PrefillState) for state in peers.reuse(CHUNKS, "expected_error", 0.2))


@pytest.mark.parametrize(("selector", "ratio"), [("frequency", 0.2), ("expected_error", 0.2), ("none", 0.0)])
def test_a_prompt_takes_four_agreements(tmp_path: Path, selector: str, ratio: float) -> None:
    """Opening its chunks, taking memory, choosing, and its end: each one waits for the slowest peer. To wait for a disk is one more."""
    whole = model_of(2)
    with CacheTune(whole, tokenizer(), tmp_path) as engine:
        engine.precompute(CHUNKS)
    ids = [tokenizer()(text, add_special_tokens=False).input_ids for text in CHUNKS]
    with closing(Pair(whole, tmp_path, 2, host_budget=1 << 24)) as peers:
        taken = []
        for in_memory in (False, True):
            for heads in peers.heads:
                heads.exchanges = 0
            states = peers.reuse(CHUNKS, selector, ratio, too_slow=lambda reading: None)
            assert all(isinstance(state, PrefillState) and not state.report.missed for state in states)
            taken.append([heads.exchanges for heads in peers.heads])
            if not in_memory:
                for engine in peers.engines:
                    engine.executor.prefetch(lambda: ids).wait(SECONDS)
        assert taken == [[5, 5], [4, 4]]


def test_the_first_layers_of_a_look_are_brought_once_and_within_an_agreement(
    pair: tuple[Any, Pair, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails on one peer outside of an agreement, the other would wait for."""
    begun: list[int] = []
    first = LayerLoader.start_first_layers

    def start(loader: LayerLoader) -> None:
        begun.append(id(loader))
        first(loader)

    monkeypatch.setattr(LayerLoader, "start_first_layers", start)
    states = pair[1].reuse(CHUNKS, "expected_error", 0.3)
    assert all(isinstance(state, PrefillState) for state in states)
    assert len(set(begun)) == len(begun) == 2


def test_what_fails_on_one_peer_before_an_agreement_fails_on_both_in_it() -> None:
    meetings = {"sum": Meeting(), "talk": Meeting()}
    halves = [Half(number, 2, meetings) for number in range(PEERS)]

    def one(heads: Half) -> Any:
        try:
            done = heads.ahead(lambda: 1 // heads.number)
            return heads.agreed(lambda: (done, heads.number))
        except (ZeroDivisionError, PeerError) as error:
            return error

    with ThreadPoolExecutor(PEERS) as pool:
        first, second = pool.map(one, halves)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, PeerError)
    assert second.kind == "ZeroDivisionError"
    assert [half.raised_on_all(error) for half, error in zip(halves, (first, second), strict=True)] == [True, True]
    assert [half.exchanges for half in halves] == [1, 1]


@pytest.mark.parametrize("selector", ["frequency", "expected_error"])
def test_where_peers_choose_otherwise_the_first_one_decides(
    pair: tuple[Any, Pair, Path], selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scores are the same but for rounding, and they must not compute other tokens."""
    whole, peers, store = pair
    with CacheTune(whole, tokenizer(), store) as engine:
        wanted = engine.prefill(query="what?", chunks=CHUNKS, selector=selector, ratio=0.2)
    chooser = type(get_selector(selector))
    chosen, second = chooser.choose, set[int]()

    def choose(self: Any, context: Any, ratio: float, finder: Any = None) -> Any:
        made = chosen(self, context, ratio, finder)
        return replace(made, places=made.places[2:]) if threading.get_ident() in second else made

    monkeypatch.setattr(chooser, "choose", choose)
    states = peers.reuse(CHUNKS, selector, 0.2, [lambda: None, lambda: second.add(threading.get_ident())])
    assert len(second) == 1
    check(whole, peers, states, wanted)


def test_a_servers_stream_is_waited_for_as_little_as_can_be(
    pair: tuple[Any, Pair, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where prompts take turns, they are computed on the server's stream: the end is marked before the turn is given back, and weights are looked at
    on another stream."""
    _, peers, _ = pair
    marked: list[bool] = []
    here = threading.local()

    @contextmanager
    def beside(self: Loaders) -> Iterator[None]:
        here.beside = True
        yield
        here.beside = False

    checked: list[bool] = []
    monkeypatch.setattr(Loaders, "beside", beside)
    monkeypatch.setattr(SharedModel, "check", lambda *_, **__: checked.append(here.beside))
    monkeypatch.setattr(
        ForwardPhases, "finish", lambda self: marked.append(any(heads.computes for heads in peers.heads))
    )
    for engine in peers.engines:
        assert engine.adapter.heads.in_turns
    assert all(isinstance(state, PrefillState) for state in peers.reuse(CHUNKS, "frequency", 0.2))
    assert marked == [True] * PEERS
    assert checked == [True] * 2 * PEERS


def test_weights_that_changed_on_one_peer_alone_stop_both(
    pair: tuple[Any, Pair, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, peers, _ = pair
    changed = peers.engines[1].adapter.decoder_layers[0].mlp.down_proj.weight
    with torch.no_grad():
        changed.mul_(1)
    first, second = peers.reuse(CHUNKS, "frequency", 0.2)
    assert isinstance(first, PeerError)
    assert isinstance(second, ModelChangedError)
    assert (first.kind, first.again) == ("ModelChangedError", False)
    monkeypatch.setattr(SharedModel, "check", lambda *_, **__: None)
    assert all(isinstance(state, PrefillState) for state in peers.reuse(CHUNKS, "frequency", 0.2))
