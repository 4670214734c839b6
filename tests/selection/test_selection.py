"""Which tokens are chosen: the maths against plain references, budgets exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cachetune_rag.errors import ConfigError
from cachetune_rag.reuse.config import PAPER, resolve
from cachetune_rag.selection import ReusedChunk, Selector, get_selector, names, register_selector, selector_names
from cachetune_rag.selection.base import budget, top, top_set
from cachetune_rag.selection.frequency import frequency_scores
from cachetune_rag.selection.layer0_value import Layer0ValueSelector
from cachetune_rag.selection.probe import ProbeSelector


class FakeContext:
    """Chunks of given scores one after another behind a prefix of 3 tokens; a query of 2 tokens at the end."""

    num_layers = 8
    asked_from = 0
    continuations: tuple[tuple[range, range], ...] = ()

    def __init__(self, scores: list[list[float]], attention: Tensor | None = None, seed: int = 1):
        self.chunks = []
        start = 3
        for row in scores:
            values = torch.tensor(row)
            order = torch.sort(values, descending=True, stable=True).indices.flip(0)
            self.chunks.append(ReusedChunk(start, order, values))
            start += len(row)
        self.length, self.seed, self.attention = start + 2, seed, attention
        self.ids, self.sentences = np.arange(self.length), np.full(self.length, -1)
        self.layers_run: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self.num_layers, self.length, 2, 4)  # keys and values of two heads
        self.reused, self.fresh = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def observe_attention(
        self, num_layers: int, queries: int, observe: Callable[[int, Tensor], None], whole: bool = False
    ) -> None:
        assert self.attention is not None
        for layer in range(num_layers):
            self.layers_run.append(layer)
            observe(layer, self.attention[layer].expand(2, queries, self.length))

    def received_attention(self, num_layers: int, queries: int, whole: bool = False) -> Tensor:
        assert self.attention is not None
        self.layers_run += range(num_layers)
        return self.attention[:num_layers].sum(0)

    def expected_error(
        self, num_layers: int, queries: int, shortlist: tuple[int, int] | None = None, whole: bool = False
    ) -> Tensor:
        assert shortlist is None, "these prompts are short"
        return self.received_attention(num_layers, queries)

    def reused_states(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.reused[0, layer], self.reused[1, layer]

    def fresh_states(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.fresh[0, layer], self.fresh[1, layer]


PER_CHUNK = ["frequency", "chunk_head"]
OVER_ALL = [
    "probe",
    "expected_error",
    "expected_error_early",
    "expected_error_tokens",
    "kv_deviation",
    "layer0_value",
    "random",
]


def numpy_scores(layers: list[tuple[np.ndarray, np.ndarray]], alpha: float) -> np.ndarray:
    """The formula of the paper, written once more without torch."""
    total = np.zeros(layers[0][0].shape[0])
    for pair in layers:
        score = np.zeros_like(total)
        for x in pair:
            n = x.shape[0]
            spectrum = np.fft.rfft(x.reshape(n, -1), axis=0)
            spectrum[math.floor(alpha * (n // 2 + 1)) :] = 0
            score += np.linalg.norm(np.fft.irfft(spectrum, n=n, axis=0), axis=1) / 2
        total += score / score.sum() if score.sum() > 0 else score
    return total / len(layers)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64, 65, 257])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_frequency_scores_equal_a_numpy_reference(tokens: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    layers = [
        (torch.randn(tokens, 2, 4, generator=generator), torch.randn(tokens, 2, 4, generator=generator))
        for _ in range(3)
    ]
    ours = frequency_scores(layers, alpha)
    reference = numpy_scores([(k.numpy().astype(np.float64), v.numpy().astype(np.float64)) for k, v in layers], alpha)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), reference, rtol=2e-5, atol=1e-7)


def test_frequency_scores_accept_half_types() -> None:
    layers = [(torch.randn(9, 1, 8), torch.randn(9, 1, 8))]
    half = [(k.bfloat16(), v.bfloat16()) for k, v in layers]
    expected = frequency_scores([(k.float(), v.float()) for k, v in half])
    assert torch.equal(frequency_scores(half), expected)


def test_frequency_takes_the_top_of_each_chunk() -> None:
    context = FakeContext([[0.1, 0.9, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1]])
    assert sorted(get_selector("frequency").select(context, 0.5).tolist()) == [4, 5, 7, 8]


def test_ties_go_to_the_smaller_index() -> None:
    context = FakeContext([[0.5, 0.5, 0.5, 0.5]])
    assert sorted(get_selector("frequency").select(context, 0.5).tolist()) == [3, 4]
    flat = FakeContext([[0.0] * 4], attention=torch.zeros(8, 9))
    flat.fresh = flat.reused = torch.zeros_like(flat.reused)
    for name in ("probe", "expected_error", "kv_deviation", "layer0_value"):
        assert sorted(get_selector(name).select(flat, 0.5).tolist()) == [3, 4]


def test_probe_shares_one_budget_over_all_chunks() -> None:
    attention = torch.zeros(8, 13)
    attention[:, 3:7] = torch.tensor([0.9, 0.8, 0.7, 0.6])  # the first chunk gets it all
    attention[:, 0:3] = 5.0  # the prefix is no candidate
    context = FakeContext([[0.0] * 4, [0.0] * 4], attention)
    assert sorted(get_selector("probe").select(context, 0.5).tolist()) == [3, 4, 5, 6]


def test_probe_looks_at_the_first_layers_only() -> None:
    attention = torch.zeros(8, 9)
    attention[:2, 3] = 1.0
    attention[2:, 5] = 9.0
    context = FakeContext([[0.0] * 4], attention)
    assert ProbeSelector(depth=0.25).select(context, 0.25).tolist() == [3]
    assert context.layers_run == [0, 1]


def test_expected_error_looks_at_all_layers_and_shares_one_budget() -> None:
    attention = torch.zeros(8, 13)
    attention[0, 3:7] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    attention[7, 7:11] = torch.tensor([0.1, 3.0, 2.0, 0.5])
    attention[:, 0:3] = 5.0  # the prefix is no candidate
    context = FakeContext([[0.0] * 4, [0.0] * 4], attention)
    assert sorted(get_selector("expected_error").select(context, 0.5).tolist()) == [3, 4, 8, 9]
    assert context.layers_run == list(range(8))
    context.layers_run.clear()
    for ratio in (0.0, 0.1, 1.0):  # nothing to choose: nothing is run
        get_selector("expected_error").select(context, ratio)
    assert context.layers_run == []


def test_only_expected_error_shifts() -> None:
    """The published selectors are compared as published."""
    assert {n: get_selector(n).shift for n in selector_names() if get_selector(n).shift} == {
        "expected_error": 0.4,
        "expected_error_early": 0.4,
        "expected_error_tokens": 0.4,
    }


def test_kv_deviation_equals_a_numpy_reference() -> None:
    context = FakeContext([[0.0] * 11, [0.0] * 6], seed=7)
    off = (context.fresh[:, 1] - context.reused[:, 1]).double().numpy()  # keys and values of layer 1
    distance = np.sqrt((off**2).sum((0, 2, 3)))
    best = sorted(range(3, 20), key=lambda j: -distance[j])
    for ratio, count in ((0.1, 1), (0.3, 5), (0.5, 8)):
        picked = get_selector("kv_deviation").select(context, ratio).tolist()
        assert sorted(picked) == sorted(best[:count])


@pytest.mark.parametrize("sizes", [[1], [2], [3], [1, 1], [4, 1, 12], [40, 25]])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_layer0_value_equals_a_numpy_reference(sizes: list[int], alpha: float) -> None:
    """One spectrum along all chunks together."""
    context = FakeContext([[0.0] * n for n in sizes], seed=3)
    total = sum(sizes)
    context.reused[:, :, :3] = context.reused[:, :, 3 + total :] = float("nan")  # what is computed may hold anything
    values = context.reused[1, 0, 3 : 3 + total].double().numpy().reshape(total, -1)
    spectrum = np.fft.rfft(values, axis=0)
    spectrum[int(len(spectrum) * alpha) :] = 0
    # In single precision, as ours, so that what is equal but for rounding is tied by index alike.
    scores = np.linalg.norm(np.fft.irfft(spectrum, n=total, axis=0), axis=1).astype(np.float32)
    assert len(np.unique(scores.round(5))) in (1, total)  # no order that rounding would decide
    for count in range(total + 1):
        picked = sorted(Layer0ValueSelector(alpha).select(context, count / total).tolist())
        assert picked == sorted(3 + j for j in sorted(range(total), key=lambda j: (-scores[j], j))[:count])


def test_chunk_head_takes_the_first_tokens() -> None:
    context = FakeContext([[0.0] * 5, [0.0] * 3])
    assert get_selector("chunk_head").select(context, 0.4).tolist() == [3, 4, 8]


def test_random_depends_on_the_prompt_alone() -> None:
    scores = [[0.0] * 50]
    first, again = (get_selector("random").select(FakeContext(scores, seed=5), 0.3) for _ in range(2))
    other = get_selector("random").select(FakeContext(scores, seed=6), 0.3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == 15


@pytest.mark.parametrize("name", PER_CHUNK + OVER_ALL)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("sizes", [[100, 7, 1], [1], [2], [3], [1, 1, 1], [1, 2, 3, 31]])
def test_budgets_are_exact(name: str, ratio: float, sizes: list[int]) -> None:
    context = FakeContext([list(np.linspace(0, 1, n)) for n in sizes], torch.rand(8, sum(sizes) + 5))
    picked = get_selector(name).select(context, ratio)
    if name in PER_CHUNK:
        expected = sum(math.floor(round(ratio * n, 9)) for n in sizes)
    else:
        expected = math.floor(round(ratio * sum(sizes), 9))
    assert len(picked) == expected
    assert len(set(picked.tolist())) == expected
    assert all(3 <= p < 3 + sum(sizes) for p in picked.tolist())


def test_budget_is_not_thrown_off_by_binary_fractions() -> None:
    assert budget(0.29, 100) == 29
    assert budget(0.15, 20) == 3
    assert budget(1.0, 7) == 7
    assert budget(0.999, 7) == 6
    for percent in range(101):
        for tokens in (*range(1, 130), 511, 512, 4096, 99_999):
            assert budget(percent / 100, tokens) == percent * tokens // 100


@pytest.mark.parametrize("name", [*PER_CHUNK, *OVER_ALL, "none", "all"])
def test_no_chunks_select_nothing(name: str) -> None:
    assert get_selector(name).select(FakeContext([]), 0.5).tolist() == []


def test_none_and_all_ignore_the_ratio() -> None:
    context = FakeContext([[0.0] * 4])
    assert get_selector("none").select(context, 1.0).tolist() == []
    assert get_selector("all").select(context, 0.0).tolist() == [3, 4, 5, 6]


def test_an_unknown_selector_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"'nope'.*auto.*frequency.*probe"):
        get_selector("nope")


def test_a_selector_can_be_added_once() -> None:
    class Mine(Selector):
        name = "mine-for-test"

        def select(self, context: object, ratio: float) -> Tensor:
            return torch.empty(0, dtype=torch.int64)

    register_selector(Mine())
    assert "mine-for-test" in selector_names()
    with pytest.raises(ConfigError, match="taken"):
        register_selector(Mine())


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), "half", None, True])
def test_ratios_out_of_range_are_refused(ratio: object) -> None:
    with pytest.raises(ConfigError, match=r"ratio is .*0 .*1"):
        resolve("auto", ratio)


def test_the_papers_settings() -> None:
    assert resolve("auto", "auto", PAPER) == PAPER
    assert (PAPER.selector, PAPER.ratio) == ("frequency", 0.15)


@pytest.mark.parametrize("count", [1, 2, 5, 19, 20])
def test_the_top_as_a_set_breaks_ties_like_the_sorted_top(count: int) -> None:
    for seed in range(20):
        scores = torch.randint(0, 6, (20,), generator=torch.Generator().manual_seed(seed)).float()
        assert top_set(scores, count).tolist() == sorted(top(scores, count).tolist())


def test_every_selector_of_the_package_is_named_once_and_says_what_it_needs() -> None:
    assert set(names.BUILT_IN) <= set(selector_names())
    assert len(set(names.BUILT_IN)) == len(names.BUILT_IN)
    ours = {name for name in selector_names() if type(get_selector(name)).__module__.startswith("cachetune_rag.")}
    assert ours == set(names.BUILT_IN)
    assert {n for n in ours if not get_selector(n).uses_ratio} == {"all", "none"}
    assert {n for n in ours if get_selector(n).uses_deviations} == {
        "expected_error",
        "expected_error_early",
        "expected_error_tokens",
    }
    assert {n for n in ours if get_selector(n).offline} == {names.OFFLINE}
    assert resolve("auto", 0).selector == names.DEFAULT
    assert all(word in (*names.BUILT_IN, "...", "or", "auto") for word in names.HELP.replace(",", "").split())
