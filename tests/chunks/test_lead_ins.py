"""Lead-ins: which are chosen, that everybody on a store follows the same ones, and what is stored behind them."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer
from torch import Tensor

import cachetune_rag.chunks.lead_ins as lead_ins_module
import cachetune_rag.chunks.precompute as precompute_module
from cachetune_rag import CacheTune, Document
from cachetune_rag.chunks.lead_in_choice import choose_lead_ins, lead_ins_for, note_of
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.errors import ConfigError, PromptError
from cachetune_store import ChunkStore, Namespace, StorePathError, get_codec, make_key

BASE = Namespace("model", "tokenizer", "float32", ((1,),))
QUERY = "How many?"


def prose(tokens: int, seed: int) -> str:
    """Text of so many tokens (bytes) in which no 32 characters come twice."""
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefghijklmnopqrst      ") for _ in range(tokens - 1)) + "."


DOCUMENTS = [Document(f"d{i}", [prose(150 + 10 * i, 10 * i), prose(90, 10 * i + 1)]) for i in range(6)]
CHUNKS = [chunk for document in DOCUMENTS for chunk in document.chunks]
TOTAL = sum(map(len, CHUNKS))


def fresh(store: Path | ChunkStore | None = None, **options: Any) -> CacheTune:
    return CacheTune(llama(), tokenizer(), store, **options)


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with fresh() as made:
        yield made


def stored(engine: CacheTune, text: str) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Keys and values of a stored chunk by token, and its deviations."""
    with engine.store.open(make_key(engine.namespace, engine.prompts.encode(text))) as reader:
        layout, back = reader.layout, reader.order.argsort()
        rows = [
            get_codec("exact").decode(reader.read(i, layout.tokens), s, layout.dtype)
            for i, s in enumerate(layout.layers)
        ]
        return [(k[back], v[back]) for k, v in rows], reader.deviations


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# -- choosing ----------------------------------------------------------------------------------------------------------


def numbers(*lengths: int) -> list[tuple[int, ...]]:
    start, texts = 0, []
    for length in lengths:
        texts.append(tuple(range(start, start + length)))
        start += length
    return texts


def test_lead_ins_are_spread_over_all_of_the_text() -> None:
    lead_ins = choose_lead_ins(numbers(*[100] * 40), (7,), 255)
    assert lead_ins is not None
    assert [len(lead_in) for lead_in in lead_ins] == [256] * 4
    for part, lead_in in enumerate(lead_ins):
        assert lead_in[0] == 7
        start = lead_in[1]
        assert lead_in[1:] == tuple(range(start, start + 255))
        assert start % 100 == 0, "it begins where a text begins"
        assert 1000 * part <= start <= 1000 * (part + 1) - 255
    assert choose_lead_ins(numbers(*[100] * 40), (7,), 255) == lead_ins


def test_lead_ins_end_as_what_stands_before_a_chunk_does() -> None:
    lead_ins, plain = choose_lead_ins(numbers(2000), (7,), 255, (3, 4)), choose_lead_ins(numbers(2000), (7,), 255)
    assert lead_ins is not None
    assert plain is not None
    assert lead_ins == tuple((*lead_in[:-2], 3, 4) for lead_in in plain)
    assert choose_lead_ins(numbers(2000), (7,), 7, (3, 4)) == choose_lead_ins(numbers(2000), (7,), 7), (
        "it would be most of the lead-in"
    )
    with CacheTune(llama(), tokenizer(), chunk_separator=" -- ") as engine:
        engine.precompute(DOCUMENTS)
        end, lead_ins = tuple(engine.prompts.encode(" -- ")), engine.namespace.lead_ins
        assert all(lead_in[-len(end) :] == end for lead_in in lead_ins)
        assert len(lead_ins) > 1


def test_a_single_text_is_enough_if_it_is_long() -> None:
    lead_ins = choose_lead_ins(numbers(1024), (7,), 255)
    assert lead_ins is not None
    covered = [token for lead_in in lead_ins for token in lead_in[1:]]
    assert len(set(covered)) == len(covered) == 4 * 255
    assert choose_lead_ins(numbers(1023), (7,), 255) is None
    assert choose_lead_ins([], (7,), 255) is None


