"""The reader that is tuned to measure with: its training text is its own, what is learned are the answers, and merging changes nothing else."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import random
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from small_tokenizers import byte_level
from tiny import llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cachetune_rag.text.prompts.prompt import PromptBuilder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from fidelity.musique import read_musique, read_questions
from fidelity.sources import Text
from reader import held_out, prose, templates, two_steps, vocabulary
from reader import merge as merging
from reader import train as training
from reader.batches import Batches, Encoder, batch_of
from reader.contexts import Context, ContextMaker, Turn
from reader.lora import CONFIG, WEIGHTS, add_lora, merge, save_adapter
from reader.prose import RealQuestion, docstring_sentences, further_questions, passage_sentences, split_musique
from reader.squad import AskedPassage, Barred, read_squad
from reader.train import Log, loss_of, train
from reader.worlds import RELATIONS
from tasks_of.haystack import reference_sentences
from tasks_of.kinds import KINDS, planted_words
from tasks_of.names import Names

PROSE = [f"Sentence {i} tells nothing of any use to anybody." for i in range(50)]


@pytest.fixture(scope="module")
def contexts() -> list[Context]:
    maker = ContextMaker(PROSE, avoid=planted_words())
    return [maker.context(number, 900) for number in range(120)]


def test_text_depends_on_seed_and_number_alone(contexts: list[Context]) -> None:
    maker = ContextMaker(PROSE, avoid=planted_words())
    assert [maker.context(number, 900) for number in reversed(range(100, 120))] == contexts[:99:-1]
    assert ContextMaker(PROSE, seed=1).context(0, 900) != contexts[0]
    assert len({c.chunks for c in contexts}) == len(contexts)


def test_training_text_has_no_name_of_the_benchmark_of_tasks(contexts: list[Context]) -> None:
    # Without names to avoid, so that what is drawn from is tried, not what is refused.
    maker = ContextMaker(PROSE)
    text = " ".join(
        t for n in range(300) for c in [maker.context(n, 900)] for t in (*c.chunks, *(t.question for t in c.turns))
    )
    assert set(re.findall(r"[a-z]+", text.casefold())).isdisjoint(planted_words())
    assert {*vocabulary.GIVEN, *vocabulary.ITEMS, *vocabulary.JOBS}.isdisjoint(
        {w.capitalize() for w in planted_words()} | planted_words()
    )


def test_training_text_has_no_template_of_the_benchmark_of_tasks() -> None:
    theirs: set[tuple[str, ...]] = set()
    for make, number, near in itertools.product(KINDS.values(), range(20), (False, True)):
        question = make(random.Random(number), Names(random.Random(number)), near)
        for text in (question.query, *(fact.text for fact in question.facts)):
            theirs |= _runs(text)
    own = [t for lookup in templates.LOOKUPS for t in (*lookup.told, *lookup.asked, lookup.several)]
    own += [t for chain in templates.CHAINS for t in (*chain.root, *chain.link, *chain.asked)]
    own += [t for label in templates.LABELS for t in label]
    own += [t for some in RELATIONS.values() for r in some for t in (*r.told, *r.phrase, *r.asked)]
    assert len(own) > 200
    assert not {run: t for t in own for run in _runs(t) & theirs}


def _runs(text: str) -> set[tuple[str, ...]]:
    """Four words in a row, names and values not counted."""
    plain = [
        w
        for w in re.findall(r"\{\w\}|\w+", text)
        if not w.startswith("{") and not w.isdigit() and (w.islower() or w in ("The", "What", "Which", "In", "Where"))
    ]
    return {tuple(w.casefold() for w in plain[i : i + 4]) for i in range(len(plain) - 3)}


def test_training_prose_is_not_that_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = next(s for s in reference_sentences() if re.match(r"[A-Z]\w* [^|{}\\-]*\.$", s))
    text = f"This sentence stands in a docstring alone. {theirs} Nobody ever needs this one either."
    monkeypatch.setattr(prose, "installed_sources", lambda: {"docstrings": iter([Text("module", text)])})
    assert docstring_sentences() == ["This sentence stands in a docstring alone.", "Nobody ever needs this one either."]


def test_answers_stand_in_the_passages(contexts: list[Context]) -> None:
    for context in contexts:
        text = " ".join(context.chunks).casefold()  # a fact may be split over two chunks
        assert context.turns
        for turn in context.turns:
            for part in re.split(r", | and ", turn.answer.casefold()):
                assert part in text, (turn, context)


def test_a_chain_is_answered_by_going_back_through_it() -> None:
    maker = ContextMaker(PROSE)
    seen = 0
    for number in range(150):
        context = maker.context(number, 900)
        text = " ".join(context.chunks)
        for turn in context.turns:
            if re.fullmatch(r"What toll does \w+ charge\?", turn.question):
                *back, value = turn.answer.split(", ")
                name = turn.question.split()[3]
                for before in back:
                    assert (
                        f"{name} charges what {before} charges." in text
                        or f"At {name} the toll equals that at {before}." in text
                    )
                    name = before
                assert f"{name} charges a toll of {value}." in text or f"The toll at {name} is {value}." in text
                seen += bool(back)
    assert seen


def test_steps_are_told_before_the_answer_where_that_is_asked_for() -> None:
    told = ("Ines founded the Mill.", "The Mill stands in Évora.", "Nobody lives here.")
    asked = RealQuestion("Where is what Ines founded?", ("Évora",), told, ("the Mill",))
    plain, aloud = (ContextMaker(PROSE, [asked], real=0.2, aloud=aloud) for aloud in (False, True))
    several = 0
    for number in range(150):
        short, long = plain.context(number, 900), aloud.context(number, 900)
        assert (short.chunks, short.prefix) == (long.chunks, long.prefix)
        text = " ".join(long.chunks).casefold()
        for turn, other in zip(short.turns, long.turns, strict=True):
            assert turn.question == other.question
            *steps, answer = other.answer.split("; ")
            assert turn.answer.split(", ")[-1] == answer.split(", ")[-1]
            assert all(step.casefold() in text for step in steps) or asked.question == turn.question
            if asked.question == turn.question:
                assert other.answer == "the Mill; Évora"
            several += bool(steps)
    assert several > 20
    # A prompt that has no room for all passages keeps those with a step.
    long = replace(asked, passages=(*told[:2], "x" * 5000))
    for number in range(5):
        (turn,), text = (
            (context := ContextMaker(PROSE, [long], real=1.0, aloud=True).context(number, 100)).turns,
            context.chunks,
        )
        assert turn.answer == "the Mill; Évora"
        assert len(" ".join(text)) < 100


def test_what_is_learned_are_answers_and_their_ends() -> None:
    tokenizer = byte_level()
    context = Context("Read.", ("One is 1.", "Two is 22."), (Turn("One?", "1"), Turn("Two?", "22")))
    example = Encoder(tokenizer).encode(context)
    start = PromptBuilder(tokenizer).build(query="One?", chunks=context.chunks, prefix="Read.").ids
    assert example.ids[: len(start)] == list(start)
    learned = [i for i, wanted in zip(example.ids, example.learned, strict=True) if wanted]
    assert tokenizer.decode(learned) == "1<|im_end|>22<|im_end|>"
    messages = [
        {"role": "user", "content": "Read.\n\nOne is 1.\n\nTwo is 22.\n\nQuestion: One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Question: Two?"},
        {"role": "assistant", "content": "22"},
    ]
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert Encoder(tokenizer).encode(context, len(start) + 3).ids == example.ids[: len(start) + 2], (
        "no question without its answer"
    )


def test_the_end_of_an_answer_is_that_of_the_template_whatever_the_tokenizer_calls_its_end() -> None:
    tokenizer = copy.deepcopy(byte_level())
    context = Context("Read.", ("One is 1.",), (Turn("One?", "1"), Turn("Two?", "22")))
    expected = Encoder(tokenizer).encode(context)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = llama()
    model.generation_config.eos_token_id = end
    tokenizer.eos_token = "<|im_start|>"  # as some conversions have it
    assert Encoder(tokenizer).encode(context) == expected
    assert Encoder(tokenizer).end == end
    training.check_end(model, tokenizer)
    model.generation_config.eos_token_id = end + 1
    with pytest.raises(SystemExit, match=rf"ends an answer with token {end} .*the model stops at \[{end + 1}\]"):
        training.check_end(model, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template"):
        Encoder(tokenizer)


def test_batches_differ_between_processes_and_are_the_same_again() -> None:
    def some(rank: int) -> list[list[int]]:
        batches = Batches(ContextMaker(PROSE), byte_level(), 2048, [1024], rank, 2)
        return [row.tolist() for batch in islice(iter(batches), 2) for row in batch.ids]

    first = some(0)
    assert first == some(0)
    assert not any(row in first for row in some(1))
    assert all(len(row) <= 1024 for row in first)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(byte_level()), max_position_embeddings=1024, tie_word_embeddings=True, **sizes)
    ).eval()


def test_filling_up_a_batch_changes_no_loss() -> None:
    encoder, model = Encoder(byte_level()), _model()
    examples = [
        encoder.encode(Context("", (text,), (Turn("What?", "this"),))) for text in ("Short.", "A much longer text.")
    ]
    both = loss_of(model, batch_of(examples, 0)).item()
    assert both == pytest.approx(sum(loss_of(model, batch_of([e], 0)).item() for e in examples) / 2, rel=1e-5)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    encoder, model = Encoder(byte_level()), _model()
    batch = batch_of([encoder.encode(Context("", (f"It is {i}.",), (Turn("What?", str(i)),))) for i in range(4)], 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = add_lora(model, 8, 16.0)
    start = loss_of(model, batch).item()
    log = Log(tmp_path / "log.jsonl")
    done = train(model, itertools.repeat(batch), 3e-2, log, steps=20)
    log.close()
    assert done["steps"] == 20
    assert loss_of(model, batch).item() < start - 0.2
    (line,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["step"] == 20
    assert line["loss"] < start
    now = {name.replace(".base.", "."): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    assert all(layer.up.abs().sum() > 0 for layer in layers.values())


def test_a_merged_model_is_base_and_adapter(tmp_path: Path) -> None:
    base, tuned, merged = (llama(layers=2) for _ in range(3))
    layers = add_lora(tuned, 3, 6.0)
    for layer in layers.values():
        nn.init.normal_(layer.up, std=0.1)
        layer.up.data, layer.down.data = (w.data.bfloat16().float() for w in (layer.up, layer.down))  # as they are kept
    save_adapter(layers, tmp_path, "tiny")
    merge(merged, tmp_path)
    changed = dict(merged.named_parameters())
    for name, weight in base.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        expected = weight if layer is None else weight + 2.0 * (layer.up @ layer.down)
        assert torch.equal(changed[name], expected), name
    ids = torch.arange(10)[None]
    assert torch.allclose(merged(ids).logits, tuned(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-2)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(add_lora(llama(layers=3), 2, 4.0), tmp_path, "tiny")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj, which this model has no layer for"):
        merge(llama(layers=2), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        merge(llama(layers=3), tmp_path)


def test_the_script_writes_a_model_of_its_own(tmp_path: Path) -> None:
    model = llama(layers=1)
    byte_level().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    save_adapter(add_lora(llama(layers=1), 2, 4.0), tmp_path / "adapter", "tiny")
    merging.main(
        ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "made")]
    )
    made = LlamaForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True)
    )  # nothing was learned
    assert (tmp_path / "adapter" / WEIGHTS).stat().st_size < 100_000


def questions(path: Path, count: int, shared: int = 4) -> Path:
    """A file of questions, of which each has its answer in a passage of its own; one in three has it in one that another question has too."""
    lines = []
    for i in range(count):
        answer = (
            f"Passage {i + shared} has, as told, the answer of {i}."
            if i % 3 == 0
            else f"Passage of its own: person {i} it is, as told."
        )
        texts = [
            f"A long text {i} on nobody of importance.",
            f"A text on somebody or other, number {i + shared}.",
            answer,
        ]
        answers = [f"answer of {i}" if i % 3 == 0 else f"person {i}"]
        own = [{"title": "", "text": text} for text in texts]
        if i >= shared and (i - shared) % 3 == 0:  # has the answering passage of an earlier question
            own.append({"title": "", "text": f"Passage {i} has, as told, the answer of {i - shared}."})
        lines.append({"question": f"Who is {i}?", "answers": answers, "passages": own})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("count", [15, 41])
def test_questions_that_are_held_out_are_all_others_and_share_no_passage_with_training(
    tmp_path: Path, count: int
) -> None:
    path = questions(tmp_path / "questions.jsonl", count)
    split = split_musique(path)
    held = read_musique(path, byte_level(), split.first, split.count)
    trained = {q.question for q in split.trained}
    assert trained
    assert trained.isdisjoint(r.query for r in held.records)
    assert split.first + split.count == count - 5
    own = {p for q in split.trained for p in q.passages}
    assert own.isdisjoint({c for r in held.records for c in r.chunks} | set(held.leads))
    assert set(passage_sentences(split.trained)) == {" ".join(p.split()) for p in own}


def test_a_question_is_trained_on_only_with_a_passage_that_answers_it(tmp_path: Path) -> None:
    split = split_musique(questions(tmp_path / "questions.jsonl", 15))
    # Question 3's answer stands in a passage that question 7, which is held out, has too.
    assert [q.question for q in split.trained] == [f"Who is {i}?" for i in (0, 1, 2, 4)]
    maker = ContextMaker(PROSE, split.trained, real=1.0)
    for number in range(50):
        context = maker.context(number, 300)
        assert context.turns
        for turn in context.turns:
            assert any(turn.answer in chunk.casefold() for chunk in context.chunks)
    short = maker.context(0, 4)  # no room for a passage
    assert not short.turns[0].question.startswith("Who is")


def test_too_few_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 6 questions, and 5 only give lead-ins"):
        split_musique(questions(tmp_path / "questions.jsonl", 6))


def squad_file(path: Path, contexts: list[str]) -> Path:
    paragraphs = [
        {
            "context": context,
            "qas": [
                {"question": f" What is in {i}?", "answers": [{"text": context.split()[0]}]},
                {"question": "What is nowhere?", "answers": []},
            ],
        }
        for i, context in enumerate(contexts)
    ]
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    return path


def test_passages_that_are_measured_on_are_not_trained_on(tmp_path: Path) -> None:
    shared = "the first bridge over the river was built of oak by monks in 1180"
    contexts = ["Ines keeps bees.", f"Nobody knows whether {shared.upper()}, as is told.", "The first bridge over it."]
    accented = shared.replace(" ", ", ").replace("oak", "oàk")
    barred = Barred([f"It says: {accented}."])
    read = read_squad(squad_file(tmp_path / "squad.json", contexts), barred)
    assert read == [
        AskedPassage("Ines keeps bees.", (("What is in 0?", "Ines"),)),
        AskedPassage("The first bridge over it.", (("What is in 2?", "The"),), 0),
    ]
    with pytest.raises(ValueError, match="no question on a passage that isn't measured on"):
        read_squad(squad_file(tmp_path / "squad.json", contexts[1:2]), Barred([shared]))


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"data": [{"title": "T"}]}')
    with pytest.raises(ValueError, match=r"other.json is not in SQuAD's form \(KeyError: 'paragraphs'\)"):
        read_squad(tmp_path / "other.json", Barred())


def test_questions_on_passages_are_asked_where_their_passage_is_read() -> None:
    passages = [
        AskedPassage(f"Person {i} lives in house {i}. " * 9, ((f"Who lives in {i}?", f"Person {i}"),))
        for i in range(40)
    ]
    maker = ContextMaker(PROSE, passages=passages, read=1.0)
    for number in range(50):
        context = maker.context(number, 300)
        assert context.turns
        for turn in context.turns:
            assert any(turn.answer.casefold() + " " in chunk.casefold() for chunk in context.chunks)
    assert len(maker.context(0, 4).chunks) == 1


def test_every_other_time_a_question_stands_among_passages_of_its_own_article() -> None:
    passages = [
        AskedPassage(f"In article {a}, house {n} is painted.", ((f"What of {n} in {a}?", f"house {n}"),), a)
        for a in range(10)
        for n in range(8)
    ]
    maker = ContextMaker(PROSE, passages=passages, read=1.0)
    alike = 0
    for number in range(60):
        text = " ".join(maker.context(number, 60).chunks).casefold()
        articles = re.findall(r"in article (\d)", text)
        assert 5 <= len(articles) <= 8
        alike += len(set(articles)) == 1
    assert 20 <= alike <= 40


def test_further_questions_share_no_passage_with_what_is_measured_and_are_asked_together(tmp_path: Path) -> None:
    measured = "The first bridge over the river was built of oak by monks."
    told = ["Ines founded the Mill — a café.", "The Mill stands in Évora (Portugal).", "Nobody lives here."]
    lines = [
        {"question": "Where is what Ines founded?", "answer": "Évora", "answer_aliases": [], "passages": told},
        {"question": "What did Ines found?", "answer": "the Mill", "answer_aliases": [], "passages": told},
        {"question": "Who built it?", "answer": "monks", "answer_aliases": [], "passages": [measured, told[2]]},
        {"question": "Who lives there?", "answer": "Nobody", "answer_aliases": [], "passages": [measured, told[2]]},
    ]
    lines[-1]["steps"] = ["the river"]  # which only a passage has that is measured on
    for line in lines:
        line["passages"] = [{"title": "", "text": text} for text in line["passages"]]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = further_questions(path, Barred([f"It says: {measured}"]))
    assert found == [
        RealQuestion("Where is what Ines founded?", ("Évora",), tuple(told)),
        RealQuestion("What did Ines found?", ("the Mill",), tuple(told)),
    ]
    plain = ["ines founded the mill — a cafe.", "the mill stands in evora ( portugal ) .", "nobody lives here."]
    maker, layouts = ContextMaker(PROSE, found, real=1.0), set()
    for number in range(40):
        context = maker.context(number, 100)
        assert {turn.question for turn in context.turns} == {q.question for q in found}
        layouts.add((len(context.chunks), context.chunks[0] in told))
        text = " ".join(context.chunks)
        assert all(p in text for p in told) or all(p in text for p in plain)
    assert layouts == {(3, True), (3, False), (1, False)}
    for line in lines[-2:]:
        path.write_text(json.dumps(line))
        with pytest.raises(ValueError, match="no question with an answer in a passage that isn't measured on"):
            further_questions(path, Barred([measured]))


def test_two_steps_go_through_the_passage_that_names_the_other_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "Red Dust (film)": "Red Dust is a 1950 Italian film directed by Ada R. Lovell and shot in Rome.",
        "Ada R. Lovell": "Ada R. Lovell (born 3 May 1911) was an Italian film director. She was born in Turin and attended Turin Academy. Later.",
        "Old Lovell": "Old Lovell (1870 – 2 June 1950) was a French painter. He was married to Ada R. Lovell in 1940.",
        "Grey Hill": "Grey Hill is a hill.",
    }
    corpus, made = tmp_path / "corpus.json", tmp_path / "made.jsonl"
    corpus.write_text(json.dumps([{"title": title, "text": text} for title, text in told.items()]))
    answers: dict[str, str] = {}
    through: dict[str, list[str]] = {}
    for seed in range(80):
        two_steps.main(f"--passages {corpus} --others 1 --out {made} --seed {seed}".split())
        assert "questions on 2 pairs of 4 passages" in capsys.readouterr().out
        for question, right, passages, _, steps in read_questions(made):
            (answer,) = right
            assert answers.setdefault(question, answer) == answer
            through[question] = steps
            assert told["Ada R. Lovell"] in passages
            assert len(passages) in (2, 3)
            assert any(answer in passage for passage in passages)
    film, spouse = "the director of Red Dust", "the spouse of Old Lovell"
    expected = {
        f"When was {film} born?": "3 May 1911",
        f"Where was {film} born?": "Turin",
        f"Where was {spouse} educated?": "Turin Academy",
        f"What nationality is {spouse}?": "Italian",
        f"Who is {film}?": "Ada R. Lovell",
        "Who directed Red Dust?": "Ada R. Lovell",
        "In what year was Red Dust released?": "1950",
        "When did Old Lovell die?": "2 June 1950",
        "What does Old Lovell do for a living?": "painter",
    }
    assert {question: answers.get(question) for question in expected} == expected
    two = [
        f"When was {film} born?",
        f"Where was {film} born?",
        f"Where was {spouse} educated?",
        f"What nationality is {spouse}?",
    ]
    assert {q: through[q] for q in expected} == {q: ["Ada R. Lovell"] if q in two else [] for q in expected}
    for single in (0, 1):
        two_steps.main(f"--passages {corpus} --single {single} --out {made}".split())
        counts = [
            sum(not asked.steps for asked in read_questions(made) if asked.name.split("/")[0] == pair) for pair in "01"
        ]
        assert counts == [single, single]
    capsys.readouterr()
    corpus.write_text(json.dumps([{"title": "Grey Hill", "text": told["Grey Hill"]}]))
    for more, message in (("", "leads to another one"), (f" {tmp_path / 'no.json'}", "is no list of passages")):
        (tmp_path / "no.json").write_text('[{"title": "Grey Hill"}]')
        with pytest.raises(SystemExit):
            two_steps.main(f"--passages {corpus}{more} --out {made}".split())
        assert message in capsys.readouterr().err


def test_every_example_has_an_answer_to_learn() -> None:
    long = RealQuestion("Who?", ("Ines",), ("Ines. " * 2000,))
    maker = ContextMaker(PROSE, [long], real=0.5)
    batches = Batches(maker, byte_level(), 512, [1024])
    for batch in islice(
        iter(batches), 12
    ):  # a token is hardly more than a byte here, so most facts are too long at first
        assert len(batch.wanted) > 1
        assert batch.ids.shape[1] <= 1024


def test_the_log_says_which_questions_to_measure_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_level().save_pretrained(tmp_path / "base")
    _model().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(training, "docstring_sentences", lambda: PROSE)
    monkeypatch.setattr(training, "HELD_OUT", 1)
    path = questions(tmp_path / "questions.jsonl", 15)
    words = f"--model {tmp_path / 'base'} --musique {path} --out {tmp_path / 'made'} --steps 1 --workers 0 --tokens 1024 --lengths 1024 --device cpu"
    training.main(words.split())
    assert f"--musique {path} --first 5 --musique-records 5" in capsys.readouterr().out
    first = json.loads((tmp_path / "made" / "log.jsonl").read_text().splitlines()[0])
    assert first["held_out_questions"] == {"first": 5, "count": 5}
    assert first["further_questions"] == 0
    merge(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "made")
    # All weights, and questions of a further file.
    words = words.replace("made", "whole") + f" --full --shares 2 --rate 0.1 --more {path} --barred {path}"
    with pytest.raises(ValueError, match="no question with an answer in a passage that isn't measured on"):
        training.main(words.split())
    training.main(words.replace(f" --barred {path}", "").split())
    base, whole = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "whole"))
    assert not any(torch.equal(a, b) for a, b in zip(base.parameters(), whole.parameters(), strict=True))
    assert whole.generation_config.eos_token_id == base.generation_config.eos_token_id
    first = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert first["further_questions"] == 4  # of which no passage is held out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lengths 1024 2048 --shares 1", r"--shares is \[1.0\] with --lengths \[1024, 2048\]: give one share"),
        ("--shares 1 1 1 -1", "none below 0"),
        ("--full --rank 8", "--full trains no adapter"),
        ("--full --name base", "--full trains no adapter: leave out --rank, --alpha and --name"),
        (
            "--musique m.jsonl --barred q.jsonl",
            "--barred leaves passages out of --more and --squad, and neither is given",
        ),
        ("--squad s.json --real 0.4", "--real is 0.4, and there are no such questions: give --musique or --more"),
        ("--more m.jsonl --read 0.7", "--read is 0.7, and there are no such passages: give --squad"),
        ("--squad s.json --read 1.5", "--read is 1.5: use a share from 0 to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.arguments(["--out", "made", *words.split()])
    assert re.search(message, capsys.readouterr().err)
    given = training.arguments(["--out", "made"])
    assert (given.rate, given.real, given.read) == (1e-3, training.REAL, training.READ)
    assert training.arguments(["--out", "made", "--full"]).rate == 3e-4


def test_steps_have_the_lengths_that_are_asked_for() -> None:
    batches = Batches(ContextMaker(PROSE), byte_level(), 2048, [1024, 2048], shares=[0, 1])
    assert {len(batch.ids) for batch in islice(iter(batches), 4)} == {1}


def test_held_out_questions_stand_behind_their_passage_and_others_of_an_article_that_is_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    articles = [
        {
            "title": f"A{a}",
            "paragraphs": [
                {
                    "context": f"In article {a}, passage {n} tells of thing{a}x{n}." + " The colour is red." * (n > 4),
                    "qas": [
                        {"question": f"Of what does {n} tell?", "answers": [{"text": f"thing{a}x{n}"}] * 2},
                        {"question": f"What is the colour of {n}?", "answers": [{"text": "red"}] * (n > 4)},
                    ],
                }
                for n in range(8)
            ],
        }
        for a in range(5)
    ]
    squad, train, questions = (tmp_path / name for name in ("squad.json.gz", "train.json", "questions.jsonl"))
    squad.write_bytes(gzip.compress(json.dumps({"data": [*articles, articles[0]]}).encode()))  # one stands there twice
    words = f"--squad {squad} --articles 2 --passages 4 --each 6 --train {train} --questions {questions}".split()
    held_out.main(words)
    assert (
        "2 articles to train on, 12 questions of 2 others (0 of them behind fewer passages): --musique-records 12"
        in capsys.readouterr().out
    )
    assert json.loads(train.read_text())["data"] == articles[3:]
    found = list(read_questions(questions))
    assert [asked.name.split("-")[0] for asked in found] == ["A0", "A1"] * 6 + [
        "A2"
    ] * 5  # the last give lead-ins alone
    assert len({asked.name for asked in found}) == 17
    for question, answers, passages, name, _ in found:
        article, own = (int(number) for number in name.removeprefix("A").split("-"))
        assert str(own) in question
        assert answers in ([f"thing{article}x{own}"], ["red"])
        assert [p for p in passages if answers[0] in p] == [p for p in passages if f"passage {own} " in p] != []
        assert len(set(passages)) == 4
        assert all(f"In article {article}, " in p for p in passages)
    once = questions.read_text()
    held_out.main(words)
    assert questions.read_text() == once
    with pytest.raises(SystemExit):
        held_out.main([*words[:2], "--articles", "5", *words[4:]])
    assert "hold out at least two fewer" in capsys.readouterr().err
    articles[2]["paragraphs"] = articles[2]["paragraphs"][:4]
    squad.write_bytes(gzip.compress(json.dumps({"data": articles}).encode()))
    with pytest.raises(SystemExit):
        held_out.main(words)
    assert "article 3 has 4 passages with questions, and gives lead-ins with 5" in capsys.readouterr().err
