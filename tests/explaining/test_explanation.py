"""What `CacheTune.explain` says of a prompt: every token has a fate, every chunk a reason, and figures are those of other measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document
from cachetune_rag.explaining import Explanation, html_page
from cachetune_rag.measuring.divergence import kl_divergence

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
]
LONG = [" ".join(f"{chunk} {n}" for n in range(6)) for chunk in CHUNKS]
"""Long enough together that lead-ins are chosen, so that chunks have deviations."""
ALTERED = CHUNKS[0].replace("three brothers", "four brothers")
QUERY = "How many ships were there?"


@pytest.fixture(scope="module")
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(max_positions=8192), tokenizer()) as made:
        made.precompute([Document("tower", CHUNKS)])
        yield made


WHOLE = {"format": 1, "question": "", "model": "", "source": "server", "report": {}}
UNSHOWABLE = [
    WHOLE | {"report": {"ratio": "x"}},
    WHOLE | {"report": 3},
    WHOLE | {"parts": [{"kind": "odd", "start": 0, "runs": []}]},
    WHOLE | {"parts": [{"kind": "query", "start": 0, "runs": [{"fate": "odd", "tokens": 1}]}]},
    WHOLE | {"parts": [{"kind": "query", "start": 0, "runs": [{"fate": "reused", "tokens": "many"}]}]},
]


def fates(explanation: Explanation) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in explanation.parts:
        for run in part.runs:
            counts[run.fate] = counts.get(run.fate, 0) + run.tokens
    return counts


def explained(engine: CacheTune, chunks: list[str], **options: Any) -> Explanation:
    return engine.explain(QUERY, chunks, **{"ratio": 0.2, "max_new_tokens": 6, **options})


@pytest.mark.parametrize("selector", ["auto", "frequency", "chunk_head"])
@pytest.mark.parametrize("ratio", [0, 0.2, 1])
def test_fates_add_up_to_the_report(engine: CacheTune, ratio: float, selector: str) -> None:
    found = explained(engine, [CHUNKS[1], "A stranger's text.", CHUNKS[0]], ratio=ratio, selector=selector)
    counts, report = fates(found), found.report
    assert sum(counts.values()) == report["prompt_tokens"]
    assert counts.get("reused", 0) == report["reused"]
    assert counts.get("recomputed", 0) + counts.get("skipped", 0) == report["recomputed"]
    assert counts.get("skipped", 0) == report["skipped"]
    assert counts["missed"] == report["missed"] == len("A stranger's text.")
    assert counts.get("kept", 0) == report["prefix_kept"]


def test_parts_are_the_prompt(engine: CacheTune) -> None:
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    found = explained(engine, CHUNKS)
    assert "".join(run.text or "" for part in found.parts for run in part.runs) == engine.tokenizer.decode(prompt.ids)
    chunks = [part for part in found.parts if part.kind == "chunk"]
    assert ["".join(run.text or "" for run in part.runs) for part in chunks] == CHUNKS
    assert [part.start for part in chunks] == [span.start for span in prompt.spans]
    assert [part.kind for part in found.parts] == ["prefix", *["chunk", "between"] * 2, "chunk", "query"]


def test_characters_of_several_tokens_are_not_cut_in_two(engine: CacheTune) -> None:
    text = "Ærøskøbing lies on Ærø — 55°N, 日本."
    engine.precompute([Document("place", [text])])
    found = explained(engine, [text], ratio=0.5, selector="random")
    (part,) = (part for part in found.parts if part.kind == "chunk")
    assert len(part.runs) > 5
    assert "".join(run.text or "" for run in part.runs) == text


def test_a_miss_names_the_nearest_stored_text_and_the_first_difference(engine: CacheTune) -> None:
    stored, missed, stranger = explained(engine, [CHUNKS[1], ALTERED, "Zebras graze."]).chunks
    assert (stored.outcome, stored.document, stored.tier, stored.codec) == ("stored", "tower", "host", "exact")
    assert stored.near is None
    assert missed.outcome == "missed"
    assert missed.near is not None
    assert CHUNKS[0][: missed.near.at] == ALTERED[: missed.near.at]
    assert (missed.near.shown[0], missed.near.stored[0]) == ("f", "t")
    assert missed.near.shown == ALTERED[missed.near.at :][:60]
    assert missed.near.stored == CHUNKS[0][missed.near.at :][:60]
    assert stranger.near is None
    assert stranger.why == "It is not in the store."


@pytest.mark.parametrize(
    ("shown", "change"),
    [
        (CHUNKS[2].upper(), "case"),
        (CHUNKS[2].replace(" ", "  "), "whitespace"),
        (CHUNKS[2][:40], "truncated"),
        (CHUNKS[2].replace("'", "’"), "unicode"),
    ],
)
def test_a_miss_says_what_was_changed(engine: CacheTune, shown: str, change: str) -> None:
    (chunk,) = explained(engine, [shown]).chunks
    assert chunk.near is not None
    assert chunk.near.change == change


def test_texts_outside_of_chunks_that_are_almost_stored_are_named(engine: CacheTune) -> None:
    text = f"{'Read this. ' * 10}\n{CHUNKS[2].upper()}\nWhat is it?"
    found = engine.explain(prompt=engine.prompt_from_text(text), ratio=0.2, max_new_tokens=2)
    assert found.chunks == ()
    assert [near.change for near in found.near] == ["case"]
    assert found.near[0].shown == CHUNKS[2].upper()[1:61]  # both begin with "T"


def test_a_chunk_of_a_removed_document_is_told_from_one_that_was_never_stored() -> None:
    with CacheTune(llama(), tokenizer()) as one:
        one.precompute([Document("tower", CHUNKS)])
        key = next(iter(one.documents())).chunks[0]
        assert one.store.discard(key)
        gone, other = explained(one, [CHUNKS[0], "Zebras graze."]).chunks
        assert gone.outcome == "missed"
        assert "not stored any more" in gone.why
        assert gone.document == "tower"
        assert other.why == "It is not in the store."


def test_the_same_text_of_another_model_is_named_and_that_of_another_tenant_is_not(tmp_path: Any) -> None:
    with CacheTune(llama(seed=1), tokenizer(), tmp_path) as other:
        other.precompute([Document("tower", CHUNKS[:1])])
    with CacheTune(llama(), tokenizer(), tmp_path, tenant="neighbour") as neighbour:
        neighbour.precompute([Document("tower", CHUNKS[1:2])])
    with CacheTune(llama(), tokenizer(), tmp_path) as mine:
        first, second = explained(mine, CHUNKS[:2]).chunks
        assert "another model" in first.why
        assert second.why == "It is not in the store."
        assert second.near is None
        assert second.document is None


def test_divergence_is_what_comparing_by_hand_gives(engine: CacheTune) -> None:
    found = explained(engine, CHUNKS, compare=True)
    assert found.divergence is not None
    assert found.full is not None
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    full = engine.full_prefill(prompt=prompt)
    reuse = engine.prefill(prompt=prompt, ratio=0.2)
    assert found.divergence.first_kl == pytest.approx(float(kl_divergence(full.logits, reuse.logits)), rel=1e-5)
    # The answer of full prefill, token by token, by the model itself.
    model, ids, kl, same = engine.adapter.model, list(prompt.ids), [], []
    with torch.no_grad():
        logits, step = reuse.logits, engine.adapter.steps(reuse.cache)
        for at in range(len(found.divergence.tokens)):
            true = model(torch.tensor([ids])).logits[:, -1]
            kl.append(float(kl_divergence(true, logits)))
            same.append(bool(true.argmax() == logits.argmax()))
            ids.append(int(true.argmax()))
            if at + 1 < len(found.divergence.tokens):
                logits = step(ids[-1])
    assert [token.kl for token in found.divergence.tokens] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert [token.same for token in found.divergence.tokens] == same
    assert found.divergence.mean_kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    answer = engine.generate(prompt=prompt, reuse=False, max_new_tokens=6, do_sample=False)
    assert found.full.text == answer.text


def test_answers_are_those_of_a_request(engine: CacheTune) -> None:
    found = explained(engine, CHUNKS)
    assert found.reuse is not None
    answer = engine.generate(QUERY, CHUNKS, ratio=0.2, max_new_tokens=6, do_sample=False)
    assert (found.reuse.text, found.reuse.tokens) == (answer.text, len(answer.token_ids))
    assert found.full is None
    assert found.divergence is None


def test_attention_adds_up_and_is_that_of_the_model(engine: CacheTune) -> None:
    found = explained(engine, CHUNKS, compare=True)
    assert sum(part.attention or 0 for part in found.parts) == pytest.approx(1, abs=1e-4)
    prompt = engine.prompts.build(query=QUERY, chunks=CHUNKS)
    model = llama(max_positions=8192)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        every = torch.stack(model(torch.tensor([prompt.ids]), output_attentions=True).attentions)
    assert found.attention is not None
    watched = every[:, 0, :, -found.attention.watched :].mean((0, 1, 2))
    assert found.attention.watched == len(prompt.ids) - prompt.spans[-1].end
    for part in found.parts:
        assert part.attention_full == pytest.approx(
            float(watched[part.start : part.start + part.tokens].sum()), abs=1e-4
        )
    exact = explained(engine, CHUNKS, ratio=1)
    assert exact.attention is not None
    assert exact.attention.first_token == pytest.approx(float(watched[0]), abs=1e-4)
    inside = {place for span in prompt.spans for place in range(span.start, span.end)}
    assert exact.attention.most[0].place == max(inside, key=lambda place: float(watched[place]))
    assert {token.chunk for token in exact.attention.most} <= {0, 1, 2}


def test_expected_error_is_left_where_tokens_are_reused() -> None:
    with CacheTune(llama(max_positions=8192), tokenizer()) as one:
        one.precompute(LONG)
        assert len(one.namespace.lead_ins) > 1
        lefts = [explained(one, LONG, ratio=ratio).predicted for ratio in (0, 0.3, 1)]
        assert [left.left for left in lefts if left is not None][::2] == [pytest.approx(1), 0]
        some = explained(one, LONG, ratio=0.3)
        assert some.predicted is not None
        assert 0 < (some.predicted.left or 0) < 0.7  # the tokens with most of it were recomputed
        assert sum(part.expected_error or 0 for part in some.parts) == pytest.approx(some.predicted.left)


def test_what_was_calibrated_predicts_the_divergence() -> None:
    with CacheTune(llama(max_positions=8192), tokenizer()) as one:
        one.precompute(LONG)
        before = explained(one, LONG).predicted
        assert before is not None
        assert (before.calibrated, before.kl) == (None, None)
        one.calibrate(
            [{"query": f"{QUERY} {n}", "chunks": LONG[n % 3 :] + LONG[: n % 3]} for n in range(10)],
            tokens=2,
            ratios=[0.1, 0.4],
        )
        found = one.explain(QUERY, LONG, max_kl=1e9, max_new_tokens=2)
        assert found.predicted is not None
        assert found.predicted.calibrated is not None
        (taken,) = (each for each in found.report["prediction"]["ladder"] if each["ratio"] == found.report["ratio"])
        assert (found.predicted.kl, found.predicted.top1) == pytest.approx((taken["kl"], taken["top1"]))
        assert "nats at the first token of the answer, and" in html_page(found)
        assert "The ratio was taken for a bound" in html_page(found)


def test_a_prompt_costs_what_a_request_costs() -> None:
    """Whatever is predicted is not among the selector's work, with or without a calibration."""
    with CacheTune(llama(max_positions=8192), tokenizer()) as one:
        one.precompute(LONG)
        one.calibrate([{"query": f"{QUERY} {n}", "chunks": LONG} for n in range(10)], tokens=2, ratios=[0.1, 0.4])
        probed = {}
        for name, read in (("request", one.prefill), ("explained", one.explain)):
            one.runtime.assembler.forget()  # no kept beginning
            found = read(QUERY, LONG, ratio=0.2, selector="expected_error_early")
            probed[name] = found.report["probed"] if isinstance(found, Explanation) else found.report.probed
        assert probed["explained"] == probed["request"] > 0
        assert isinstance(found, Explanation)