def namespace_of(lead_ins: tuple[tuple[int, ...], ...]) -> Namespace:
    return Namespace("model", "tokenizer", "float32", lead_ins)


def test_a_lead_in_that_shares_a_stretch_with_the_chunk_is_left_out() -> None:
    lead_ins = tuple((1, *range(base, base + 255)) for base in (1000, 2000, 3000))
    namespace = namespace_of(lead_ins)
    chunk = [5] * 50
    assert lead_ins_for(chunk, namespace) == lead_ins
    assert lead_ins_for([*chunk, *range(2100, 2131), *chunk], namespace) == lead_ins  # 31 tokens in a row
    assert lead_ins_for([*chunk, *range(2100, 2132), *chunk], namespace) == (lead_ins[0], lead_ins[2])
    assert lead_ins_for([*range(1254 - 31, 1255), 5, *range(3000, 3032)], namespace) == (lead_ins[1],)
    assert lead_ins_for([*range(1000, 1100), *range(2000, 2100), *range(3000, 3100)], namespace) == ((1,),)
    assert lead_ins_for(list(range(1000, 1031)), namespace) == lead_ins  # shorter than a stretch


def test_a_lead_in_that_does_not_fit_with_the_chunk_is_left_out() -> None:
    lead_ins = ((1, *range(100, 300)), (1, *range(400, 450)))
    namespace = namespace_of(lead_ins)
    assert lead_ins_for([5] * 90, namespace, 300) == lead_ins
    assert lead_ins_for([5] * 100, namespace, 300) == (lead_ins[1],)
    assert lead_ins_for([5] * 280, namespace, 300) == ((1,),)


def test_a_single_lead_in_is_always_kept() -> None:
    namespace = namespace_of(((1, *range(100, 300)),))
    assert lead_ins_for(list(range(100, 300)), namespace, 300) == namespace.lead_ins


