"""The forms of chunks in the fidelity benchmark: what they are made of, that a run says which one a row is of, and the tables by form."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag.text.prompts.prompt import PromptBuilder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality
from fidelity import measures
from fidelity.contents import CONTENTS, prose_source
from fidelity.documents import Shape, read_documents, recut, shuffled
from fidelity.formed import documents_in_forms, in_form, questions_in_forms
from fidelity.forms import FORMS, check_chat
from fidelity.forms_report import by_form
from fidelity.records import Dataset, Record
from fidelity.rows import read_rows
from fidelity.sources import Text

SHAPE = Shape(chunks=5, chunk_tokens=120, query_tokens=10, target_tokens=12)
"""Here a token is a byte."""


def text(name: str, sentences: int = 160) -> str:
    return " ".join(f"The {name} of number {i} is {i * 7} miles long." for i in range(sentences))


@pytest.fixture(scope="module")
def documents() -> Dataset:
    sources = {"one": [Text(f"a{i}", text(f"river{i}")) for i in range(6)]}
    return read_documents(sources, tokenizer(), SHAPE, count=3)


def formed(dataset: Dataset, form: str) -> Dataset:
    return in_form(dataset, form, PromptBuilder(tokenizer()).encode)


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.content == "prose"])
def test_a_form_continues_the_same_text(documents: Dataset, form: str) -> None:
    made = formed(documents, form)
    assert (made.digest, made.name) == (documents.digest, documents.name)  # the same lead-ins, so the same engine
    prompts = PromptBuilder(tokenizer(), chunk_separator="")
    for plain, record in zip(documents.records, made.records, strict=True):
        assert (record.name, record.query, record.target) == (plain.name, plain.query, plain.target)
        assert record.form == form
        assert (record.digest == plain.digest) == (form == "plain")
        prompt = made.prompt(prompts, record)
        assert prompt.chunk_texts == record.chunks
        assert [prompt.ids[s.start : s.end] for s in prompt.spans] == list(prompt.chunk_ids)
        whole = tokenizer().decode(prompt.ids)
        assert whole.endswith(record.query if form == "turns_after" else plain.chunks[-1] + record.query)
        assert set(plain.chunks) <= set(record.chunks) or form == "overlapping"


def test_forms_of_documents_are_what_their_names_say(documents: Dataset) -> None:
    plain, windows, twice, nearly, system, turns = (
        formed(documents, form).records[0]
        for form in ("plain", "overlapping", "twice", "nearly_twice", "system_prompt", "turns_after")
    )
    assert windows.chunks[0] == plain.chunks[0]
    for (before, chunk), window in zip(pairwise(plain.chunks), windows.chunks[1:], strict=True):
        ahead = window.removesuffix(chunk)
        assert before.endswith(ahead)
        assert len(before) / 5 < len(ahead) < len(before) / 2
    assert twice.chunks[:4] == plain.chunks[:4]
    assert twice.chunks[4] in plain.chunks[:4]
    assert twice.chunks[5] == plain.chunks[4]  # the query continues the last chunk
    copied = twice.chunks[4]
    assert nearly.chunks[:4] == plain.chunks[:4]
    assert len(copied) - 60 < len(nearly.chunks[4]) < len(copied) - 20  # without a sentence
    assert nearly.chunks[5] == plain.chunks[4]
    assert 1500 <= len(system.before) <= 2000
    taken = [*plain.chunks, *documents.leads]
    assert not any(system.before[at : at + 60] in each for at in range(0, 1500, 60) for each in taken)
    assert len(turns.turns) == 3
    assert all(turn.answered.split('"')[1] in " ".join(" ".join(plain.chunks).split()) for turn in turns.turns)
    # In another order the same chunk stands a second time, in front of the last one.
    mixed = formed(shuffled(documents, 1), "twice").records[0]
    assert mixed.chunks[4:] == twice.chunks[4:]


@pytest.mark.parametrize(("size", "count"), [(60, 10), (200, 3), (300, 2)])
def test_the_same_text_in_other_chunks(documents: Dataset, size: int, count: int) -> None:
    made = recut(documents, size, tokenizer())
    for plain, record in zip(documents.records, made.records, strict=True):
        assert "".join(record.chunks) == "".join(plain.chunks)
        assert abs(len(record.chunks) - count) <= 1
        assert all(0.6 * size < len(chunk) <= size + 10 for chunk in record.chunks)
        assert all(chunk[0].isspace() for chunk in record.chunks)  # the tokens of the parts are those of the whole
        assert (record.query, record.target, record.form) == (plain.query, plain.target, f"{size}_tokens")
    wordless = replace(documents.records[0], chunks=("x" * 300, " y" * 20, "z" * 300))
    pieces = recut(replace(documents, records=(wordless,)), 60, tokenizer()).records[0].chunks
    assert "".join(pieces) == "".join(wordless.chunks)
    assert "" not in pieces


def test_questions_have_those_forms_that_passages_can_have() -> None:
    passages = (
        "Rome\nIt is old. It lies on a river.",
        "Ben Nevis\nIt is high. It was climbed by Nan Shepherd. It is cold.",
        "Oslo\nIt is new.",
    )
    record = Record("q", "musique", passages, "Who?", (5, 6), ("Nan Shepherd",))
    spare = tuple(text(name) for name in ("harbour", "castle"))
    questions = Dataset("musique", (record,), ("lead",), "Read.", spare=spare)
    made = questions_in_forms(questions, list(FORMS), PromptBuilder(tokenizer()).encode)
    found = {d.records[0].form: d.records[0] for d in made}
    assert list(found) == ["plain", "twice", "nearly_twice", "system_prompt", "turns_after"]
    assert found["twice"].chunks == (*passages, passages[1])  # the one with the answer
    assert found["nearly_twice"].chunks == (*passages, "Ben Nevis\nIt is high. It is cold.")
    for blank in ("\n", " \n "):  # no sentence is in it that could be left out
        of_blanks = replace(questions, records=(replace(record, chunks=(blank,)),))
        assert formed(of_blanks, "nearly_twice").records[0].chunks == (blank, blank)
    prompts = PromptBuilder(tokenizer())
    for dataset in made:
        prompt = dataset.prompt(prompts, dataset.records[0])
        whole = tokenizer().decode(prompt.ids)
        assert whole.count("Question: Who?") == 1
        assert whole.endswith("Question: Who?<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.chunk_texts == dataset.records[0].chunks
    assert found["system_prompt"].before.startswith("The harbour of number 0")
    with pytest.raises(
        ValueError, match=r"musique: .* has 4 tokens, and a system prompt takes about 2000: .* leave system_prompt"
    ):
        formed(replace(questions, spare=("abc",)), "system_prompt")


def test_text_that_is_no_english_prose(tmp_path: Path) -> None:
    shape = Shape(chunks=2, chunk_tokens=200, query_tokens=10, target_tokens=12)
    found = documents_in_forms(
        lambda: pytest.fail("no form is made of them"), ["code", "tables"], [], [], shape, 1, tokenizer(), count=2
    )
    assert [(d.name, d.records[0].form, len(d.records)) for d in found] == [
        ("documents", "code", 2),
        ("shuffled", "code", 1),
        ("documents", "tables", 2),
        ("shuffled", "tables", 1),
    ]
    assert len({d.digest for d in found}) == 2
    assert {record.source for record in found[2].records} == {"functions", "characters"}
    code = next(iter(CONTENTS["code"]()["library"])).text
    assert "import " in code
    for table in CONTENTS["tables"]().values():
        rows = next(iter(table)).text.splitlines()
        assert len({row.count(" | ") for row in rows}) == 1
        assert all(row.startswith("| ") and row.endswith(" |") for row in rows)
    for between in ("\n\n", "\n"):  # paragraphs between blank lines, or one a line
        path = tmp_path / "de.txt"
        path.write_text(
            between.join(f"Der Fluss {i} ist {i * 3} Meilen lang und fließt nach Norden." for i in range(200))
        )
        ((name, texts),) = prose_source(path, lambda text: len(text.encode()), shape).items()
        assert name == "de"
        assert len(list(texts)) > 4
        assert all(text.text.startswith("Der Fluss") and len(text.text) > 2 * shape.tokens for text in texts)
    (german,) = documents_in_forms(lambda: pytest.fail("nor is this"), [], [], [path], shape, 0, tokenizer(), count=2)
    assert [record.form for record in german.records] == ["de", "de"]


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_difference_of_two_shares_is_of_the_same_records() -> None:
    found = measures.difference_of_shares([0.1, 0.3], [0.5, 0.5], [0.2, 0.4], [0.4, 0.8])
    assert found.value == pytest.approx((1 - 0.4 / 1) - (1 - 0.6 / 1.2))
    assert found.low <= found.value <= found.high
    same = measures.difference_of_shares([0.1, 0.4], [0.5, 0.9], [0.1, 0.4], [0.5, 0.9])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    drawn = measures.difference_of_shares([0.1, 0.4], [0.5, 1], [0.2, 0.2], [1, 1])
    # One of two records drawn twice, or both: shares of 80%, 60% and 67% against 80% and 80%.
    assert (drawn.low, drawn.high) == pytest.approx((-0.2, 0))


def row(form: str, record: str, kl: float, **changes: Any) -> dict[str, Any]:
    base = {"set": "documents", "record": record, "budget": "ratio", "probed": 0, "form": form, "chunks": 8}
    setting = {"lead_in": "first_token", "codec": "exact", "selector": "none", "ratio": 0.0}
    return base | setting | {"compute": 0.0, "kl": kl, "top1": 0.5, "prompt_tokens": 100} | changes


def test_a_table_has_a_line_for_each_form_and_pairs_with_plain_chunks() -> None:
    chosen = {"selector": "expected_error", "ratio": 0.15, "lead_in": "auto", "probed": 9, "compute": 0.2}
    rows = []
    for i in range(4):
        for form, nothing, kl in (("plain", 0.4, 0.1), ("twice", 0.4, 0.2), ("64_tokens", 0.8, 0.1)):
            rows += [row(form, f"r{i}", nothing), row(form, f"r{i}", kl, **chosen)]
            rows.append(row(form, f"r{i}", kl + 0.1, **(chosen | {"budget": "compute"})))
        rows += [row("de", f"other{i}", 0.5), row("de", f"other{i}", 0.25, **chosen)]
    rows.append(row("twice", "cut off before its other settings", 9.0))
    text = by_form(rows)
    table = text[text.index("### documents, `expected_error` r 0.15, lead-in auto, codec exact") :].splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("| ")]
    assert lines[0][:4] == ["form", "n", "chunks", "prompt tokens"]
    found = {line[0]: line[1:] for line in lines[2:]}
    assert list(found) == ["plain", "twice", "64_tokens", "de"]
    assert found["plain"][5] == "75.0 [75, 75]"
    assert found["twice"][3].startswith("0.4000 ["), "KL(0) is of the records that the setting has"
    assert found["plain"][8:] == ["", "", "", "50.0 [50, 50]"]
    assert found["twice"][8:11] == ["4", "+0.1000 [+0.1000, +0.1000]", "-25.0 [-25, -25]"]
    assert found["64_tokens"][9:11] == ["+0.0000 [+0.0000, +0.0000]", "+12.5 [+12, +12]"]
    assert found["de"][5:] == ["50.0 [50, 50]", "0.500 [0.500, 0.500]", "0.200", "", "", "", ""]
    old = [{name: value for name, value in each.items() if name != "form"} for each in rows if each["form"] == "plain"]
    assert by_form(old) == ""
    # Questions in plain chunks alone get no table, so that is said.
    text = by_form([*rows, row("plain", "q", 0.4, set="musique")])
    assert "`musique` is not measured in 64_tokens, de: passages that are given can't have" in text
    assert "### musique" not in text


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "docs").mkdir()
    for i in range(5):
        (folder / "docs" / f"{i}.txt").write_text(text(f"street{i}"))
    questions = [
        {"question": f"{i}?", "answers": ["7"], "passages": [{"title": "", "text": text(f"p{i}", 3)}] * 2}
        for i in range(8)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    fixed = (
        "--device cpu --commit c --selectors frequency --ratios 0.3 --lead-ins first_token --codecs exact --docs-only"
    )
    shape = "--documents 1 --shuffled 0 --chunks 4 --chunk-tokens 90"
    paths = ["--model", str(folder / "model"), "--docs", str(folder / "docs"), "--out", str(folder / "out")]
    return [*fixed.split(), *shape.split(), *paths, *more]


def test_a_run_in_forms_is_cut_off_by_time_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--musique", str(folder / "q.jsonl"), "--musique-records", "1", "--recut", "180"]
    more += ["--forms", "plain", "twice", "overlapping", "turns_after"]

    def run(*further: str) -> list[dict[str, Any]]:
        quality.main(words(folder, *more, *further))
        return read_rows(folder / "out" / "rows-0of1.jsonl")[1]

    first = run("--seconds", "0")
    assert {(r["set"], r["form"]) for r in first} == {("musique", "plain")}
    assert "the same command goes on" in capsys.readouterr().err
    rows = run()
    assert rows[: len(first)] == first
    assert {(r["set"], r["form"]) for r in rows} == {
        *(("musique", form) for form in ("plain", "twice", "turns_after")),
        *(("documents", form) for form in ("plain", "twice", "overlapping", "turns_after", "180_tokens")),
    }
    chunks = {r["form"]: r["chunks"] for r in rows if r["set"] == "documents"}
    assert chunks == {"plain": 4, "twice": 5, "overlapping": 4, "turns_after": 4, "180_tokens": 2}
    everything = [r["kl"] for r in rows if r["selector"] == "all"]
    assert everything == pytest.approx([0] * 8, abs=1e-9)
    assert all(r["kl"] > 1e-6 for r in rows if r["selector"] == "none")
    assert run() == rows
    table = (folder / "out" / "table.md").read_text()
    said = capsys.readouterr()
    assert table in said.out
    for words_of_it in (table, said.err):
        assert "`musique` is not measured in overlapping, 180_tokens: passages that are given" in words_of_it
    assert "1 records. KL(0)" in table  # the tables of before are of plain chunks alone
    assert table.count("| turns_after | 1 | 4 |") == 1
    assert "| 180_tokens | 1 | 2 |" in table
    with pytest.raises(SystemExit, match=r"documents, system_prompt: .* and this model reads at most 2048: use fewer"):
        quality.main(words(folder, "--forms", "system_prompt"))
    with pytest.raises(SystemExit, match=r"musique: the text that is kept out of all prompts has 0 tokens"):
        run("--forms", "system_prompt")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--forms tables --documents 0", "--forms tables is made of documents, and --documents is 0: ask for some"),
        ("--recut 180 --documents 0", "--recut is made of documents"),
        ("--recut 181", "--recut is 181: a record has 360 tokens (--chunks times --chunk-tokens), so use 40 to 180."),
        ("--recut 39", "so use 40 to 180"),
        ("--recut 90", "--recut is 90, as --chunk-tokens is: leave it out"),
        ("--forms plain twice --chunks 1", "--forms twice takes documents of 2 chunks or more, and --chunks is 1."),
        ("--prose nowhere.txt", "--prose is nowhere.txt, and no such file is there"),
        ("--forms round", "invalid choice: 'round'"),
        ("--forms code --musique q.jsonl", "--forms has code, which the passages of --musique can't have: add plain"),
    ],
)
def test_forms_that_cannot_be_made_are_refused(
    folder: Path, more: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.arguments(words(folder, *more.split()))
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_of_prose_is_not_called_as_another_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "tables.txt"
    path.write_text("text")
    with pytest.raises(SystemExit):
        quality.arguments(words(folder, "--prose", str(path)))
    assert "another form is called 'tables': rename the file" in " ".join(capsys.readouterr().err.split())


def test_messages_take_a_chat_template() -> None:
    check_chat(tokenizer(), list(FORMS))
    check_chat(tokenizer(chat=False), ["plain", "twice"])
    with pytest.raises(
        ValueError, match="has system_prompt and turns_after, and this model's tokenizer has no chat template"
    ):
        check_chat(tokenizer(chat=False), list(FORMS))


def test_sets_take_turns_and_every_process_has_some_of_each() -> None:
    counts = [4, 4, 2, 4, 3]
    made = quality.in_turn(counts)
    assert sorted(made) == [(n, i) for n, count in enumerate(counts) for i in range(count)]
    assert [i for _, i in made] == sorted(i for _, i in made)
    assert all(len({n for n, _ in made[shard::5]}) > 2 for shard in range(5))
    assert quality.in_turn([]) == []
