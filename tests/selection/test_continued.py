"""The rest of a sentence that the chunk before began is chosen with its beginning, within the ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from test_selection import FakeContext
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.continued import with_continuations

BEGINS = "The mill is old. It has a door. The access code of the mill"
GOES_ON = "is 48213. Nobody knows it. The door is shut, and it was shut before."
OTHER = "Visitors climb 214 steps. The last forty are a ladder, so take care."
REST = len("is 48213.")  # the tokenizer of these tests has one token a letter


def context_of(attention: Sequence[float], continuation: tuple[range, range]) -> FakeContext:
    """Two chunks of four tokens behind a prefix of three."""
    received = torch.zeros(8, 13)
    received[:, 3:11] = torch.tensor(attention)
    context = FakeContext([[0.4, 0.3, 0.2, 0.1]] * 2, received)
    context.continuations = (continuation,)
    return context


@pytest.mark.parametrize("name", ["probe", "expected_error", "expected_error_early"])
def test_a_rest_counts_as_much_as_what_is_attended_to_of_its_beginning(name: str) -> None:
    """The query finds the chunk before (token 6) and nothing behind it."""
    context = context_of([0.1, 0.5, 0.1, 0.9, 0, 0, 0, 0.2], (range(5, 7), range(7, 9)))
    select = get_selector(name).select
    assert sorted(select(context, 3 / 8).tolist()) == [6, 7, 8]
    assert sorted(select(context, 4 / 8).tolist()) == [4, 6, 7, 8]
    context.continuations = ()
    assert sorted(select(context, 3 / 8).tolist()) == [4, 6, 10]


@pytest.mark.parametrize("name", ["probe", "expected_error"])
def test_a_rest_of_which_the_query_asks_nothing_costs_nothing(name: str) -> None:
    context = context_of([0.9, 0.8, 0.1, 0, 0, 0.7, 0, 0.6], (range(5, 7), range(7, 9)))
    assert sorted(get_selector(name).select(context, 0.5).tolist()) == [3, 4, 8, 10]


def test_the_error_that_is_left_counts_the_rest() -> None:
    """What a bound is kept by has to know what the choice knows."""
    context = context_of([0, 0, 0, 0.9, 0, 0, 0, 0.2], (range(5, 7), range(7, 9)))
    left = get_selector("probe").choose(context, 2 / 8).error_left
    assert left == pytest.approx(2 * (0.9 + 0.2), rel=1e-5), (
        "two layers: the second token of the rest, and the last one"
    )


def test_scores_are_only_raised_and_only_those_of_rests() -> None:
    context = context_of([0] * 8, (range(5, 7), range(7, 9)))
    scores = torch.tensor([9.0, 9, 9, 1, 2, 3, 4, 5, 0, 0, 7, 9, 9])
    raised = with_continuations(scores, context.continuations, context.chunks)
    assert raised.tolist() == [9.0, 9, 9, 1, 2, 3, 4, 5, 4, 0, 7, 9, 9]
    assert scores[8] == 0, "the scores that were given stay"
    assert with_continuations(scores, (), context.chunks) is scores
    computed = with_continuations(scores, context.continuations, context.chunks[1:])
    assert computed.tolist() == [9.0, 9, 9, 1, 2, 3, 4, 7, 7, 0, 7, 9, 9], (
        "nothing is known of a beginning that isn't stored"
    )


def test_frequency_takes_the_rest_before_all_others_of_its_chunk() -> None:
    context = FakeContext([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]] * 2)
    select = get_selector("frequency").select
    context.continuations = ((range(7, 9), range(9, 12)),)
    assert sorted(select(context, 2 / 6).tolist()) == [7, 8, 9, 10]
    assert sorted(select(context, 4 / 6).tolist()) == [5, 6, 7, 8, 9, 10, 11, 14]
    assert sorted(select(context, 1.0).tolist()) == list(range(3, 15))
    assert select(context, 0.0).tolist() == []


# -- in the engine ------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        yield made


@pytest.mark.parametrize("selector", ["expected_error", "probe", "frequency"])
def test_the_rest_is_recomputed_and_exact_behind_a_chunk_that_was_computed(engine: CacheTune, selector: str) -> None:
    engine.precompute([GOES_ON])  # the chunk before is missed
    asked = {"query": "Which code?", "chunks": [BEGINS, GOES_ON]}
    state = engine.prefill(**asked, selector=selector, ratio=0.2)
    full = engine.full_prefill(**asked)
    start = state.prompt.spans[1].start
    assert state.report.continued == REST
    for mine, whole in zip(state.cache.layers, full.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys[:, :, : start + REST], whole.keys[:, :, : start + REST])
        torch.testing.assert_close(mine.values[:, :, : start + REST], whole.values[:, :, : start + REST])
    assert not torch.allclose(state.cache.layers[-1].keys, full.cache.layers[-1].keys, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
def test_the_ratio_stays_a_promise(engine: CacheTune, selector: str, ratio: float) -> None:
    engine.precompute([BEGINS, GOES_ON, OTHER])
    cut, apart = [BEGINS, GOES_ON, OTHER], [GOES_ON, BEGINS, OTHER]
    reports = [engine.prefill(query="Which?", chunks=c, selector=selector, ratio=ratio).report for c in (cut, apart)]
    assert reports[0].recomputed == reports[1].recomputed <= ratio * (len(BEGINS) + len(GOES_ON) + len(OTHER))
    assert reports[1].continued == 0, "in another order nothing goes on"
    if selector == "frequency":
        assert reports[0].continued == min(REST, int(ratio * len(GOES_ON)))


def test_it_is_the_same_for_chunks_recognised_in_token_ids(engine: CacheTune) -> None:
    """A server knows the ids alone."""
    engine.precompute([BEGINS, GOES_ON])
    given = engine.prefill(query="Which code?", chunks=[BEGINS, GOES_ON], selector="frequency", ratio=0.3)
    text = tokenizer().decode(list(given.prompt.ids), skip_special_tokens=False)
    found = engine.prefill(prompt=engine.prompt_from_text(text), selector="frequency", ratio=0.3)
    assert found.report.recognised == 2
    assert found.report.continued == given.report.continued == REST
