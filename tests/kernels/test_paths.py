"""A model's forwards through the kernels give what they give without, in every kind of family. As the kernels' own tests, these
run on a CUDA device, or on a CPU under Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family, random_ids
from test_kernels import DEVICE, pytestmark  # noqa: F401 - skips where no kernel runs
from torch import Tensor

from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.cuda import steps
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.model.plain.shift import ChunkShift
from cachetune_rag.model.plain.shortlist import Shortlist

# One of each way to rotate (half split, by pairs, in part, stretched, none), to group heads, to see a window.
NAMES = {
    "llama",
    "llama-yarn",
    "llama-head-dim",
    "mistral",
    "phi",
    "glm4",
    "cohere",
    "cohere2",
    "smollm3",
    "gemma3-text",
}
SOME = [f for f in FAMILIES if f.name in NAMES]
LENGTH = 60
SPANS = [(3, 25), (26, 50)]


@pytest.fixture(params=SOME, ids=lambda f: f.name)
def pair(request: pytest.FixtureRequest) -> tuple[ModelAdapter, ModelAdapter]:
    """The same model with the kernels and without."""
    family: Family = request.param
    torch.backends.cuda.matmul.allow_tf32 = False
    ours = ModelAdapter(family.build().to(DEVICE))
    if ours.device_forward is None:
        pytest.skip("its attention is beyond the kernels")
    return ours, ModelAdapter(family.build().to(DEVICE), cuda_kernels=False)


def filled(adapter: ModelAdapter) -> KVBuffers:
    """Rows of a prompt, the same each time."""
    buffers = adapter.new_buffers(LENGTH)
    generator = torch.Generator().manual_seed(5)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return buffers


def some(places: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(random_ids(LENGTH, seed=1))
    return ids[places], torch.tensor(places)


def same(a: Tensor, b: Tensor, tolerance: float = 5e-5) -> bool:
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


@pytest.mark.parametrize("known", [None, 20])
def test_shifted_forward(pair: tuple[ModelAdapter, ModelAdapter], known: int | None) -> None:
    # Chunks of which some, none (the second, in `known` alone) and a last token outside are computed.
    ids, places = some([0, 1, 5, 11, 12, 20, 30, 55, LENGTH - 1])
    stale = None if known is None else torch.arange(LENGTH) < known
    shift = ChunkShift(0.4, SPANS, stale)
    results = []
    for adapter in pair:
        buffers, asked = filled(adapter), list[int]()
        results.append((adapter.selective_forward(ids, places, buffers, asked.append, shift), buffers))
        assert asked == list(range(adapter.num_layers))
    (ours, moved), (wanted, expected) = results
    assert same(ours, wanted)
    for layer in range(pair[0].num_layers):
        assert same(moved.key_rows[layer], expected.key_rows[layer])
        assert same(moved.value_rows[layer], expected.value_rows[layer])


def test_expected_error(pair: tuple[ModelAdapter, ModelAdapter]) -> None:
    ids, places = some([0, 1, 2, 25, *range(50, LENGTH)])

    def pass_of(adapter: ModelAdapter, layers: int, queries: int) -> ProbePass:
        return ProbePass(ids, places, filled(adapter), layers, queries, lambda _layer: None)

    for layers, queries in ((pair[0].num_layers, 64), (1, 3)):
        columns = 2 * sum(spec.heads for spec in pair[0].layers[:layers])
        deviations = torch.rand(LENGTH, columns, generator=torch.Generator().manual_seed(6)).half().to(DEVICE)
        ours, wanted = (a.expected_error(pass_of(a, layers, queries), deviations) for a in pair)
        # A token that sees itself alone is at no distance from its value, but for rounding, of which the root is taken.
        assert same(ours, wanted, 1e-3)
    ours, wanted = (a.received_attention(pass_of(a, layers, queries)) for a in pair)
    assert same(ours, wanted)


def without(buffers: KVBuffers, left_out: Tensor) -> KVBuffers:
    """The same, with NaN in some rows."""
    for rows in rows_of(buffers):
        rows[left_out] = float("nan")
    return buffers


def test_rows_that_are_left_out(pair: tuple[ModelAdapter, ModelAdapter]) -> None:
    ids, places = some([0, 1, 2, 25, *range(50, LENGTH)])
    left_out = (torch.arange(LENGTH) > 25) & (torch.arange(LENGTH) < 40)
    columns = 2 * sum(spec.heads for spec in pair[0].layers)
    deviations = torch.rand(LENGTH, columns, generator=torch.Generator().manual_seed(6)).half().to(DEVICE)
    passes = [
        ProbePass(ids, places, without(filled(a), left_out), a.num_layers, 9, lambda _layer: None, left_out=left_out)
        for a in pair
    ]
    for looks in (
        [a.expected_error(each, deviations) for a, each in zip(pair, passes, strict=True)],
        [a.received_attention(each) for a, each in zip(pair, passes, strict=True)],
    ):
        assert same(*looks, 1e-3)
        assert not any(look[left_out].any() for look in looks)


@pytest.mark.parametrize("new", [False, True])
def test_expected_error_with_a_shortlist(pair: tuple[ModelAdapter, ModelAdapter], new: bool) -> None:
    """Rows that aren't in it hold NaN in the later layers: nothing reads them. Those of new passages do in all layers."""
    computed = [0, 1, 2, 25, *range(50, LENGTH)]
    ids, places = some(computed)
    among = torch.ones(LENGTH, dtype=torch.bool)
    among[computed] = False
    columns = 2 * sum(spec.heads for spec in pair[0].layers)
    deviations = torch.rand(LENGTH, columns, generator=torch.Generator().manual_seed(6)).half().to(DEVICE)
    deviations[computed] = 0
    results, chosen = [], []
    passage = (torch.arange(LENGTH) > 25) & (torch.arange(LENGTH) < 40) & new
    among &= ~passage
    never = passage if new else None
    for adapter in pair:
        buffers, seen = without(filled(adapter), passage), list[Tensor]()

        def found(rows: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(rows)

        def before(layer: int, buffers: KVBuffers = buffers, seen: list[Tensor] = seen) -> None:
            assert len(seen) == (layer > 0)
            if seen:
                buffers.key_rows[layer][~seen[0]] = float("nan")
                buffers.value_rows[layer][~seen[0]] = float("nan")

        shortlist = Shortlist(1, 12, among, found)
        probe = ProbePass(ids, places, buffers, adapter.num_layers, 7, before, shortlist, never)
        results.append(adapter.expected_error(probe, deviations))
        chosen.append(seen[0])
    assert torch.equal(*chosen)
    assert int(chosen[0].sum()) == len(computed) + 12
    assert bool(chosen[0][computed].all())
    assert same(*results, 1e-3)
    wanted = pair[1].expected_error(
        ProbePass(ids, places, filled(pair[1]), 1, 7, lambda _layer: None, left_out=never),
        deviations[:, : 2 * pair[1].layers[0].heads],
    )
    left_out = ~chosen[0]
    # Where all of these are beyond a window, they are 0.
    torch.testing.assert_close(results[0][left_out], wanted[left_out], rtol=1e-3, atol=1e-6)
    ranked = wanted.masked_fill(~among.to(DEVICE), -1).sort(descending=True, stable=True).indices
    best = ranked[:12].sort().values
    assert torch.equal((chosen[0] & among.to(DEVICE)).nonzero()[:, 0], best)


@pytest.mark.parametrize("reused", [True, False], ids=["reused", "computed"])
def test_decoding_steps(pair: tuple[ModelAdapter, ModelAdapter], reused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes behind a prompt, past the rows that were made for it: the same as with transformers' own cache."""
    monkeypatch.setattr(steps, "ANSWER_ROWS", 5)
    ids, answer = torch.tensor(random_ids(LENGTH, seed=1)), random_ids(12, seed=7)
    quick, plain = pair
    if reused:
        buffers, expected = quick.new_buffers(LENGTH, 3), filled(plain)
        for ours, theirs in zip(rows_of(buffers), rows_of(filled(quick)), strict=True):
            ours.copy_(theirs)
        cache, reference = buffers.to_cache(), expected.to_cache()
    else:
        buffers = None
        (_, cache), (_, reference) = (a.full_forward(ids.to(DEVICE)) for a in pair)
    step, wanted = quick.quick_steps(cache, buffers, 3), plain.quick_steps(reference, None, 3)
    assert isinstance(step, steps.KernelSteps)
    prompt = [layer.keys.clone() for layer in cache.layers]
    for token in answer:
        assert same(step(token), wanted(token))
    # What others see of the prompt is what it was.
    assert cache.get_seq_length() == LENGTH
    assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, prompt, strict=True))
    assert reference.get_seq_length() == LENGTH + len(answer)


def rows_of(buffers: KVBuffers) -> list[Tensor]:
    return [*buffers.key_rows, *buffers.value_rows]
