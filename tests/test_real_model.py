"""The real SmolLM2-135M-Instruct, from its package: the engine's promises hold outside toy models too."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cachetune_rag import CacheTune, Document
from cachetune_rag.text.splitting import Splitter

pytestmark = pytest.mark.real_model

QUERY = "What does the nonlocal statement do?"


@pytest.fixture(scope="module")
def engine(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheTune]:
    with CacheTune.from_pretrained(smollm2_path, tmp_path_factory.mktemp("kv"), device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def chunks(engine: CacheTune) -> list[str]:
    splitter = Splitter(lambda text: len(engine.prompts.encode(text)), 128)
    texts = [c for topic in ("nonlocal", "with", "assert") for c in splitter.split(pydoc_data.topics.topics[topic])]
    engine.precompute([Document("topics", texts)])
    return texts[:5]


def divergence(full: torch.Tensor, ours: torch.Tensor) -> float:
    reference, odds = full.log_softmax(-1), ours.log_softmax(-1)
    return float((reference.exp() * (reference - odds)).sum())


def test_recomputing_everything_is_full_prefill(engine: CacheTune, chunks: list[str]) -> None:
    full = engine.full_prefill(query=QUERY, chunks=chunks).logits
    ours = engine.prefill(query=QUERY, chunks=chunks, ratio=0.999, selector="probe")
    assert ours.report.reused > 0
    # All but one or two tokens recomputed: next to nothing is left to differ.
    assert divergence(full, ours.logits) < 1e-2
    assert torch.allclose(engine.prefill(query=QUERY, chunks=chunks, ratio=1.0).logits, full, atol=1e-4)


def test_recomputing_some_is_closer_than_recomputing_none(engine: CacheTune, chunks: list[str]) -> None:
    orders = (chunks, chunks[::-1], chunks[2:] + chunks[:2])
    total = {"none": 0.0, "probe": 0.0, "expected_error": 0.0}
    for order in orders:
        full = engine.full_prefill(query=QUERY, chunks=order).logits
        for selector in total:
            state = engine.prefill(query=QUERY, chunks=order, ratio=0.3, selector=selector)
            assert state.report.missed == 0
            total[selector] += divergence(full, state.logits)
    assert 0 < total["probe"] < total["none"]
    assert 0 < total["expected_error"] < total["none"]


def test_an_answer_is_text_about_the_question(engine: CacheTune, chunks: list[str]) -> None:
    answer = engine.generate(query=QUERY, chunks=chunks, max_new_tokens=24, do_sample=False)
    assert "nonlocal" in answer.text
    assert "<|im_end|>" not in answer.text
    assert answer.report.reused + answer.report.recomputed == sum(len(engine.prompts.encode(c)) for c in chunks)


def test_lead_ins_begin_as_prompts_do_and_go_on_as_the_corpus_does(engine: CacheTune, chunks: list[str]) -> None:
    prompt = engine.prompts.build(query=QUERY, chunks=[])
    leads = engine.namespace.lead_ins
    assert [(lead[0], len(lead)) for lead in leads] == [(prompt.ids[0], 256)] * 4
    assert engine.tokenizer.decode([prompt.ids[0]]) == "<|im_start|>"
    corpus = "".join(pydoc_data.topics.topics[topic] for topic in ("nonlocal", "with", "assert"))
    assert all(engine.tokenizer.decode(lead[40:60]) in corpus for lead in leads)


def test_the_mean_over_lead_ins_is_closer_than_the_first_token(
    engine: CacheTune, chunks: list[str], tmp_path: Path
) -> None:
    orders = (chunks, chunks[::-1], chunks[2:] + chunks[:2])
    with CacheTune(engine.adapter.model, engine.tokenizer, tmp_path, lead_in="first_token") as single:
        single.precompute([Document("topics", chunks)])
        total = {"mean": 0.0, "first": 0.0}
        for order in orders:
            full = engine.full_prefill(query=QUERY, chunks=order).logits
            for name, one in (("mean", engine), ("first", single)):
                state = one.prefill(query=QUERY, chunks=order, ratio=0, selector="none")
                assert state.report.missed == 0
                total[name] += divergence(full, state.logits)
    assert total["mean"] < total["first"]
