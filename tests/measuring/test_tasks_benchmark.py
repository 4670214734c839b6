"""The benchmark of tasks: facts stand where prompts say, answers are checked right, figures are those of a calculation by hand."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.text.prompts.prompt import PromptBuilder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tasks
from fidelity import measures
from fidelity.answers import begin, finish, follow, greedy_answers, target_logits
from fidelity.evaluate import Engines
from fidelity.forms import FORMS
from fidelity.rows import key_of, read_rows
from fidelity.settings import Setting
from tasks_of import doubt, report
from tasks_of.evaluate import TaskRunner
from tasks_of.haystack import Haystack, file_sentences, reference_sentences
from tasks_of.kinds import KINDS
from tasks_of.layout import PLACES, lay_out
from tasks_of.names import Names
from tasks_of.prompts import Cell, Task, TaskMaker
from tasks_of.questions import Fact, Rule
from tasks_of.references import BFLOAT16, OTHER_ORDER, in_other_order, rounded_model
from tasks_of.settings import FULL, compared, title
from tasks_of.statistics import mcnemar, paired

LENGTH, CHUNK = 8192, 512
"""Of prompts and chunks. Here a token is a byte."""


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return reference_sentences()


def maker(sentences: list[str], place: str, **options: Any) -> TaskMaker:
    return TaskMaker(tokenizer(), sentences, [CHUNK], [place], **options)


# -- prompts ----------------------------------------------------------------------------------------------------------


def stands(chunk: str, text: str, place: str) -> bool:
    """Whether a text stands at a place of a chunk, with prose on the sides where there is to be some."""
    before, found, after = chunk.partition(text)
    return bool(found) and (place == "head") == (not before) and (place == "tail") == (not after)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_facts_of_every_kind_stand_where_the_prompt_says(sentences: list[str], kind: str, place: str) -> None:
    made = maker(sentences, place)
    for near in ("without", "with"):
        task = made.task(Cell(kind, LENGTH, near), 0)
        texts = [p.fact.text for p in task.planted]
        for planted in task.planted:
            chunks = [task.chunks[number] for number in planted.chunks]
            if planted.place == "split":
                first, second = planted.chunks
                assert second == first + 1
                assert chunks[0].endswith(" " + planted.fact.subject)
                assert chunks[1].startswith(planted.fact.rest + " ")
                assert len(chunks[0]) > len(planted.fact.subject) + 100
            else:
                assert stands(chunks[0], planted.fact.text, planted.place)
        needed = [p for p in task.planted if p.fact.needed]
        assert {p.place for p in needed} == {place}
        owned = [number for p in needed for number in p.chunks]
        assert len(owned) == len(set(owned))
        # Nothing stands anywhere else, and what is asked for stands nowhere but in the facts.
        for text in set(texts):
            whole = sum(chunk.count(text) for chunk in task.chunks)
            assert whole == sum(p.fact.text == text and p.place != "split" for p in task.planted)
        assert set(task.rule.wanted) <= task.rule.values
        said = " ".join(p.fact.text for p in needed)
        assert all(re.search(rf"\b{value}\b", said) for value in task.rule.wanted)
        assert not any(re.search(rf"\b{value}\b", task.query) for value in task.rule.values)


@pytest.mark.parametrize("kind", KINDS)
def test_near_duplicates_are_further_facts_with_other_values(sentences: list[str], kind: str) -> None:
    made = maker(sentences, "middle")
    without, with_ = (made.task(Cell(kind, LENGTH, near), 0) for near in ("without", "with"))
    assert len(with_.planted) >= len(without.planted) + 2
    assert sum(p.fact.needed for p in with_.planted) == sum(p.fact.needed for p in without.planted)
    assert len(with_.rule.wanted) == len(without.rule.wanted)
    assert len(with_.rule.values) > len(without.rule.values)


@pytest.mark.parametrize("hops", [2, 3, 4])
def test_a_chain_leads_from_the_question_to_the_number(sentences: list[str], hops: int) -> None:
    task = maker(sentences, "head").task(Cell(f"tracking_{hops}", LENGTH, "with"), 1)
    text = " ".join(task.chunks)
    name = re.search(r"safe of (\w+)", task.query)[1]  # type: ignore[index]
    steps = 1
    while link := re.search(rf"safe of {name} opens with the same number as the safe of (\w+)", text):
        name, steps = link[1], steps + 1
    assert steps == hops
    assert re.search(rf"safe of {name} opens with the number (\d+)", text)[1] == task.rule.wanted[0]  # type: ignore[index]


def test_the_common_word_is_named_most_often(sentences: list[str]) -> None:
    for near in ("without", "with"):
        task = maker(sentences, "tail").task(Cell("common_word", LENGTH, near), 0)
        named = re.findall(r"word of this passage is (\w+)", " ".join(task.chunks))
        assert [w for w in set(named) if named.count(w) == max(map(named.count, named))] == list(task.rule.wanted)


def test_prompts_fit_and_are_the_same_again(sentences: list[str]) -> None:
    cells = [Cell("several_keys", 4096, "with"), Cell("people", LENGTH, "without")]
    made, again, other = (TaskMaker(tokenizer(), sentences, [512, 1024], seed=seed) for seed in (0, 0, 1))
    for cell in cells:
        found = [made.task(cell, number) for number in range(8)]
        assert found == [again.task(cell, number) for number in reversed(range(8))][::-1]
        assert found[0] != other.task(cell, 0)
        assert {(t.chunk_tokens, t.place) for t in found} == {(c, p) for c in (512, 1024) for p in PLACES}  # in turn
        for task in found:
            prompt = made.prompt(task)
            assert 0.7 * cell.length < len(prompt.ids) <= cell.length - task.answer_tokens
            assert len(prompt.spans) == len(task.chunks)
            assert all(0.6 * task.chunk_tokens < len(c.encode()) <= task.chunk_tokens for c in task.chunks)
            assert not {c for c in task.chunks if any(lead[:100] in c for lead in made.dataset.leads)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["middle", "split"])
def test_a_form_asks_the_same_of_the_same_facts(sentences: list[str], form: str, place: str) -> None:
    made = maker(sentences, place)
    plain = made.task(Cell("tracking_2", LENGTH, "with"), 0)
    task = made.task(Cell("tracking_2", LENGTH, "with", form), 0)
    assert (task.query, task.rule, task.place, task.chunk_tokens) == (plain.query, plain.rule, plain.place, CHUNK)
    assert (task.name == plain.name, task.digest == plain.digest) == (form == "plain",) * 2
    prompt = made.prompt(task)
    assert prompt.chunk_texts == task.chunks
    text = tokenizer().decode(prompt.ids)
    assert text.rindex(f"Question: {task.query}") > max(text.rindex(chunk[-50:]) for chunk in task.chunks)
    for fact in (p.fact for p in task.planted):
        assert any(fact.subject in chunk for chunk in task.chunks)
        assert any(fact.rest in chunk for chunk in task.chunks)


def test_forms_are_what_their_names_say(sentences: list[str]) -> None:
    made = maker(sentences, "middle")
    forms = {form: made.task(Cell("tracking_2", LENGTH, "without", form), 0) for form in FORMS}
    plain = forms["plain"].chunks
    needed = [p.chunks[0] for p in forms["plain"].planted if p.fact.needed]
    windows = forms["overlapping"].chunks
    assert windows[0] == plain[0]
    for before, chunk, window in zip(plain, plain[1:], windows[1:], strict=False):
        ahead = window.removesuffix(" " + chunk)
        assert before.endswith(ahead)
        assert len(ahead) > len(before) / 5
    assert forms["twice"].chunks == (*plain, *(plain[i] for i in sorted(needed)))
    copies = forms["nearly_twice"].chunks[len(plain) :]
    for copy, number in zip(copies, sorted(needed), strict=True):
        facts = [p.fact.text for p in forms["plain"].planted if number in p.chunks]
        assert len(copy) < len(plain[number])
        assert not any(fact in copy for fact in facts)
        assert copy.split()[:3] == plain[number].split()[:3]
    before = forms["system_prompt"].before
    assert 1500 < len(before) < 2200
    assert not any(before[:100] in chunk for chunk in plain)
    assert tokenizer().decode(made.prompt(forms["system_prompt"]).ids).index(before) < 40
    said = forms["turns_after"].turns
    assert said[0].asked == "How does passage 1 begin?"
    assert len(said) == 3
    assert all(any(chunk.startswith(t.answered.split('"')[1]) for chunk in plain) for t in said)
    assert all(re.match(r"\| .* \|$", line) for chunk in forms["tables"].chunks for line in chunk.splitlines())
    assert sum("self." in chunk for chunk in forms["code"].chunks) > 3


def test_prose_of_files_may_be_of_any_language(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(
        "Der Hund schläft unter dem Tisch. Ähnlich schläft die Katze auf dem Bett.\n\n\n列表是一个可以改变的、有顺序的元素的集合，元素可以重复。它可以被修改，也可以被任意的排序和复制多次使用。"
    )
    assert file_sentences([path]) == [
        "Der Hund schläft unter dem Tisch.",
        "Ähnlich schläft die Katze auf dem Bett.",
        "列表是一个可以改变的、有顺序的元素的集合，元素可以重复。",
        "它可以被修改，也可以被任意的排序和复制多次使用。",
    ]


def test_chunks_are_in_any_order(sentences: list[str]) -> None:
    made = maker(sentences, "middle")
    found = [made.task(Cell("tracking_3", LENGTH, "without"), number) for number in range(12)]
    orders = {tuple(p.chunks[0] for p in task.planted if p.fact.needed) for task in found}
    assert len(orders) > 6
    assert {order == tuple(sorted(order)) for order in orders} == {True, False}
    prose = " ".join(s.text for s in made.haystack.sentences)
    places = [
        prose.find(sentence) for chunk in found[0].chunks for sentence in re.split(r"(?<=\.) (?=[A-Z])", chunk)[:1]
    ]
    assert [p for p in places if p >= 0] != sorted(p for p in places if p >= 0)


def test_what_does_not_fit_is_refused(sentences: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"tracking_4, 2,048 tokens, without near-duplicates: there is no room .* larger --lengths"
    ):
        maker(sentences, "split").task(Cell("tracking_4", 2048, "without"), 0)
    with pytest.raises(ValueError, match="2 chunks are needed for these facts, and there are 1"):
        lay_out([Fact("a", "b.")], "split", 1, 99, Haystack(sentences[:40], str.encode), str.encode, random.Random(0))
    with pytest.raises(ValueError, match="too few sentences"):
        TaskMaker(tokenizer(), sentences[:40], [CHUNK]).task(Cell("one_needle", LENGTH, "without"), 0)


def test_a_chunk_whose_whole_has_more_tokens_than_its_parts_takes_shorter_sentences(sentences: list[str]) -> None:
    def encode(text: str) -> list[str]:
        return [*text, *("joined" for _ in range(12 * text.count(". ")))]

    facts = [Fact("The safe of Garvemere opens with", f"the number {i}.") for i in range(10000, 10020)]
    haystack = Haystack(sentences, encode)
    for place in PLACES:
        chunks, planted = lay_out(facts, place, 40, 180, haystack, encode, random.Random(place))
        assert all(len(encode(chunk)) <= 180 for chunk in chunks)
        assert all(p.place == "split" or stands(chunks[p.chunks[0]], p.fact.text, place) for p in planted)


def test_names_are_new_and_like_names_are_alike() -> None:
    names = Names(random.Random(0), {"belanby"})
    made = [names.name() for _ in range(50)]
    like = [names.like(name) for name in made]
    assert len({*made, *like}) == 100
    assert "Belanby" not in {*made, *like}
    assert all(a[:4] == b[:4] for a, b in zip(made, like, strict=True))


def test_the_prose_is_whole_sentences(sentences: list[str]) -> None:
    assert len(sentences) == len(set(sentences)) > 800
    assert all(s[0].isupper() and 20 <= len(s) <= 300 for s in sentences)
    assert any("nonlocal" in s for s in sentences)


# -- answers ----------------------------------------------------------------------------------------------------------

ONE = Rule(("48213",), frozenset({"48213", "77120"}))
TWO = Rule(("48213", "77120"), frozenset({"48213", "77120", "10001"}), ordered=True)
THREE = Rule(("48213", "77120", "10001"), frozenset({"48213", "77120", "10001", "55555"}))
WORD = Rule(("candle",), frozenset({"candle", "handle"}))


@pytest.mark.parametrize(
    ("rule", "answer", "right"),
    [
        (ONE, "48213", True),
        (ONE, "The access code of the Bellinby depot is 48213.", True),
        (ONE, "It is 48,213.", True),
        (ONE, "48213\n\nThat of the other one is 77120.", True),  # it has answered by then
        (ONE, "77120", False),
        (ONE, "It is 77120 or 48213", False),
        (ONE, "482130", False),
        (ONE, "4821", False),
        (ONE, "48231, or 48213", False),  # a number that stands nowhere
        (ONE, "In 3 words: 48213", True),
        (ONE, "", False),
        (TWO, "48213 and 77120", True),
        (TWO, "48213, 48213 again, and 77120", True),
        (TWO, "77120 and 48213", False),
        (TWO, "48213", False),
        (TWO, "48213 and 10001", False),
        (THREE, "1. 10001\n2. 48213\n3. 77120", True),
        (THREE, "10001, 48213, 77120 and 55555", True),
        (THREE, "10001, 55555, 48213, 77120", False),
        (THREE, "10001, 48213", False),
        (WORD, "Candle!", True),
        (WORD, "the candles", False),
        (WORD, "handle, not candle", False),
    ],
)
def test_right_answers_are_told_from_wrong_ones(rule: Rule, answer: str, right: bool) -> None:
    assert rule.right(answer) == right


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(6, 1, 2 * (1 + 7) / 2**7), (5, 0, 2 / 2**5), (2, 8, 2 * (1 + 10 + 45) / 2**10), (1, 1, 1), (0, 0, 1)],
)
def test_mcnemars_test_is_that_of_the_binomial_distribution(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, abs=1e-15)


def test_kept_answers_are_those_that_both_have_right() -> None:
    found = paired([True, True, True, True, False, False], [True, True, True, False, True, False])
    assert (found.prompts, found.full, found.right, found.lost, found.gained, found.p) == (6, 4, 4, 1, 1, 1)
    assert found.kept.value == 3 / 4
    assert found.accuracy.value == pytest.approx(4 / 6)
    # Of two prompts drawn with replacement, both are the first in a quarter of all draws, and both the second in another.
    two = paired([True, True], [True, False])
    assert two.kept == measures.Estimate(0.5, 0, 1)
    assert paired([True] * 9, [True] * 9).kept == measures.Estimate(1, 1, 1)
    assert isnan(paired([False] * 3, [True] * 3).kept.value)
    with pytest.raises(ValueError, match="give both for each prompt"):
        paired([True], [])


def test_intervals_do_not_depend_on_how_many_records_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    above, below = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0] * 7
    whole = measures.ratio_of_sums(above, below)
    monkeypatch.setattr(measures, "_DRAWN_AT_ONCE", 7 * 333 + 1)
    assert measures.ratio_of_sums(above, below) == whole


def row(kind: str, number: int, setting: Setting, right: bool, **changes: Any) -> dict[str, Any]:
    named = {"set": kind, "record": f"{kind}-{number}", "digest": "d", "budget": "ratio", "near_duplicates": "without"}
    fields = {"lead_in": setting.lead_in, "codec": setting.codec, "selector": setting.selector, "ratio": setting.ratio}
    figures = {"length": 1024, "chunk_size": 128, "place": PLACES[number % 4], "compute": 0.1, "right": right}
    return named | fields | figures | changes


SETTING = Setting("auto", "exact", "frequency", 0.15)


def results() -> Iterator[dict[str, Any]]:
    for number in range(5):
        yield row("one_needle", number, FULL, number != 4)
        yield row("one_needle", number, SETTING, number in (0, 1, 4))
        yield row("tracking_4", number, FULL, number == 0)  # 20 %
        yield row("tracking_4", number, SETTING, True)
        yield row("people", number, FULL, number < 2)  # 40 %
    yield row("people", 0, SETTING, True)
    yield row("people", 9, SETTING, True)  # its full prefill is not there


def test_tables_show_what_is_kept_and_name_the_cells_that_are_left_out() -> None:
    text = report.markdown({"model": "m", "environment": {}}, list(results()))
    assert "15 prompts in 3 cells" in text
    assert "answers less than 40% right: tracking_4, 1,024 tokens, without near-duplicates (1 of 5)." in text
    # 4 of 5 of one_needle and the one prompt of people that both have: 5 right, of which 3 are kept, 2 lost; 1 is gained.
    assert "| `frequency` r 0.15 | 6 | 0.100 | 5 | 4 | 66.7 [" in text
    assert re.search(r"\| 60\.0 \[\d+, \d+\] \| 2 \| 1 \| 1 \|", text)
    assert "| setting | one_needle | people |" in text
    # What only full prefill was measured of isn't beside what is kept.
    assert "| full prefill right | 4 of 5 | 1 of 1 |" in text
    assert "Of 4 more prompts only full prefill was measured" in text
    assert re.search(r"\| `frequency` r 0\.15 \| 50\.0 \[\d+, \d+\] \| 100\.0 \[100, 100\] \|", text)
    assert "| tracking_4 | 1,024 | without | plain | 1 | 5 | 20 | left out |" in text
    assert "| people | 1,024 | without | plain | 2 | 5 | 40 |  |" in text


def test_answers_are_told_apart_by_how_sure_full_prefill_is() -> None:
    sure = [0.95, 0.9, 0.7, 0.2, 0.99]
    rows = [
        {**r, "sure": sure[int(r["record"][-1])]} if r["set"] == "one_needle" and r["lead_in"] == "auto" else r
        for r in results()
    ]
    text = report.markdown({"model": "m", "environment": {}}, rows)
    table = text.split("## Kept by how sure full prefill is of its answer's least likely token, %")[1].split("##")[0]
    assert "| setting | not known | 0.9 and more | 0.5 to 0.9 | below 0.5 |" in table
    assert "| full prefill right | 1 of 1 | 2 of 3 | 1 of 1 | 1 of 1 |" in table
    assert re.search(r"\| `frequency` r 0\.15 \|[^|]+\| 100\.0 \[[^|]+\| 0\.0 \[[^|]+\| 0\.0 \[[^|]+\|", table)
    assert "how sure" not in report.markdown({"model": "m", "environment": {}}, list(results()))


def said(right: bool, *sure: float, same: int) -> dict[str, Any]:
    """A row of a setting as far as it says how sure the model was."""
    return {"right": right, "sure_by_token": list(sure), "same_tokens": same, "compute": 0.25}


def test_answers_are_right_again_if_the_model_was_unsure_before_it_went_wrong() -> None:
    right, wrong = {"right": True}, {"right": False}
    pairs = [
        (right, said(True, 0.9, 0.9, same=2)),
        (right, said(True, 0.9, 0.6, same=2)),  # read again in vain
        (right, said(False, 0.9, 0.6, same=1)),  # at the token that differs
        (right, said(False, 0.6, 0.9, same=1)),  # and one before it
        (right, said(False, 0.9, 0.6, same=0)),  # too late
        (right, said(False, 0.9, 0.9, same=0)),  # wrong and sure
        (wrong, said(True, 0.6, same=0)),
        (wrong, said(False, 0.9, same=1)),
    ]
    every = doubt.read_again(pairs, 0.7)
    assert (every.prompts, every.again, every.compute) == (8, 5 / 8, 0.25 + 5 / 8)
    assert (every.kept.value, every.most) == (4 / 6, 5 / 6)
    assert every.chance == pytest.approx(2 / 6 + 4 / 6 * 5 / 8)
    first = doubt.read_again(pairs, 0.7, 1)
    assert (first.again, first.kept.value, first.most) == (2 / 8, 3 / 6, 3 / 6)
    nothing = doubt.read_again(pairs, 0.5)
    assert (nothing.again, nothing.kept.value, nothing.compute) == (0, 2 / 6, 0.25)
    assert [doubt.first_unsure(pairs[1][1], 0.7, tokens) for tokens in (None, 2, 1)] == [1, 1, None]
    # Lost answers: 0.6 three times, 0.9; kept ones: 0.9, 0.6.
    assert doubt.told_apart(pairs) == (3 * 1.5 + 0.5) / 8
    assert isnan(doubt.told_apart(pairs[:2]))
    assert isnan(doubt.read_again([(wrong, said(True, 0.9, same=0))], 0.7).most)


def test_tables_show_what_reading_again_brings() -> None:
    rows = [
        {**r, **said(r["right"], 0.95, 0.85 if r["record"][-1] == "2" else 0.999, same=1)}
        for r in results()
        if r["set"] == "one_needle"
    ]
    text = report.markdown({"model": "m", "environment": {}}, rows)
    assert "| `frequency` r 0.15 | the first | 0.50 | 0.9 | 0 | 50.0 [" in text
    # One of two lost answers is read again at its second token, which is the first that differs.
    assert re.search(
        r"\| `frequency` r 0\.15 \| all \| 0\.75 \| 0\.9 \| 20 \| 75\.0 \[\d+, \d+\] \| 75\.0 \| 60\.0 \| 0\.450 \|",
        text,
    )
    assert "Read again" not in report.markdown({"model": "m", "environment": {}}, list(results()))


def test_the_default_is_held_against_its_targets() -> None:
    default = Setting("auto", "exact", "expected_error", 0.15)
    rows = [*results(), *(row("one_needle", n, default, True) for n in range(5)), row("people", 0, default, True)]
    text = report.markdown({"model": "m", "environment": {}}, [*rows, row("people", 1, default, False)])
    assert re.search(
        r"\| `expected_error` r 0\.15 \| 83\.3 \[\d+, \d+\] \| 98 \| people: 50\.0 \[0, 100\] \| 93 \|", text
    )
    assert "was not measured at the ratios" in report.markdown({}, list(results()))


def test_settings_begin_with_full_prefill_and_have_nothing_twice() -> None:
    settings = compared(["expected_error", "frequency", "chunk_head"], (0.05, 0.3), ["auto"], ["exact", "int8"])
    assert settings[0] == FULL
    assert len(settings) == len(set(settings))
    assert {s.lead_in for s in settings[1:]} == {"auto"}
    assert [(s.selector, s.ratio) for s in settings if s.codec == "int8"] == [
        ("none", 0.0),
        ("expected_error", 0.05),
        ("frequency", 0.05),
    ]
    assert [title(s) for s in settings[:3]] == ["full prefill", "`none`", "`expected_error` r 0.05"]


# -- runs -------------------------------------------------------------------------------------------------------------


def own_answer(engine: CacheTune, tokens: int, **options: Any) -> str:
    """What the engine itself answers."""
    return engine.generate(max_new_tokens=tokens, do_sample=False, **options).text.strip()


@pytest.mark.parametrize("processed", [{}, {"repetition_penalty": 1.3}])
def test_answers_together_are_those_that_the_engine_gives(processed: dict[str, float]) -> None:
    model = llama()
    model.generation_config.update(**processed)
    with CacheTune(model, tokenizer(), None) as engine:
        engine.precompute(chunks := ["some passage, " * 4, "another one, " * 5])
        ways: list[dict[str, Any]] = [
            {"query": query, "chunks": some, "selector": selector, "ratio": ratio}
            for query, some in (
                ("what?", chunks),
                ("and what else is there?", chunks[:1]),
            )  # prompts of different lengths
            for selector, ratio in (("none", 0.0), ("frequency", 0.5))
        ]
        for tokens in (30, 9):
            expected = [own_answer(engine, tokens, **way) for way in ways]
            assert len(set(expected)) > 1
            assert greedy_answers(engine, [engine.prefill(**way) for way in ways], tokens) == expected


@pytest.mark.parametrize("processed", [{}, {"repetition_penalty": 1.3}])
def test_an_answer_that_follows_a_known_one_is_what_the_engine_gives(processed: dict[str, float]) -> None:
    model = llama()
    model.generation_config.update(**processed)
    ratios = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
    with CacheTune(model, tokenizer(), None) as engine:
        engine.precompute(chunks := ["some passage, " * 4, "another one, " * 5])
        made: dict[str, Any] = {"query": "what?", "chunks": chunks}
        known = begin(engine, engine.full_prefill(**made), 30)
        finish(engine, [known], 1)
        states = [engine.prefill(**made, selector="frequency", ratio=ratio) for ratio in ratios]
        answers, logits = follow(engine, states, known)
        same = [answer.tokens == known.tokens for answer in answers]
        assert same[-1]
        assert not all(same)
        for answer, row in zip(answers, logits, strict=True):
            told = [a == b for a, b in zip(answer.tokens, known.tokens, strict=False)]
            assert all(told[:-1])
            assert told[-1] == (answer.tokens == known.tokens)
            assert row.shape == (len(known.tokens), engine.adapter.config.vocab_size)
        assert len({len(answer.tokens) for answer in answers}) > 2  # they part from it at different places
        finish(engine, answers, 3)
        for ratio, answer in zip(ratios, answers, strict=True):
            assert answer.text() == own_answer(engine, 30, **made, selector="frequency", ratio=ratio)
            (alone,) = target_logits(engine, [states[ratios.index(ratio)]], answer.tokens)
            assert answer.sure == pytest.approx(alone.softmax(-1).amax(-1).tolist(), abs=1e-5)
        assert all(state.cache.get_seq_length() == len(state.prompt.ids) for state in states)


def task_of(made: TaskMaker) -> Task:
    return made.task(Cell("one_needle", 2048, "without"), 0)


def test_a_prompt_that_is_cut_off_goes_on_where_it_was(sentences: list[str]) -> None:
    made, model = maker(sentences, "head"), llama()
    settings = compared(["expected_error", "frequency"], (0.15,), ["auto"], ["exact", "int8"])
    task = task_of(made)

    def run(known: dict[Any, Any]) -> Iterator[dict[str, Any]]:
        with closing(Engines(model, tokenizer())) as engines:
            yield from TaskRunner(engines, made, settings, together=2).run([task], known)

    whole = list(run({}))
    assert [Setting(r["lead_in"], r["codec"], r["selector"], r["ratio"]) for r in whole] == settings
    assert all(r["right"] == task.rule.right(r["answer"]) for r in whole)
    assert whole[0]["compute"] == 1
    known = {key_of(r): r for r in islice(run({}), 3)}
    assert [*known.values(), *run(known)] == whole
    assert list(run({key_of(r): r for r in whole})) == []


def test_prompts_of_a_group_have_the_rows_that_they_have_alone(sentences: list[str]) -> None:
    made, model = TaskMaker(tokenizer(), sentences, [512, 256], PLACES), llama()
    settings = compared(["expected_error", "frequency"], (0.15,), ["auto"], ["exact"])
    tasks = [made.task(Cell("several_keys", 2048, "without"), number) for number in range(4)]
    assert len({len(made.prompt(task).ids) for task in tasks}) == 4

    def rows(groups: list[list[Task]], together: int, known: dict[Any, Any]) -> dict[Any, dict[str, Any]]:
        with closing(Engines(model, tokenizer())) as engines:
            runner = TaskRunner(engines, made, settings, together)
            return {key_of(row): row for group in groups for row in runner.run(group, known)}

    alone = rows([[task] for task in tasks], 1, {})
    together = rows([tasks], 3, {})
    assert alone.keys() == together.keys()
    for key, row in alone.items():
        assert together[key] == row | {
            name: pytest.approx(row[name], abs=2e-6) for name in ("kl", "sure", "sure_by_token") if name in row
        }
    some = list(alone)[::3]
    rest = rows([tasks], 3, {key: alone[key] for key in some})
    assert rest.keys() == alone.keys() - set(some)
    assert {key: row["answer"] for key, row in rest.items()} == {key: alone[key]["answer"] for key in rest}


def test_groups_have_every_prompt_once_and_every_process_some_of_each_cell() -> None:
    cells = [Cell(kind, length, "with") for kind in ("one_needle", "people") for length in (1024, 8192)]
    made = tasks.groups(cells, range(3, 40), 8)
    assert sorted((cell, n) for cell, numbers in made for n in numbers) == sorted(
        (c, n) for c in cells for n in range(3, 40)
    )
    assert all(len(numbers) * cell.length <= tasks.GROUP_TOKENS for cell, numbers in made)
    assert all({cell for cell, _ in made[shard::2]} == set(cells) for shard in range(2))
    assert len(tasks.groups(cells, range(4), 1)) == 16


def test_kl_is_that_over_the_answer_of_full_prefill(sentences: list[str]) -> None:
    made, model = maker(sentences, "tail"), llama()
    settings = [FULL, *(Setting("first_token", "exact", *each) for each in (("none", 0.0), ("all", 1.0)))]
    with closing(Engines(model, tokenizer())) as engines:
        full, nothing, everything = TaskRunner(engines, made, settings, together=2).run([task_of(made)], {})
    assert "kl" not in full
    assert nothing["kl"] > 1e-3
    assert everything["kl"] == pytest.approx(0, abs=1e-8)
    assert everything["answer"] == full["answer"]
    assert 0 < nothing["sure"] < 1
    assert nothing["sure"] == pytest.approx(everything["sure"])
    assert full["same_tokens"] == everything["same_tokens"] == len(full["sure_by_token"]) > nothing["same_tokens"]
    assert everything["sure_by_token"] == pytest.approx(full["sure_by_token"], abs=1e-5)
    assert all(0 < sure <= 1 for sure in nothing["sure_by_token"])


def test_full_prefill_answers_as_the_engine_does(sentences: list[str]) -> None:
    made, model = maker(sentences, "tail"), llama()
    task = task_of(made)
    with closing(Engines(model, tokenizer())) as engines:
        (found,) = TaskRunner(engines, made, [FULL]).run([task], {})
    with CacheTune(model, tokenizer(), None) as engine:
        prompt = PromptBuilder(tokenizer()).build(query=task.query, chunks=task.chunks)
        answer = engine.generate(prompt=prompt, reuse=False, max_new_tokens=task.answer_tokens, do_sample=False)
    assert found["answer"] == answer.text.strip()


def test_another_order_has_the_same_chunks_and_keeps_split_facts_together(sentences: list[str]) -> None:
    for place in PLACES:
        task = maker(sentences, place).task(Cell("tracking_3", LENGTH, "with"), 0)
        other = in_other_order(task)
        assert sorted(other.chunks) == sorted(task.chunks)
        assert other.chunks != task.chunks
        assert in_other_order(task) == other
        for planted in (p for p in task.planted if len(p.chunks) == 2):
            first, second = (other.chunks.index(task.chunks[number]) for number in planted.chunks)
            assert second == first + 1
    with pytest.raises(ValueError, match="only plain prompts"):
        in_other_order(maker(sentences, "tail").task(Cell("one_needle", LENGTH, "without", "twice"), 0))


def test_full_prefill_once_more_answers_as_the_engine_does(sentences: list[str]) -> None:
    made, model = maker(sentences, "split"), llama()
    task, rounded = task_of(made), rounded_model(model)
    settings = compared(["frequency"], (0.15,), ["auto"], ["exact"], ["other_order", "bfloat16"])
    assert settings[:3] == [FULL, OTHER_ORDER, BFLOAT16]
    with closing(Engines(model, tokenizer())) as engines, closing(Engines(rounded, tokenizer())) as other:
        found = list(TaskRunner(engines, made, settings, rounded=other).run([task], {}))
    assert [Setting(r["lead_in"], r["codec"], r["selector"], r["ratio"]) for r in found] == settings
    assert next(model.parameters()).dtype != next(rounded.parameters()).dtype
    for row, ran, chunks in ((found[1], model, in_other_order(task).chunks), (found[2], rounded, task.chunks)):
        with CacheTune(ran, tokenizer(), None) as engine:
            prompt = PromptBuilder(tokenizer()).build(query=task.query, chunks=chunks)
            answer = engine.generate(prompt=prompt, reuse=False, max_new_tokens=task.answer_tokens, do_sample=False)
        assert row["answer"] == answer.text.strip()
        assert row["compute"] == 1


def test_a_run_is_cut_off_by_time_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = "--lengths 2048 --chunk-tokens 512 --kinds one_needle tracking_2 --near-duplicates with --prompts 2 --device cpu"
    more = f"--ratios 0.15 --selectors frequency --commit c --model {tmp_path / 'model'} --out {tmp_path / 'out'}"

    def run(*further: str) -> list[dict[str, Any]]:
        tasks.main([*words.split(), *more.split(), *further])
        return read_rows(tmp_path / "out" / "rows-0of1.jsonl")[1]

    first = run("--seconds", "0")
    assert len(first) == 3  # of the prompt under way when the time was over
    assert "the same command goes on" in capsys.readouterr().err
    rows = run()
    assert rows[:3] == first
    assert len(rows) == 2 * 2 * 3  # kinds, prompts, settings
    assert len({key_of(r) for r in rows}) == len(rows)
    assert [r["set"] for r in rows[::3]] == ["one_needle", "tracking_2", "tracking_2", "one_needle"]  # in turn
    assert run() == rows
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out
    tasks.main(["--report", str(tmp_path / "out")])
    assert "4 prompts in 2 cells" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds results of other settings"):
        run("--seed", "1")
    with pytest.raises(SystemExit, match="this model reads at most 2048 tokens"):
        run("--lengths", "2048", "4096")
    # Nothing is measured before it is known that all prompts can be made.
    with pytest.raises(SystemExit, match=r"prompt 0 of tracking_2, .*few sentences .* larger --chunk-tokens"):
        run("--chunk-tokens", "120", "--out", str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()


def test_the_quick_form_changes_defaults_only() -> None:
    args = tasks.arguments(["--quick", "--prompts", "7"])
    assert (args.prompts, args.lengths, args.kinds) == (7, [1024], list(KINDS))
    full = tasks.arguments([])
    assert (full.prompts, full.lengths, full.ratios) == (100, [1024, 2048, 4096, 8192], [0.02, 0.05, 0.15, 0.30])
    assert full.selectors == ["expected_error", "frequency", "chunk_head", "kv_deviation"]
    with pytest.raises(SystemExit):
        tasks.arguments(["--shard", "2"])
