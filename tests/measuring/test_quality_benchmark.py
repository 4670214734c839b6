"""The fidelity benchmark: its measures against plain NumPy, its readers on small files, and that a cut-off run continues."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality
from fidelity import measures, report
from fidelity.answers import greedy_answers, target_logits
from fidelity.answers_report import by_answers, changes
from fidelity.documents import Shape, read_documents, shuffled
from fidelity.evaluate import Engines, Evaluator, equal_compute_ratio, partly_stored
from fidelity.measures import behind
from fidelity.musique import LEADS, read_musique, read_questions
from fidelity.orders import in_orders, mean_of_orders
from fidelity.records import Dataset, Record
from fidelity.rows import RowFile, key_of, read_rows
from fidelity.settings import BASELINE, Setting, compared_selectors, grid
from fidelity.sources import Text, folder_sources, html_text, installed_sources
from reader import compare

# -- measures ---------------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def test_distance_is_that_of_plain_numpy() -> None:
    rng = np.random.default_rng(0)
    full, reuse = rng.normal(size=(2, 5, 11)) * 3
    reuse[0, full[0].argmax()] = 99  # one token at which the first choice is certainly the same
    target = [3, 0, 10, 7, 7]
    p, q = softmax(full), softmax(reuse)
    found = measures.distance(torch.tensor(full), torch.tensor(reuse), target)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-9)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.top1_first == 1
    rows = np.arange(5)
    assert found.nll == pytest.approx(-np.log(q[rows, target]).mean(), rel=1e-9)
    assert found.nll_difference == pytest.approx(np.log(p[rows, target] / q[rows, target]).mean(), rel=1e-9)


def test_the_same_logits_are_no_distance_apart() -> None:
    logits = torch.randn(4, 9)
    found = measures.distance(logits, logits, [0, 1, 2, 3])
    assert (found.kl, found.top1, found.top1_first, found.nll_difference) == (0, 1, 1, 0)
    with pytest.raises(ValueError, match="3 target tokens"):
        measures.distance(logits, logits, [0, 1, 2])


@pytest.mark.parametrize(
    ("answer", "accepted", "f1", "em"),
    [
        ("The Harbour College.", ["Harbour College"], 1, 1),
        ("Harbour", ["Harbour College"], 2 / 3, 0),
        ("at Harbour College in Oxford", ["Balliol", "Harbour College"], 4 / 7, 0),
        ("no no", ["no"], 2 / 3, 0),
        ("", ["x"], 0, 0),
        ("the", ["A"], 1, 1),
    ],
)
def test_answers_are_scored_as_squad_does(answer: str, accepted: list[str], f1: float, em: float) -> None:
    assert measures.f1(answer, accepted) == pytest.approx(f1)
    assert measures.exact_match(answer, accepted) == em


def test_share_closed_is_a_ratio_of_sums_with_a_repeatable_interval() -> None:
    nothing = [0.5, 0.1, 0.4, 0.9, 0.2]
    kl = [0.25, 0.2, 0.1, 0.1, 0.0]
    share = measures.share_closed(kl, nothing)
    assert share.value == pytest.approx(1 - sum(kl) / sum(nothing))
    assert share.low < share.value < share.high
    assert measures.share_closed(kl, nothing) == share
    assert measures.share_closed([0, 0], [1, 2]) == measures.Estimate(1, 1, 1)
    assert np.isnan(measures.share_closed([0, 0], [0, 0]).value)
    # Records are drawn, each with both its numbers: if all have the same share, there is nothing to be unsure of.
    same = measures.share_closed([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert (same.low, same.high) == pytest.approx((0.5, 0.5))


def test_the_interval_of_a_mean_covers_what_it_should() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = measures.mean(values.tolist())
    spread = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.03)


def test_equal_compute_takes_the_probe_out_of_the_budget() -> None:
    assert equal_compute_ratio(0.15, 300, 30 * 1000) == pytest.approx(0.14)
    assert equal_compute_ratio(0.15, 0, 1000) == 0.15
    assert equal_compute_ratio(0.05, 100, 1000) == 0


@pytest.mark.parametrize(("share", "stored"), [(1.0, 5), (0.8, 4), (0.5, 2), (0.0, 1)])
def test_a_part_of_the_chunks_is_new_text(share: float, stored: int) -> None:
    prompt = prompt_of_ids(range(100), [IdSpan(start, start + 15, start) for start in range(5, 100, 20)])
    few = partly_stored(prompt, share, "a record")
    assert few.ids == prompt.ids
    assert len(few.spans) == stored
    assert set(few.spans) <= set(prompt.spans)
    assert list(few.spans) == sorted(few.spans, key=lambda span: span.start)
    assert few == partly_stored(prompt, share, "a record")


# -- readers ----------------------------------------------------------------------------------------------------------


def question(i: int) -> dict[str, object]:
    return {
        "id": f"q{i}",
        "question": f"Who is {i}?",
        "answers": [f"number {i}", "nobody"],
        "passages": [{"title": "", "text": f"text {i}"}, {"title": "Title", "text": f"more {i}"}],
    }


def original(i: int, answerable: bool = True) -> dict[str, object]:
    """A record under MuSiQue's own field names."""
    return {
        "id": f"q{i}",
        "question": f"Who is {i}?",
        "answer": f"number {i}",
        "answer_aliases": ["nobody"],
        "answerable": answerable,
        "paragraphs": [
            {"idx": 0, "title": "", "paragraph_text": f"text {i}", "is_supporting": True},
            {"idx": 1, "title": "Title", "paragraph_text": f"more {i}", "is_supporting": False},
        ],
    }


