"""Whole sentences are chosen beside single tokens: by the query's attention, and by the rare words that they share."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_sentences import chosen
from test_selection import FakeContext
from tiny import tokenizer

from cachetune_rag.selection import get_selector
from cachetune_rag.selection.links import Links, sentence_scores
from cachetune_rag.selection.whole_sentences import LONG, SentenceChoice, WholeSentences, joined
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.prompts.sentences import MOST_TOKENS, NONE, Sentences, no_sentences


def texts(prompt: Any, numbers: Any) -> list[str]:
    """The sentences of a prompt whose tokens are letters."""
    ids, spell = np.array(prompt.ids), tokenizer()
    return [spell.decode(ids[numbers == n].tolist()) for n in range(int(numbers.max()) + 1)]


def test_sentences_end_at_stops_line_breaks_and_chunks() -> None:
    chunks = ['It has a "door." Who knows? Nobody', "knows it.\nTwo lines"]
    prompt = PromptBuilder(tokenizer()).build(query="Why. Now.", chunks=chunks)
    numbers = Sentences(tokenizer())(prompt)
    assert "".join(texts(prompt, numbers)) == "".join(chunks)
    found = [text.strip() for text in texts(prompt, numbers) if text.strip(' "\n')]
    assert [t.strip('"').strip() for t in found] == [
        'It has a "door.', "Who knows?", "Nobody", "knows it.", "Two lines",
    ]  # fmt: skip
    inside = [j for span in prompt.spans for j in range(span.start, span.end)]
    assert np.flatnonzero(numbers != NONE).tolist() == inside
    assert no_sentences(prompt).tolist() == [NONE] * len(prompt.ids)


def test_what_goes_on_for_long_is_cut() -> None:
    prompt = PromptBuilder(tokenizer()).build(query="Why?", chunks=["a" * (2 * MOST_TOKENS + 5), "b" * MOST_TOKENS])
    sizes = [len(text) for text in texts(prompt, Sentences(tokenizer())(prompt))]
    assert sizes == [MOST_TOKENS, MOST_TOKENS, 5, MOST_TOKENS]


def test_a_prompt_without_chunks_has_no_sentences() -> None:
    prompt = PromptBuilder(tokenizer()).build(query="Why?", chunks=[])
    assert set(Sentences(tokenizer())(prompt).tolist()) == {NONE}


def context_of(sentences: list[list[int]], query: list[int], scores: list[float] | None = None) -> FakeContext:
    tokens = sum(map(len, sentences))
    received = torch.zeros(8, 3 + tokens + len(query))
    if scores is not None:
        received[:, 3 : 3 + tokens] = torch.tensor(scores)
    context = FakeContext([[0.0] * len(s) for s in sentences], received)
    context.ids = np.array([90, 91, 92, *(t for s in sentences for t in s), *query])
    context.sentences = np.array([-1] * 3 + [n for n, s in enumerate(sentences) for _ in s] + [-1] * len(query))
    return context


# Forty sentences of five tokens. Tokens 7 to 9 are a name, which the first and the third have.
FORTY = [[1, 7, 8, 9, 2], [20, 21, 22, 23, 24], [1, 7, 8, 9, 4]] + [
    [100 * n + k for k in range(5)] for n in range(1, 38)
]
ATTENDED = [4.0] * 5 + [2.0] * 5 + [0.0] * 5 + [1.0] * 5 + [0.0] * 180


def test_a_sentence_that_the_query_names_is_chosen_whole_with_those_that_are_nearly_the_same() -> None:
    """The query attends to the first sentence, less to the second and the fourth, and passes by the third, which has the same name."""
    context = context_of(FORTY, [1, 7, 8, 9], ATTENDED)
    select = get_selector("expected_error").select
    assert sorted(select(context, 0.075).tolist()) == [*range(3, 18)]
    single = [*range(3, 13), *range(18, 23)]
    assert sorted(get_selector("expected_error_tokens").select(context, 0.075).tolist()) == single
    context.sentences[:] = -1  # token ids that spell no text
    assert sorted(select(context, 0.075).tolist()) == single


@pytest.mark.parametrize("query", [[50, 51, 52, 53], [7, 8, 60, 61], [9, 1, 7, 60]])
def test_without_evidence_single_tokens_are_chosen(query: list[int]) -> None:
    """A pair that a query has in common with a sentence by chance is no evidence that the sentence has to do with it."""
    context = context_of(FORTY, query, ATTENDED)
    assert sorted(get_selector("expected_error").select(context, 0.075).tolist()) == [*range(3, 13), *range(18, 23)]


def test_an_earlier_answer_is_no_question() -> None:
    """It quotes the fourth sentence, and the question behind it names the first."""
    quoted = FORTY[3]
    context = context_of(FORTY, [*quoted, 1, 7, 8, 9], ATTENDED)
    select = get_selector("expected_error").select
    first, third, fourth = range(3, 8), range(13, 18), range(18, 23)
    assert {*first, *fourth} <= set(select(context, 0.075).tolist())
    assert not set(third) <= set(select(context, 0.075).tolist())
    context.asked_from = len(context.ids) - 4
    assert sorted(select(context, 0.075).tolist()) == [*range(3, 18)]
    # A question that names nothing asks on.
    asks_on = context_of(FORTY, [1, 7, 8, 9, 50, 51, 52, 53], ATTENDED)
    asks_on.asked_from = len(asks_on.ids) - 4
    assert sorted(select(asks_on, 0.075).tolist()) == [*range(3, 18)]


def test_evidence_is_what_few_sentences_have() -> None:
    names = [[1, 2, 3, 4, n] for n in range(10, 14)]
    many = context_of([*names, *FORTY[3:]], [1, 2, 3, 4])
    few = context_of([names[0], *FORTY[3:]], [1, 2, 3, 4])

    def evidence(context: FakeContext) -> list[float]:
        return [
            float(x)
            for x in Links(context.ids, context.sentences, range(len(context.ids) - 4, len(context.ids))).evidence()[:4]
        ]

    assert evidence(few) == pytest.approx([1, 0, 0, 0])
    share = 1 - np.log(4) / np.log(41)  # of three pairs, each in four of 41 sentences
    assert evidence(many) == pytest.approx([share] * 4)


def test_a_sentence_is_found_by_a_name_in_another_one() -> None:
    """The query names (20, 21); this sentence names (5, 6); the next one has the number."""
    links = Links(
        np.array([20, 21, 5, 6, 30, 5, 6, 31, 40, 41, 42, 43, 20, 21]),
        np.array([0] * 4 + [1] * 4 + [2] * 4 + [-1] * 2),
        range(12, 14),
    )
    assert links.to_query().tolist() == [1, 0, 0]
    assert links.to_others(np.array([1.0, 0, 0])).tolist() == [0, 1, 0], "no sentence is found by itself"
    numbers = np.array([0] * 4 + [1] * 4 + [2] * 4 + [-1] * 2)
    assert sentence_scores(links, numbers, np.zeros(14, np.float32)).tolist() == pytest.approx([0.7, 0.49, 0])


def test_what_all_sentences_have_links_none() -> None:
    links = Links(np.array([1, 2, 3, 1, 2, 4, 1, 2]), np.array([0, 0, 0, 1, 1, 1, -1, -1]), range(6, 8))
    assert links.to_query().tolist() == [0, 0]
    assert links.to_others(np.array([1.0, 0])).tolist() == [0, 0]


def test_the_choice_is_that_of_a_plain_reference_and_grows_with_the_ratio() -> None:
    rng, by_sentences = random.Random(5), 0
    for _ in range(30):
        rows = [[rng.randrange(12) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 9))]
        query = [*rng.choice(rows)[:6], rng.randrange(12)]
        tokens = sum(map(len, rows))
        context = context_of(rows, query)
        scores = [rng.random() if rng.random() < 0.7 else 0.0 for _ in context.ids]
        can = sorted(rng.sample(range(3, 3 + tokens), rng.randint(1, tokens)))
        numbers = torch.tensor(scores)
        choice = SentenceChoice(context, torch.tensor(can)).by(numbers)
        before: set[int] = set()
        for count in range(len(can) + 1):
            found = choice.take(count).tolist()
            ids, sentences = context.ids.tolist(), context.sentences.tolist()
            assert sorted(found) == chosen(ids, sentences, numbers.double().tolist(), set(can), count)
            assert before <= set(found)
            before = set(found)
        by_sentences += isinstance(choice, WholeSentences)
    assert 5 < by_sentences < 30


def test_the_rest_of_a_cut_sentence_belongs_to_its_beginning() -> None:
    numbers = np.array([-1, 0, 0, 1, 1, -1, 2, 2, 3])
    assert joined(numbers, [(range(4, 6), range(6, 8))]).tolist() == [-1, 0, 0, 1, 1, -1, 1, 1, 3]
    assert joined(numbers, [(range(5, 6), range(6, 8))]).tolist() == numbers.tolist(), "nothing is stored of it"
    assert joined(numbers, [(range(2, 6), range(6, 8))]).tolist() == [-1, 0, 1, 1, 1, -1, 1, 1, 3], "a colon within"
    assert numbers.tolist() == [-1, 0, 0, 1, 1, -1, 2, 2, 3]
    long = np.array([0] * LONG + [1, -1, 2])
    assert joined(long, [(range(LONG + 2), range(LONG + 2, LONG + 3))]).tolist() == [0] * LONG + [1, -1, 1]


def test_links_lead_nowhere_without_sentences_or_without_a_query() -> None:
    empty = np.empty(0, np.int64)
    assert Links(empty, empty, range(0)).count == 0
    ends_in_a_chunk = Links(np.array([1, 2, 3]), np.array([-1, 0, 0]), range(3, 3))
    assert ends_in_a_chunk.to_query().tolist() == [0]
    one = SimpleNamespace(ids=np.array([1, 2, 3]), sentences=np.array([-1, 0, 0]), continuations=(), asked_from=0)
    choice = SentenceChoice(one, torch.tensor([1, 2]))  # type: ignore[arg-type]
    assert choice.by(torch.tensor([0.0, 0.1, 0.2])).take(1).tolist() == [2]
