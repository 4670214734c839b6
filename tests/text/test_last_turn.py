"""The last turn of a conversation is found by the control tokens around it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from cachetune_rag.text.prompts.last_turn import LastTurns
from cachetune_rag.text.prompts.segments import Prompt, Span

START, END, MORE = 1000, 1001, 1002
WORDS = {"user": [1], "assistant": [2], "\n": [3], "chunk": [10, 11, 12, 13, 14, 15]}
ASKED, ANSWERED, AGAIN = [20, 21, 22, 23, 24], [30, 31, 32, 33, 34, 35], [40, 41, 42, 43, 44]


def found(*parts: Any, control: Collection[int] = (START, END, MORE)) -> list[int]:
    """The last turn of a prompt of these parts; all of the prompt if none is found."""
    ids: list[int] = []
    spans = []
    for part in parts:
        tokens = WORDS[part] if isinstance(part, str) else [part] if isinstance(part, int) else part
        if part == "chunk":
            spans.append(Span(len(ids), len(ids) + len(tokens), len(spans)))
        ids += tokens
    texts = ("",) * len(spans)
    prompt = Prompt(tuple(ids), tuple(spans), tuple(tuple(WORDS["chunk"]) for _ in spans), texts)
    return ids[LastTurns(control)(prompt) :]


def chatml(role: str, *said: Any) -> list[Any]:
    return [START, role, "\n", *said, END, "\n"]


def llama3(role: str, *said: Any) -> list[Any]:
    return [START, role, END, "\n", *said, MORE]


HEADERS = {chatml: [START, "assistant", "\n"], llama3: [START, "assistant", END, "\n"]}


@pytest.mark.parametrize("turn", [chatml, llama3])
def test_what_was_said_before_the_last_question_is_left_out(turn: Any) -> None:
    earlier = [*turn("user", "chunk", ASKED), *turn("assistant", ANSWERED)]
    for beginning in ([], [50, 51, 52, 53, 54]):  # the answer's, which the caller has written
        last = found(*earlier, *turn("user", AGAIN), *HEADERS[turn], beginning)
        assert last[-len(beginning) or len(last) :] == beginning
        assert not set(last) & {*ASKED, *ANSWERED}
        assert set(AGAIN) <= set(last)


@pytest.mark.parametrize("turn", [chatml, llama3])
def test_one_turn_is_the_whole_prompt(turn: Any) -> None:
    parts = [*turn("user", "chunk", ASKED), *HEADERS[turn]]
    assert found(*parts)[0] == START
    assert found("chunk", ASKED)[: len(WORDS["chunk"])] == WORDS["chunk"], "no control tokens at all"
    assert found(*turn("user", ASKED), *turn("assistant", ANSWERED), *turn("user", "chunk", AGAIN), *HEADERS[turn])[0] == START, "the last turn has the chunks"  # fmt: skip
    assert found() == []
    assert found(*parts, control=())[0] == START, "a tokenizer without control tokens"
    assert found("chunk", START)[: len(WORDS["chunk"])] == WORDS["chunk"], "one behind the chunks"
    assert found("chunk")[-1] == WORDS["chunk"][-1], "nothing behind the chunks"


def test_a_question_of_a_word_is_read_with_the_answer_before_it() -> None:
    parts = [*llama3("user", "chunk", ASKED), *llama3("assistant", ANSWERED), *llama3("user", [60])]
    assert set(ANSWERED) | {60} <= set(found(*parts, *HEADERS[llama3]))