def test_musique_is_read_under_both_names_and_zipped(tmp_path: Path) -> None:
    count = LEADS + 3
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(question(i)) for i in range(count)))
    lines = [original(-1, answerable=False), *(original(i) for i in range(count))]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)) + "\n\n")
    ours = read_musique(tmp_path / "a.jsonl", tokenizer(), first=1, count=2)
    assert ours == read_musique(tmp_path / "b.jsonl.gz", tokenizer(), first=1, count=2)
    first = ours.records[0]
    assert (first.name, first.query, first.chunks) == ("q1", "Who is 1?", ("text 1", "Title\nmore 1"))
    assert first.target == (*PromptBuilder(tokenizer()).encode("number 1"), tokenizer().eos_token_id)
    assert first.answers == ("number 1", "nobody")
    assert read_musique(tmp_path / "a.jsonl", tokenizer(), count=1, passages=1).records[0].chunks == ("text 0",)
    used = {chunk for record in ours.records for chunk in record.chunks}
    assert ours.leads[:3] == ("text 3", "Title\nmore 3", "text 4")
    assert used.isdisjoint(ours.leads)
    assert ours.spare == ()  # two passages of each of the last questions are for lead-ins
    few = read_musique(tmp_path / "a.jsonl", tokenizer(), first=1, count=2, passages=1)
    assert few.spare == tuple(f"Title\nmore {i}" for i in range(3, count))
    shared = [
        question(i) | {"passages": question(0)["passages"]} if i == count - 1 else question(i) for i in range(count)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, shared)))
    assert not {"text 0", "Title\nmore 0"} & set(read_musique(tmp_path / "c.jsonl", tokenizer(), count=1).leads)


def test_what_a_question_goes_through_is_read_under_both_names(tmp_path: Path) -> None:
    line = {"question": "Where is what Ines founded?", "answers": ["Évora"], "passages": []}
    parts = [{"question": "Ines >> founded", "answer": "the Mill"}, {"question": "#1 >> place", "answer": "Évora"}]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps(line | more) for more in ({}, {"steps": ["the Mill"]}, {"question_decomposition": parts}))
    )
    assert [asked.steps for asked in read_questions(path)] == [[], ["the Mill"], ["the Mill"]]


def test_musique_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question(0)) + '\n{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"line 2 is no MuSiQue record .*answers, or answer and answer_aliases"):
        read_musique(path, tokenizer())
    path.write_text("\n".join(json.dumps(question(i)) for i in range(LEADS + 2)))
    with pytest.raises(ValueError, match="ask for at most 1 "):
        read_musique(path, tokenizer(), first=1, count=2)


def words(name: str, count: int) -> Text:
    return Text(name, "".join(f"{name} word{i}{'.' * (i % 3)}\n" if i % 5 == 0 else f"w{i}  x" for i in range(count)))


SHAPE = Shape(chunks=3, chunk_tokens=40, query_tokens=10, target_tokens=12)