def test_short_contexts_get_short_lead_ins() -> None:
    with CacheTune(llama(max_positions=200), tokenizer()) as engine:
        engine.precompute([Document(d.id, [c[:100] for c in d.chunks]) for d in DOCUMENTS])
        assert {len(lead_in) for lead_in in engine.namespace.lead_ins} == {200 // 4}
        assert engine.prefill(query="?", chunks=[CHUNKS[0][:60]], prefix="").report.missed == 60


# -- what is stored ------------------------------------------------------------------------------------------------------


def test_a_corpus_is_stored_as_the_mean_over_four_lead_ins(engine: CacheTune) -> None:
    summary = engine.precompute(DOCUMENTS)
    assert (summary.lead_ins, summary.chunks, summary.tokens) == (4, len(CHUNKS), TOTAL)
    assert "4 lead-ins" in str(summary)
    lead_ins = engine.namespace.lead_ins
    assert [(len(lead_in), lead_in[0]) for lead_in in lead_ins] == [(256, engine.prompts.first_token)] * 4
    everything = "".join(CHUNKS)
    separator = engine.prompts.separator_ids
    assert all(lead_in[-len(separator) :] == separator for lead_in in lead_ins)
    assert all(tokenizer().decode(lead_in[1 : -len(separator)]) in everything for lead_in in lead_ins)
    left_out = 0
    for text in CHUNKS:
        ids = engine.prompts.encode(text)
        kept = lead_ins_for(ids, engine.namespace)
        left_out += 4 - len(kept)
        captures = [engine.adapter.capture([ids], lead_in)[0] for lead_in in kept]
        layers, deviations = stored(engine, text)
        for layer, pair in enumerate(layers):
            for i, found in enumerate(pair):
                wanted = torch.stack([c.layers[layer][i] for c in captures]).mean(0)
                assert difference(found, wanted) <= 1e-5
        assert (deviations is None) == (len(kept) == 1)
    assert left_out > 0, "the lead-ins come from these chunks"


def test_too_little_text_stands_behind_the_first_token(engine: CacheTune) -> None:
    summary = engine.precompute(DOCUMENTS[:2])
    assert summary.lead_ins == 1
    assert engine.namespace.lead_ins == ((engine.prompts.first_token,),)
    ids = engine.prompts.encode(CHUNKS[0])
    (captured,) = engine.adapter.capture([ids], [engine.prompts.first_token])
    layers, deviations = stored(engine, CHUNKS[0])
    assert deviations is None
    assert all(
        torch.equal(a, b) for x, y in zip(layers, captured.layers, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_first_token_stays_whatever_comes() -> None:
    with fresh(lead_in="first_token") as engine:
        assert engine.precompute(DOCUMENTS).lead_ins == 1
        assert engine.namespace.lead_ins == ((engine.prompts.first_token,),)


def test_batches_give_what_single_chunks_give() -> None:
    with fresh() as single, fresh(batch_tokens=700) as batched:
        for engine in (single, batched):
            engine.precompute([Document("all", CHUNKS)])
        assert single.namespace == batched.namespace
        for text in CHUNKS:
            (a, spread_a), (b, spread_b) = stored(single, text), stored(batched, text)
            for x, y in zip(a, b, strict=True):
                assert difference(x[0], y[0]) <= 1e-5
                assert difference(x[1], y[1]) <= 1e-5
            assert (spread_a is None) == (spread_b is None)
            if spread_a is not None:
                assert difference(spread_a, spread_b) <= 1e-2


def test_no_batch_runs_more_tokens_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh(batch_tokens=600, lead_in=[[1, 50, 60], [1, 70]]) as engine:
        sizes = _watch_batches(engine, monkeypatch)
        engine.precompute([Document("all", CHUNKS)])
    assert max(len(batch) for batch in sizes) > 1
    assert all(len(batch) * max(batch) <= 600 for batch in sizes)


def _watch_batches(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    sizes: list[list[int]] = []
    real = engine.adapter.capture_behind

    def capture_behind(chunks: list[list[int]], *rest: Any) -> None:
        sizes.append([len(c) for c in chunks])
        real(chunks, *rest)

    monkeypatch.setattr(engine.adapter, "capture_behind", capture_behind)
    return sizes


def test_a_lead_in_is_run_once(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, ...]] = []
    real = engine.adapter.lead_kv

    def lead_kv(lead_in: tuple[int, ...]) -> Any:
        runs.append(lead_in)
        return real(lead_in)

    monkeypatch.setattr(engine.adapter, "lead_kv", lead_kv)
    engine.precompute(DOCUMENTS)
    assert sorted(runs) == sorted(engine.namespace.lead_ins)
    assert engine.precompute(DOCUMENTS).skipped == len(CHUNKS)
    assert engine.prefill(query=QUERY, chunks=[prose(90, 700)]).report.missed == 90
    assert len(runs) == 4


def test_full_recompute_is_full_prefill_behind_any_lead_ins(engine: CacheTune) -> None:
    engine.precompute(DOCUMENTS)
    full = engine.full_prefill(query=QUERY, chunks=CHUNKS[:4])
    state = engine.prefill(query=QUERY, chunks=CHUNKS[:4], ratio=1.0)
    assert state.report.missed == 0
    assert difference(state.logits, full.logits) <= 1e-5
    some = engine.prefill(query=QUERY, chunks=CHUNKS[:4], ratio=0.2, selector="frequency")
    assert some.report.reused > 0
    assert difference(some.logits, full.logits) > 1e-3


# -- given ones -----------------------------------------------------------------------------------------------------------


def test_one_chunk_right_behind_its_given_lead_in_is_full_prefill() -> None:
    lead_in = [tokenizer().bos_token_id, *tokenizer().encode("Some words before. ", add_special_tokens=False)]
    with fresh(lead_in=lead_in, prompt_template="<s>Some words before. {prefix}{chunks}{query}") as engine:
        engine.precompute(DOCUMENTS)
        assert engine.namespace.lead_ins == (tuple(lead_in),)
        state = engine.prefill(query=QUERY, chunks=CHUNKS[:1], prefix="", ratio=0, selector="none")
        assert (state.report.reused, state.report.recomputed) == (len(CHUNKS[0]), 0)
        full = engine.full_prefill(query=QUERY, chunks=CHUNKS[:1], prefix="")
        assert difference(state.logits, full.logits) <= 1e-5


@pytest.mark.parametrize("several", [[[1, 50, 60], [1, 70]], [[1], []]])
def test_several_may_be_given(several: list[list[int]]) -> None:
    with fresh(lead_in=several) as engine:
        assert engine.precompute(DOCUMENTS[:1]).lead_ins == 2
        ids = engine.prompts.encode(CHUNKS[0])
        captures = [engine.adapter.capture([ids], lead_in)[0] for lead_in in several]
        layers, deviations = stored(engine, CHUNKS[0])
        assert deviations is not None
        for layer, (k, v) in enumerate(layers):
            assert difference(k, torch.stack([c.layers[layer][0] for c in captures]).mean(0)) <= 1e-5
            assert difference(v, torch.stack([c.layers[layer][1] for c in captures]).mean(0)) <= 1e-5


@pytest.mark.parametrize("wrong", ["none", [[1], 2], [1, [2]], [1.5], [-1], [[1], [10**6]], [True], ["a"], 5, None])
def test_what_is_no_lead_in_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"lead_in is .*'auto', 'first_token'"):
        fresh(lead_in=wrong)


# -- agreement ------------------------------------------------------------------------------------------------------------


def test_a_later_engine_follows(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine:
        engine.precompute(DOCUMENTS)
        expected = engine.namespace
    with fresh(tmp_path) as engine:
        assert engine.namespace == expected
        assert engine.prefill(query=QUERY, chunks=CHUNKS[:3]).report.missed == 0
        assert engine.precompute(DOCUMENTS).skipped == len(CHUNKS)
    with fresh(tmp_path, lead_in="first_token") as engine:
        assert len(engine.namespace.lead_ins) == 1


@pytest.mark.parametrize("shared", ["directory", "object"])
def test_an_engine_that_was_open_before_follows(tmp_path: Path, shared: str) -> None:
    store = ChunkStore(tmp_path if shared == "directory" else None)
    with store, fresh(store) as early, fresh(store if shared == "object" else tmp_path) as late:
        early.precompute(DOCUMENTS[:1])
        assert early.prefill(query=QUERY, chunks=CHUNKS[:1]).report.missed == 0
        late.precompute(DOCUMENTS)
        assert early.namespace == late.namespace != early.lead_ins.namespaces[1]
        assert early.prefill(query=QUERY, chunks=CHUNKS[2:4]).report.missed == 0
        assert early.precompute(DOCUMENTS).skipped == len(CHUNKS)


def test_of_two_that_choose_at_once_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh(tmp_path) as first, fresh(tmp_path) as second:
        real = lead_ins_module.choose_lead_ins

        def choose_late(*given: Any) -> Any:
            """Between the second one's look at the store and its writing, the first one chooses."""
            monkeypatch.setattr(lead_ins_module, "choose_lead_ins", real)
            first.precompute(DOCUMENTS[::-1])
            return real(*given)

        monkeypatch.setattr(lead_ins_module, "choose_lead_ins", choose_late)
        second.precompute(DOCUMENTS)
        assert first.namespace == second.namespace
        assert len(first.namespace.lead_ins) == 4
        assert first.prefill(query=QUERY, chunks=CHUNKS).report.missed == 0
    assert len(list((tmp_path / "notes").glob("*/*.json"))) == 1


def test_another_tenant_sees_none_of_them(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine, fresh(tmp_path, tenant="other") as other:
        engine.precompute(DOCUMENTS)
        assert len(other.namespace.lead_ins) == 1
        assert other.precompute([Document("x", [prose(600, 900), prose(600, 901)])]).lead_ins == 4
        assert not set(other.namespace.lead_ins) & set(engine.namespace.lead_ins)


def test_a_disk_that_fails_for_a_moment_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with fresh(tmp_path) as engine:
        engine.precompute(DOCUMENTS)
    with fresh(tmp_path) as engine:
        real = engine.namespace

        def note(*_: Any, **__: Any) -> None:
            raise StorePathError("can't use the store (Input/output error)")

        monkeypatch.setattr(engine.store, "note", note)
        assert engine.namespace == real
        assert engine.prefill(query=QUERY, chunks=CHUNKS[:2]).report.missed == 0
        assert "Input/output error" in caplog.text


def test_deleting_a_tenant_takes_its_lead_ins_along(tmp_path: Path) -> None:
    with fresh(tmp_path, tenant="a") as engine, fresh(tmp_path) as other:
        engine.precompute(DOCUMENTS)
        other.precompute(DOCUMENTS)
        before = engine.namespace
        engine.store.delete_tenant("a")
        assert len(engine.namespace.lead_ins) == 1
        assert engine.precompute(DOCUMENTS[::-1]).lead_ins == 4
        assert engine.namespace != before
        assert len(other.namespace.lead_ins) == 4
        assert other.prefill(query=QUERY, chunks=CHUNKS[:2]).report.missed == 0


def test_they_outlive_the_index_and_every_check(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine:
        engine.precompute(DOCUMENTS)
        expected = engine.namespace
    shutil.rmtree(tmp_path / "index")
    with fresh(tmp_path) as engine:
        assert engine.store.verify().ok
        assert engine.namespace == expected
        assert engine.precompute(DOCUMENTS).skipped == len(CHUNKS)


# -- when they come -------------------------------------------------------------------------------------------------------


def test_when_a_corpus_grows_its_old_chunks_are_misses_and_stored_anew(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine:
        assert engine.precompute(DOCUMENTS[:1]).lead_ins == 1
        plain = f"Passages: {CHUNKS[0]}"
        assert engine.prompt_from_text(plain).recognised == 1
        assert engine.precompute(DOCUMENTS[1:]).lead_ins == 4
        state = engine.prefill(query=QUERY, chunks=CHUNKS[:3], ratio=0, selector="none")
        assert state.report.missed == len(CHUNKS[0]) + len(CHUNKS[1])
        assert state.report.reused == len(CHUNKS[2])
        assert engine.prompt_from_text(plain).recognised == 1
        assert engine.prefill(query=QUERY, chunks=CHUNKS[:3], ratio=0, selector="none").report.missed == 0
        again = engine.precompute(DOCUMENTS)
        assert (again.chunks, again.skipped) == (0, len(CHUNKS))
    with fresh(tmp_path) as engine:  # what stood behind the first token went when its document moved on
        assert list(engine.store.texts(namespace=engine.lead_ins.namespaces[1])) == []


def test_small_jobs_add_up(engine: CacheTune) -> None:
    counts = [engine.precompute(document).lead_ins for document in DOCUMENTS]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 4)
    # The same text again is no more text.
    with fresh() as other:
        for _ in range(8):
            assert other.precompute(DOCUMENTS[:2]).lead_ins == 1


def test_missed_chunks_of_requests_are_texts_too(engine: CacheTune) -> None:
    for document in DOCUMENTS:
        engine.prefill(query=QUERY, chunks=document.chunks)
    assert len(engine.namespace.lead_ins) == 4
    assert engine.prefill(query=QUERY, chunks=DOCUMENTS[-1].chunks).report.missed == 0


def test_requests_never_change_the_lead_ins_of_a_store_filled_on_purpose(tmp_path: Path) -> None:
    with fresh(tmp_path, lead_in="first_token") as engine:
        engine.precompute(DOCUMENTS)
    more = [prose(400, 800 + i) for i in range(3)]
    with fresh(tmp_path) as engine:
        assert engine.prefill(query=QUERY, chunks=more).report.missed == 1200
        assert len(engine.namespace.lead_ins) == 1
        assert engine.prefill(query=QUERY, chunks=[*more, *CHUNKS[:2]]).report.missed == 0
        assert engine.precompute([Document("more", more)]).lead_ins == 4  # indexing does


def test_reading_ahead_is_bounded(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute_module, "MOST_TOKENS", 1100)
    given: list[str] = []

    def source() -> Iterator[Document]:
        for document in DOCUMENTS:
            given.append(document.id)
            yield document

    ahead: list[int] = []
    engine.precompute(source(), progress=lambda progress: ahead.append(len(given) - progress.documents))
    assert len(engine.namespace.lead_ins) == 4
    read = sum(sum(map(len, d.chunks)) for d in DOCUMENTS[: max(ahead)])
    assert 1100 <= read < 1100 + 300
    assert ahead[-1] == 0


def test_what_came_before_a_broken_document_is_stored_behind_lead_ins(engine: CacheTune) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        engine.precompute([*DOCUMENTS, Document("bad", ["\ud800"])])
    assert len(engine.namespace.lead_ins) == 4
    assert engine.precompute(DOCUMENTS).skipped == len(CHUNKS)


# -- damage ---------------------------------------------------------------------------------------------------------------


NOTE = note_of(Namespace("model", "tokenizer", "float32", ((1, 20, 300), (1, 40))))


def reading(content: bytes, vocabulary: int = 500) -> tuple[LeadIns, ChunkStore]:
    store = ChunkStore(None)
    store.settle_note(BASE.digest, content, tenant=BASE.tenant)
    return LeadIns(store, BASE, choose=True, vocabulary=vocabulary, limit=None), store


def _change(**changes: Any) -> bytes:
    return json.dumps(json.loads(NOTE) | changes).encode()


def test_a_note_is_what_it_was() -> None:
    ins, store = reading(NOTE)
    assert ins.namespace.lead_ins == ((1, 20, 300), (1, 40))
    assert store.note(BASE.digest) == NOTE


@pytest.mark.parametrize(
    "content",
    [
        NOTE[:-9],
        b"",
        b"\xff" * 100,
        b"[" * 100_000,
        b"[1, 2]",
        NOTE.replace(b"20", b"21"),
        _change(format="other"),
        _change(digest="0" * 64),
        _change(lead_ins=[]),
        _change(lead_ins=[[1], []]),
        _change(lead_ins=[[1.5]]),
        _change(lead_ins=[[1]] * 1000),
        _change(lead_ins={"a": 1}),
        note_of(Namespace("model", "tokenizer", "float32", ((1, 500),))),  # no such token
        note_of(Namespace("model", "tokenizer", "float32", ((1,) * (1 << 15),))),
        note_of(Namespace("model", "tokenizer", "float32", ((1, 20),), "another tenant")),
    ],
)
def test_a_damaged_or_forged_note_is_none(content: bytes) -> None:
    ins, store = reading(content)
    assert ins.undecided
    assert ins.namespace == BASE
    assert store.note(BASE.digest) is None


def test_a_damaged_choice_is_set_aside_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lead_ins_module, "RECENT_SECONDS", 0.0)  # a request looks again, however soon it comes
    with fresh(tmp_path) as engine:
        engine.precompute(DOCUMENTS)
        good, (note,) = engine.namespace, (tmp_path / "notes").glob("*/*.json")
        note.write_bytes(b"x" * (2 << 20))
        assert (
            engine.prefill(query=QUERY, chunks=CHUNKS[:2]).report.missed == 0
        )  # it has read it before, and restores it
    with fresh(tmp_path) as engine:
        assert engine.namespace == good
    note.write_bytes(b"x" * (2 << 20))
    with fresh(tmp_path) as engine, caplog.at_level(logging.WARNING):
        assert len(engine.namespace.lead_ins) == 1
        assert "set aside" in caplog.text
        assert str(tmp_path) in caplog.text
        assert engine.precompute(DOCUMENTS).lead_ins == 4
    with fresh(tmp_path) as engine:
        assert engine.precompute(DOCUMENTS).skipped == len(CHUNKS)
