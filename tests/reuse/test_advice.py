"""The report says where a prompt's chunks cut a sentence in two, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.reuse.advice import advice_of
from cachetune_rag.text.prompts.prompt import PromptBuilder

CUT = ("The mill is old. It has a door. The access code of the mill", "is 48213. Nobody knows it. The door is shut.")
WHOLE = ("The mill is old. It has a door. The access code is new.", "Nobody knows it. The door is shut.")


def advice(
    *chunks: str, ratio: float = 0.15, reused: tuple[int, ...] | None = None, separator: str = "\n\n"
) -> tuple[str, ...]:
    prompt = PromptBuilder(tokenizer(), chunk_separator=separator).build(query="Which code?", chunks=chunks)
    spans = [span for span in prompt.spans if reused is None or span.chunk in reused]
    return advice_of(prompt, spans, ratio)


def test_a_sentence_that_goes_on_in_the_next_chunk_is_told() -> None:
    (words,) = advice(*CUT)
    assert words.startswith("1 of 2 reused chunks begins in the middle of a sentence")
    assert "ratio of 0.3" in words
    assert advice(*CUT, *WHOLE, *CUT)[0].startswith("2 of 6 reused chunks begin ")


@pytest.mark.parametrize(
    "chunks",
    [
        WHOLE,
        (*CUT[::-1],),  # not one behind the other, so no prompt has the sentence
        ("It has a door. The access code of the mill", "Is it known? It is not."),
        ("A title", "and another title"),  # no prose
        ("for x in names:\n    total += x\nreturn total", "def more(x):\n    return x"),
        ("| bolt | 12 |\n| nut | 8 |", "| wire | 3 |"),
        ("磨坊很旧。它有一扇门。磨坊的密码", "是48213。没有人知道。"),
        ("It is old. It cost 12", ""),
        CUT[:1],
    ],
)
def test_other_chunks_give_no_advice(chunks: tuple[str, ...]) -> None:
    assert advice(*chunks) == ()


def test_what_is_computed_anyway_gives_no_advice() -> None:
    assert advice(*CUT, ratio=0.3) == ()
    assert advice(*CUT, reused=(0,)) == (), "the second half was missed, so it was computed behind the first"
    assert advice(*CUT, reused=(1,)), "the second half was stored, without the first"
    assert advice(*CUT, separator=" and then, a long while later, ") == (), "not neighbours"


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        yield made


def test_an_engines_report_has_the_advice(engine: CacheTune) -> None:
    engine.precompute([*CUT, *WHOLE])
    report = engine.prefill(query="Which code?", chunks=CUT, ratio=0.15).report
    assert len(report.advice) == 1
    assert report.as_dict()["advice"] == report.advice
    assert str(report).endswith(report.advice[0])
    for other in (
        engine.prefill(query="Which code?", chunks=WHOLE, ratio=0.15),
        engine.prefill(query="Which code?", chunks=CUT, ratio=0.5),
        engine.full_prefill(query="Which code?", chunks=CUT),
    ):
        assert other.report.advice == ()