def test_documents_are_cut_into_what_follows_one_another() -> None:
    sources = {"one": [words(f"a{i}", 200) for i in range(6)], "two": [words(f"b{i}", 200) for i in range(6)]}
    found = read_documents(sources, tokenizer(), SHAPE, first=1, count=6)
    assert found == read_documents(sources, tokenizer(), SHAPE, first=1, count=6)
    assert found != read_documents(sources, tokenizer(), SHAPE, first=1, count=6, seed=1)
    assert {r.source for r in found.records} == {"one", "two"}
    texts = {f"{source}/{t.name}": t.text for source, all_ in sources.items() for t in all_}
    for record in found.records:
        text = texts[record.name.split("@")[0]]
        run = "".join(record.chunks) + record.query + tokenizer().decode(record.target)
        assert run in text
        assert len(record.chunks) == 3
        assert all(40 - 32 < len(chunk) <= 40 + 2 for chunk in record.chunks)  # here a token is a byte
        assert len(record.target) == 12
        assert not any(lead in text for lead in found.leads)


def test_the_shuffled_form_keeps_the_last_chunk() -> None:
    documents = read_documents({"one": [words(f"a{i}", 400) for i in range(6)]}, tokenizer(), SHAPE, count=4)
    mixed = shuffled(documents, 2)
    assert len(mixed.records) == 2
    for before, after in zip(documents.records, mixed.records, strict=False):
        assert sorted(before.chunks) == sorted(after.chunks)
        assert (before.chunks[-1], before.query, before.target) == (after.chunks[-1], after.query, after.target)
        assert before.chunks != after.chunks


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer or shorter chunks"):
        read_documents({"one": [Text("a", "short")]}, tokenizer(), SHAPE)
    with pytest.raises(ValueError, match=r"documents \(one\) has"):
        read_documents({"one": [words(f"a{i}", 200) for i in range(3)]}, tokenizer(), SHAPE, count=40)


def test_a_prompt_of_documents_ends_where_the_target_goes_on() -> None:
    documents = read_documents({"one": [words(f"a{i}", 200) for i in range(6)]}, tokenizer(), SHAPE, count=1)
    record, prompts = documents.records[0], PromptBuilder(tokenizer(), chunk_separator=documents.separator)
    prompt = documents.prompt(prompts, record)
    run = "".join(record.chunks) + record.query
    assert tokenizer().decode(prompt.ids).endswith(run)
    assert len(prompt.spans) == len(record.chunks)


def test_sources_of_this_machine_and_of_folders(tmp_path: Path) -> None:
    sources = installed_sources()
    assert all(any(len(text.text) > 2000 for text in islice(texts, 400)) for texts in sources.values())
    folder = tmp_path / "manual"
    (folder / "html").mkdir(parents=True)
    (folder / "html" / "a.html").write_text(
        "<head><title>no</title></head><body><nav>no</nav><p>One &amp; two</p>x</body>"
    )
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write("plain")
    (folder / "c.png").write_bytes(b"\0")
    assert list(folder_sources([folder])["manual"]) == [Text("b.txt.gz", "plain"), Text("html/a.html", "One & two\nx")]
    with pytest.raises(ValueError, match="is no folder"):
        folder_sources([folder / "b.txt.gz"])
    assert html_text("<script>if (a < b) {}</script>y<br>z") == "y\nz"


# -- settings and rows ------------------------------------------------------------------------------------------------


def test_the_grid_has_every_setting_once() -> None:
    settings = grid(compared_selectors(), (0.05, 0.15, 1), ("first_token", "auto"), ("exact", "int8"))
    assert len(settings) == len(set(settings))
    assert settings[0] == BASELINE
    assert {"frequency", "probe", "random", "chunk_head"} <= {s.selector for s in settings}
    assert {s.ratio for s in settings if s.selector == "probe"} == {0.05, 0.15}
    assert {s.selector for s in settings if s.codec == "int8"} >= {"frequency", "none"}
    assert {s.lead_in for s in settings if s.codec == "int8"} == {"auto"}


def row(record: str, **changes: object) -> dict[str, object]:
    base = {"set": "musique", "record": record, "digest": "d", "source": "s", "budget": "ratio", "probed": 0}
    setting = {"lead_in": "first_token", "codec": "exact", "selector": "none", "ratio": 0.0}
    figures = {"compute": 0.0, "kl": 0.5, "top1": 0.5, "top1_first": 1, "nll_difference": 0.1}
    return base | setting | figures | changes