def test_many_missed_chunks_take_one_pass_over_the_stored_texts(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, texts, passes = engine.runtime.recognizer.scan, engine.store.texts, []
    monkeypatch.setattr(engine.runtime.recognizer, "scan", lambda look: passes.append("scan") or scan(look))

    def counted(**wanted: Any) -> Any:
        passes.extend(["texts"] if not wanted else [])
        return texts(**wanted)

    monkeypatch.setattr(engine.store, "texts", counted)
    missed = [chunk.replace("e", "a") for chunk in CHUNKS] + [chunk.upper() for chunk in CHUNKS]
    found = explained(engine, missed)
    assert [chunk.near is not None for chunk in found.chunks] == [True] * 6
    assert passes.count("texts") == 1
    assert passes.count("scan") <= 2  # the chunks, and what stands outside of them
    monkeypatch.setattr("cachetune_rag.explaining.explainer.SECONDS", -1.0)
    assert explained(engine, missed).report["missed"]


def test_looking_changes_nothing(engine: CacheTune) -> None:
    before, stored = engine.stats(), len(list(engine.store.texts()))
    first = explained(engine, [CHUNKS[0], "Never stored before."], compare=True)
    second = explained(engine, [CHUNKS[0], "Never stored before."], compare=True)
    assert engine.stats().requests == before.requests
    assert engine.flush()
    assert len(list(engine.store.texts())) == stored
    assert first.report["missed"] == second.report["missed"] > 0
    assert first.parts[1:] == second.parts[1:]


def test_json_and_back(engine: CacheTune) -> None:
    found = explained(engine, [*CHUNKS, ALTERED], compare=True)
    assert Explanation.from_dict(json.loads(json.dumps(found.as_dict()))) == found


@pytest.mark.parametrize("given", [{}, {"format": 99}, {"format": 1, "parts": 3}, {"format": 1, "odd": 1}, *UNSHOWABLE])
def test_what_is_no_explanation_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is no explanation"):
        Explanation.from_dict(given)


def test_arguments_are_checked(engine: CacheTune) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        explained(engine, CHUNKS, max_new_tokens=0)
    with pytest.raises(ConfigError, match="compare"):
        explained(engine, CHUNKS, compare="yes")
    with pytest.raises(ConfigError, match="selector"):
        explained(engine, CHUNKS, selector="best")
