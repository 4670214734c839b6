"""The report says where a prompt has what reuse is known to lose, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.reuse.advice import BEHIND

CODE = (
    "total = sizes[name] + sizes[other]\nuse(total);\nif (total > 3) { stop(name); }",
    "| bolt | 12 |\n| nut | 8 |\n| wire | 3 |",
)
MILL = "The mill stands by the river. Its wheel has {} buckets of oak. Nobody has turned it since the flood."
CUT = ("The mill is old. It has a door. The access code of the mill", "is 48213. Nobody knows it. The door is shut.")
WHOLE = ("The mill is old. It has a door. The access code is new.", "Nobody knows it. The door is shut.")


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        made.precompute([*CUT, *WHOLE])
        yield made


def test_a_cut_sentence_is_told_until_its_rest_is_recomputed(engine: CacheTune) -> None:
    request = {"query": "Which code?", "chunks": CUT, "selector": "frequency"}
    report = engine.prefill(**request, ratio=0.05).report
    (words,) = report.advice
    assert words.startswith(
        "1 of 2 stored chunks seems to go on with a sentence, a row or a line which the chunk before began"
    )
    assert "higher ratio" in words
    assert report.as_dict()["advice"] == report.advice
    assert str(report).endswith(words)
    assert engine.prefill(**request, ratio=0.4).report.advice == ()
    assert engine.prefill(**request | {"selector": "none"}, ratio=0.4).report.advice == (words,)
    twice = engine.prefill(**request | {"chunks": [*CUT, *WHOLE, *CUT]}, ratio=0.05).report
    assert twice.advice[0].startswith("2 of 6 stored chunks seem to go on ")


def test_other_prompts_are_given_no_advice(engine: CacheTune) -> None:
    for chunks in (WHOLE, CUT[::-1], CUT[:1]):
        assert engine.prefill(query="Which code?", chunks=chunks, ratio=0.05).report.advice == ()
    assert engine.full_prefill(query="Which code?", chunks=CUT).report.advice == ()
    missed = [CUT[0], CUT[1] + " It is old."]
    report = engine.prefill(query="Which code?", chunks=missed, ratio=0.05).report
    assert report.missed, "the second half was computed behind the first"
    assert report.advice == ()


def test_much_text_behind_the_chunks_is_told_below_the_ratio_that_was_measured(engine: CacheTune) -> None:
    turns = [{"role": "user", "content": " ".join(WHOLE) + " Is it old?"}]
    turns += [{"role": "assistant", "content": "Yes, it is old. " * 12}, {"role": "user", "content": "Who knows it?"}]
    prompt = engine.prompt_from_messages(turns)
    (words,) = engine.prefill(prompt=prompt, ratio=0.05).report.advice
    behind = len(prompt.ids) - max(span.end for span in prompt.spans)
    assert behind > BEHIND
    assert words.startswith(f"{behind} tokens stand behind the last chunk, and ratio is 0.05: ")
    assert words.endswith("Use a ratio of at least 0.15 for such prompts.")
    assert engine.prefill(prompt=prompt, ratio=0.15).report.advice == ()
    (words,) = engine.prefill(prompt=prompt, selector="none").report.advice  # whatever its ratio is said to be
    assert words.startswith(f"{behind} tokens stand behind the last chunk, and nothing of the chunks is recomputed: ")
    assert words.endswith("Use a selector that recomputes, and a ratio of at least 0.15 for such prompts.")
    assert engine.prefill(prompt=prompt, selector="all", ratio=0.05).report.advice == ()
    # A long chunk that is not stored is no question.
    missed = engine.prefill(query="Is it old?", chunks=[*WHOLE, "It stands by the river. " * 12], ratio=0.05).report
    assert missed.missed > BEHIND
    assert missed.advice == ()
    assert engine.full_prefill(prompt=prompt).report.advice == ()


def test_code_tables_and_chunks_that_are_nearly_the_same_are_told_below_the_ratio_that_was_measured(
    engine: CacheTune,
) -> None:
    alike = [MILL.format(number) for number in ("twelve", "thirty")]
    engine.precompute([*CODE, *alike])

    def advice(chunks: list[str], ratio: float, selector: str = "expected_error") -> tuple[str, ...]:
        return engine.prefill(query="Which one?", chunks=chunks, ratio=ratio, selector=selector).report.advice

    (words,) = advice([*CODE, WHOLE[1]], 0.05)
    assert words.startswith("Most of the stored chunks' text is code or rows of tables, and ratio is 0.05: ")
    (words,) = advice([*alike, *WHOLE], 0.1)
    assert words.startswith("2 of 4 stored chunks are nearly the same as another one, and ratio is 0.1: ")
    both = advice([*CODE, *CODE[:1], alike[0]], 0.05, "none")
    assert len(both) == 1, "the same chunk twice is no risk"
    assert "nothing of the chunks is recomputed" in both[0]
    for chunks in ([*CODE, WHOLE[1]], [*alike, *WHOLE]):
        assert advice(chunks, 0.15) == ()
        assert advice(chunks, 0.05, "all") == ()
    assert advice([CODE[0], *WHOLE, alike[0]], 0.05) == (), "some code among prose"