def test_rows_survive_a_kill_and_other_shards_are_seen(tmp_path: Path) -> None:
    header = {"model": "m", "environment": {"date": "1"}}
    rows = RowFile(tmp_path, 0, 2, header)
    rows.add(row("a"))
    rows.add(row("b"))
    rows.close()
    path = tmp_path / "rows-0of2.jsonl"
    path.write_bytes(path.read_bytes()[:-7])  # killed in the middle of a line
    other = RowFile(tmp_path, 1, 2, header | {"environment": {"date": "2"}})
    assert set(other.known) == {key_of(row("a"))}
    other.add(row("c"))
    again = RowFile(tmp_path, 0, 2, header)
    assert set(again.known) == {key_of(row("a")), key_of(row("c"))}
    again.add(row("b"))
    again.close()
    other.close()
    assert [r["record"] for r in read_rows(path)[1]] == ["a", "b"]
    with pytest.raises(ValueError, match="model is 'm' there and 'other' now"):
        RowFile(tmp_path, 0, 1, {"model": "other"})


# -- one record through the engine --------------------------------------------------------------------------------------


def dataset() -> Dataset:
    chunks = tuple(f"passage {i}: " + " ".join(f"{i * j} is {j}" for j in range(9)) for i in range(3))
    target = tuple(PromptBuilder(tokenizer()).encode("seven"))
    return Dataset("musique", (Record("r", "s", chunks, "which?", target, ("seven",)),), ("lead " * 300,), "Read.")


SETTINGS = grid(["probe", "frequency"], (0.3,), ("first_token",), ("exact", "int8"))


def test_a_record_gives_a_row_for_every_setting() -> None:
    data, engines = dataset(), Engines(llama(), tokenizer())
    evaluator = Evaluator(engines, data, SETTINGS, answer_ratios=(0.0, 1.0))
    rows = list(evaluator.run(data.records[0], {}))
    engines.close()
    found = {(r["codec"], r["selector"], r["ratio"], r["budget"]): r for r in rows}
    assert len(found) == len(rows)
    everything, nothing = found["exact", "all", 1.0, "ratio"], found["exact", "none", 0.0, "ratio"]
    assert everything["kl"] == pytest.approx(0, abs=1e-9)
    assert (everything["top1"], everything["compute"], everything["em_full"]) == (1, 1, 1)
    assert nothing["kl"] > 1e-6
    assert nothing["compute"] == 0
    plain, paid = found["exact", "probe", 0.3, "ratio"], found["exact", "probe", 0.3, "compute"]
    assert plain["compute"] > 0.3 >= paid["compute"]
    assert paid["recomputed"] < plain["recomputed"]
    assert paid["compute"] > 0.3 - 1 / paid["chunk_tokens"] - 1e-9  # off by less than one token
    assert len(everything["answer"]) > 3
    assert ("exact", "frequency", 0.3, "compute") not in found  # it costs nothing to choose
    assert found["int8", "none", 0.0, "ratio"]["kl"] != nothing["kl"]


def test_answers_have_as_many_tokens_as_are_asked_for_and_only_what_is_behind_the_steps_is_scored() -> None:
    data, model = dataset(), llama()
    found = {}
    for tokens, mark in ((16, None), (4, None), (16, "mark")):
        mark = mark and found[16, None]["answer"][3]  # a character of what this model says
        evaluator = Evaluator(Engines(model, tokenizer()), data, SETTINGS, (1.0,), 1, 1.0, tokens, mark)
        (found[tokens, mark and "mark"],) = (r for r in evaluator.run(data.records[0], {}) if r["selector"] == "all")
    whole = found[16, None]["answer"]
    assert whole.startswith(found[4, None]["answer"])
    assert len(found[4, None]["answer"]) <= 4 < len(whole)  # a token is a byte here
    assert found[16, "mark"]["answer"] == whole
    assert found[16, "mark"]["f1_full"] == 1


@pytest.mark.parametrize(
    ("answer", "mark", "expected"),
    [
        ("Thomas Nabbes; Exeter College", ";", "Exeter College"),
        ("a; b; c", ";", "c"),
        ("Exeter College", ";", "Exeter College"),
        ("Thomas Nabbes;", ";", ""),  # cut off before the answer
        ("a; b", None, "a; b"),
    ],
)
def test_an_answer_stands_behind_its_steps(answer: str, mark: str | None, expected: str) -> None:
    assert behind(answer, mark) == expected


