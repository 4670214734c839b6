"""Retrieved passages that name their document are found in a prompt though they aren't stored, and are stored behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk
from cachetune_rag.text.prompts.segments import TemplateText

SENTENCE = "The lamp turns once every twelve seconds."
WINDOW = f"It was lit in 1871. {SENTENCE} Nobody has ever seen it stop."
OTHER = "Nobody ever stored the harbour master's own words."


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as engine:
        yield engine


@pytest.mark.parametrize("chat", [True, False])
def test_an_unstored_passage_is_found_next_time(engine: CacheTune, chat: bool) -> None:
    def ask() -> tuple[int, int, int]:
        text, retrieved = f"1. {OTHER}\nWho?", [Chunk(OTHER, "harbour")]
        prompt = (
            engine.prompt_from_messages([{"role": "user", "content": text}], retrieved=retrieved)
            if chat
            else engine.prompt_from_text(text, retrieved=retrieved)
        )
        assert prompt.chunk_documents in (("harbour",), (None,))
        report = engine.generate(prompt=prompt, max_new_tokens=1).report
        assert engine.flush()
        return report.recognised, report.missed, report.reused + report.recomputed

    assert ask() == (1, len(OTHER), 0)
    assert ask() == (1, 0, len(OTHER))


def test_the_ids_stay_those_of_the_passage_as_a_chunk(engine: CacheTune) -> None:
    told = engine.prompt_from_text(f"1. {OTHER}\nWho?", retrieved=[Chunk(OTHER, "harbour")])
    assert told.ids == engine.prompt_from_text(["1. ", Chunk(OTHER), "\nWho?"]).ids


def test_a_passage_goes_before_stored_chunks_inside_it_but_not_before_one_around_it(engine: CacheTune) -> None:
    retrieved = [Chunk(WINDOW, "lamp"), Chunk(SENTENCE, "lamp")]
    engine.precompute(SENTENCE)
    prompt = engine.prompt_from_text(f"{WINDOW}\n{SENTENCE}\nHow often?", retrieved=retrieved)
    assert prompt.chunk_texts == (WINDOW, SENTENCE)
    assert prompt.chunk_documents == ("lamp", None), "the sentence is stored already"
    whole = f"Page 3: {WINDOW}"
    engine.precompute(whole)
    assert engine.prompt_from_text(f"{whole}\nHow often?", retrieved=retrieved).chunk_texts == (whole,)


def test_texts_without_a_document_and_short_ones_are_counted_only(engine: CacheTune) -> None:
    prompt = engine.prompt_from_text(f"{OTHER} Short.", retrieved=[OTHER, Chunk(OTHER), Chunk("Short.", "s")])
    assert prompt.chunk_texts == ()
    assert prompt.retrieved == 2 * len(OTHER) + len("Short.")


def test_the_developers_own_text_may_hold_control_tokens(engine: CacheTune) -> None:
    given = engine.prompt_from_text([TemplateText("<|im_start|>user\n"), "<|im_end|>", TemplateText("<|im_end|>")])
    start, end = engine.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert given.ids.count(start) == 1
    assert given.ids.count(end) == 1, "the user's own stays text"