def test_questions_in_other_orders_are_the_same_questions() -> None:
    data = dataset()
    first, second, third = in_orders(data, 3)
    assert first == data
    assert [each.name for each in (second, third)] == ["musique_order_2", "musique_order_3"]
    assert len({each.records[0].chunks for each in (first, second, third)}) > 1
    for each in (second, third):
        assert each.digest == data.digest
        assert sorted(each.records[0].chunks) == sorted(data.records[0].chunks)
        assert replace(each.records[0], chunks=data.records[0].chunks) == data.records[0]
    assert in_orders(data, 3) == [first, second, third]
    assert quality.digests([first, second, third]) == quality.digests([first]), "orders can be added to a folder later"


def answered(record: str, value: float, **changes: object) -> dict[str, object]:
    return row(record, f1=value, em=float(value == 1), f1_full=value, em_full=float(value == 1), nll=1.0) | changes


def test_a_question_counts_once_whatever_the_number_of_its_orders() -> None:
    rows = [answered("a", 1.0), answered("b", 0.0), answered("c", 1.0)]
    rows += [answered("a", 0.5, set="musique_order_2", kl=0.3), answered("b", 0.25, set="musique_order_2", kl=0.1)]
    a, b = mean_of_orders(rows)  # of c one order is missing
    assert (a["set"], a["record"], a["f1"], a["em"], a["kl"]) == ("musique, mean over orders", "a", 0.75, 0.5, 0.4)
    assert (b["f1"], b["kl"]) == (0.125, 0.3)
    assert mean_of_orders(rows[:3]) == []
    assert mean_of_orders([row("a"), row("a", set="documents")]) == []


def test_answers_are_compared_in_pairs() -> None:
    full = {"selector": "all", "ratio": 1.0}
    default = {"selector": "expected_error", "ratio": 0.15, "lead_in": "auto", "probed": 9}
    values = ((1.0, 1.0), (1.0, 0.5), (0.0, 1.0), (0.0, 0.0))
    rows = [answered(f"r{i}", a, **full) for i, (a, _) in enumerate(values)]
    rows += [answered(f"r{i}", b, **default) for i, (_, b) in enumerate(values)]
    rows += [answered(f"r{i}", 0.0, **default, budget="compute") for i in range(4)]
    lines = [line for line in by_answers(rows).splitlines() if line.startswith("| `") or line.startswith("| full")]
    assert lines[0].startswith("| full prefill | 4 | 0.500 [")
    cells = [cell.strip() for cell in lines[1].split("|")[1:-1]]
    assert cells[:2] == ["`expected_error` r 0.15", "4"]
    assert cells[2].startswith("0.625 [")
    assert cells[4].startswith("+0.125 [")
    assert cells[5:7] == ["1 of 2", "1"]
    assert by_answers(results()) == ""
    after = [{**each, "f1": 1.0, "em": 1.0} for each in rows[:3]] + [{**rows[3], "digest": "other text"}]
    table = changes(rows, after).splitlines()
    assert len(table) == 3
    assert "| musique | full prefill | 3 | 0.667 [" in table[2]
    assert "| 1.000 [1.000, 1.000] | +0.333 [" in table[2]
    with pytest.raises(ValueError, match="no answer to the same question"):
        changes(rows, [{**each, "record": "another"} for each in after])


def test_two_folders_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        rows = RowFile(tmp_path / name, 0, 1, {"model": name, "commit": "c"})
        rows.add(answered("r", value, selector="all", ratio=1.0))
        rows.close()
    compare.main(["--before", str(tmp_path / "base"), "--after", str(tmp_path / "tuned")])
    said = capsys.readouterr().out
    assert "Before: base, commit c. After: tuned, commit c." in said
    assert "| musique | full prefill | 1 | 0.000 [0.000, 0.000] | 1.000 [1.000, 1.000] | +1.000" in said
    with pytest.raises(SystemExit, match="holds no results"):
        compare.main(["--before", str(tmp_path / "none"), "--after", str(tmp_path / "tuned")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--answers --answer-tokens 0", "--answer-tokens is 0: use 1 or more"),
        ("--answers --steps-end=", "--steps-end is '': use a mark that stands behind the steps"),
        ("--steps-end ;", "--answer-tokens and --steps-end are of answers: ask for them by --answers"),
        ("--orders 2", "--orders is 2, and passages of questions alone are put in other orders: give --musique"),
        ("--orders 0", "--orders is 0: use 1 or more"),
    ],
)
def test_what_has_nothing_to_work_on_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.arguments(["--out", "made", *words.split()])
    assert message in " ".join(capsys.readouterr().err.split())


def test_targets_together_give_what_one_by_one_gives() -> None:
    data, model = dataset(), llama()
    alone, together = (
        list(Evaluator(Engines(model, tokenizer()), data, SETTINGS, together=count).run(data.records[0], {}))
        for count in (1, 4)
    )
    assert [key_of(row) for row in together] == [key_of(row) for row in alone]
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=1e-6)


def test_a_run_that_is_cut_off_continues_where_it_was() -> None:
    data, model = dataset(), llama()

    def fresh() -> Evaluator:
        return Evaluator(Engines(model, tokenizer()), data, SETTINGS)

    whole = list(fresh().run(data.records[0], {}))
    known: dict[object, dict[str, object]] = {}
    cut = fresh().run(data.records[0], known)
    for made in islice(cut, 4):
        known[key_of(made)] = made
    cut.close()
    rest = list(fresh().run(data.records[0], known))
    assert [*known.values(), *rest] == whole
    known.update((key_of(r), r) for r in rest)
    assert list(fresh().run(data.records[0], known)) == []


def test_lead_ins_are_never_taken_from_the_records() -> None:
    short = replace(dataset(), leads=("too short",))
    with pytest.raises(ValueError, match="kept for lead-ins are too few"):
        Engines(llama(), tokenizer()).get(short, "auto", "exact")


def test_target_logits_are_those_of_one_forward() -> None:
    with CacheTune(llama(), tokenizer(), None) as engine:
        state = engine.full_prefill(query="what?", chunks=["some passage"])
        target = list(b"abcde")
        found = target_logits(engine, [state], target)[0]
        ids = torch.tensor([[*state.prompt.ids, *target]])
        whole = engine.adapter.model(ids).logits[0, len(state.prompt.ids) - 1 : -1]
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
        assert state.cache.get_seq_length() == len(state.prompt.ids)
        answer = engine.generate(prompt=state.prompt, reuse=False, max_new_tokens=16, do_sample=False)
        assert greedy_answers(engine, [state]) == [answer.text.strip()]


# -- report -----------------------------------------------------------------------------------------------------------


def results() -> list[dict[str, object]]:
    probe = {"selector": "probe", "ratio": 0.15, "probed": 9, "lead_in": "auto"}
    rows = []
    for i in range(4):
        rows.append(row(f"r{i}", kl=0.4))
        rows.append(row(f"r{i}", **probe, kl=0.1, compute=0.2))
        rows.append(row(f"r{i}", **(probe | {"budget": "compute"}), kl=0.2, compute=0.15))
    return rows


def test_tables_show_shares_at_equal_compute(tmp_path: Path) -> None:
    points = report.summarise(results())
    kept = report.equal_compute(points)
    assert [(p.setting.selector, p.budget) for p in kept] == [("none", "ratio"), ("probe", "compute")]
    assert kept[1].share.value == pytest.approx(0.5)
    text = report.markdown({"model": "m", "environment": {}}, points)
    assert "| lead-in | selector | r 0 | r 0.15 |" in text
    assert "| auto | `probe` |  | 50.0 [50, 50] |" in text
    assert "| auto | exact | `probe` | 0.15 | ratio | 4 | 0.2000 | 0.1000 [0.1000, 0.1000] | 75.0 [75, 75] |" in text
    with pytest.raises(ValueError, match="holds no results"):
        report.load(tmp_path)


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fidelity.plot import plot

    rows = [*results(), *(row(f"r{i}", lead_in="auto", kl=0.3) for i in range(4))]
    plot(report.summarise(rows), tmp_path / "a.svg", "title")
    assert "share of the KL gap closed" in (tmp_path / "a.svg").read_text()
    assert Setting("auto", "exact", "probe", 0.15) in {p.setting for p in report.summarise(rows)}
