"""Code, tables, and chunks that are nearly the same are told by token ids; prose that speaks of code is none of them."""

from __future__ import annotations

import inspect
import json.scanner
import pydoc_data.topics
import random
import textwrap
from typing import Any

import numpy as np
import pytest
from tiny import tokenizer

from cachetune_rag.reuse.advice import CODE
from cachetune_rag.text.prompts.continuations import Pieces
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.prompts.shape import Shape, Shapes
from cachetune_rag.text.prompts.token_table import TokenTable

TABLE = "\n".join(f"| bolt {n} | {7 * n} pieces | {n / 4:.2f} | row {n % 9} |" for n in range(12))
SHELL = 'if [ -f "$file" ]; then\n  cp "$file" "$target"\nfi\nfor name in $(ls); do\n  echo "$name" >> "$log"\ndone'
C_CODE = "static int size(struct node *n) {\n  if (!n) return 0;\n  return n->size + size(n->next);\n}\n" * 3
MILL = "The mill stands by the river. Its wheel has {} buckets of oak, and each of them holds a pail of water. Nobody has turned it since the flood took the weir away."
SPOKEN = "Call size() with a node, or pass None (the default). It returns 0 then, and what next.size says otherwise; see the list below for all names."


def shape_of(*chunks: str) -> Shape:
    prompt = PromptBuilder(tokenizer()).build(query="Which?", chunks=chunks)
    return Shapes(tokenizer())(prompt, prompt.spans)


@pytest.mark.parametrize("chunks", [(TABLE,), (SHELL, C_CODE), (inspect.getsource(json.scanner), SPOKEN)])
def test_code_and_tables_are_told(chunks: tuple[str, ...]) -> None:
    assert shape_of(*chunks).code >= CODE


@pytest.mark.parametrize("chunks", [(MILL,), (SPOKEN,), (SPOKEN, MILL, "x = size(n);"), (inspect.getdoc(textwrap.TextWrapper) or "",), ("",), (), ("a",), ("\n\n", " "), ("\n" * 4000,)])  # fmt: skip
def test_prose_is_no_code(chunks: tuple[str, ...]) -> None:
    assert shape_of(*chunks).code < CODE


@pytest.mark.parametrize("name", ["naming", "objects", "specialnames", "string-methods", "truth", "while"])
def test_real_prose_on_code_is_no_code_and_nothing_in_it_is_alike(name: str) -> None:
    text = pydoc_data.topics.topics[name]
    shape = shape_of(*(text[at : at + 600] for at in range(0, min(len(text), 12000), 600)))
    assert shape.code < CODE
    assert shape.alike == 0


def test_chunks_that_are_nearly_the_same_are_told() -> None:
    others = [SPOKEN, TABLE, SHELL]
    assert shape_of(MILL.format("twelve"), *others, MILL.format("thirty")).alike == 2
    assert shape_of(*(MILL.format(n) for n in ("two", "four", "six")), *others).alike == 3
    changed = MILL.format("twelve") + " It is for sale."
    assert shape_of(changed, *others, MILL.format("twelve")).alike == 2, "a version of before a sentence was added"


def test_copies_windows_and_passages_of_a_chunk_are_not_nearly_the_same() -> None:
    mill = MILL.format("twelve")
    assert shape_of(mill, SPOKEN, mill).alike == 0
    assert shape_of(mill + SPOKEN, SPOKEN + C_CODE).alike == 0
    assert shape_of(mill, mill[:60]).alike == 0
    assert shape_of(mill).alike == 0


def test_of_a_long_prompt_a_part_is_compared_and_the_same_is_found() -> None:
    rng = random.Random(3)
    letters = [chr(n) for n in range(97, 123)]
    chunks = ["".join(rng.choices(letters, k=800)) for _ in range(12)]
    assert shape_of(*chunks).alike == 0
    assert shape_of(*chunks, chunks[3][:400] + "." + chunks[3][401:]).alike == 2


def test_a_table_of_tokens_that_grows_in_two_threads_at_once_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TokenTable(Pieces(tokenizer()), lambda piece: (len(piece), ord(piece[0])), 2)
    few, more = (np.array(tokenizer().encode(text, add_special_tokens=False)) for text in ("abc", "xyz"))
    table(few[:1])
    full, others = np.full, [more]

    def meanwhile(*given: Any, **named: Any) -> Any:
        """Another thread makes the table larger, just as this one does."""
        while others:
            table(others.pop())
        return full(*given, **named)

    monkeypatch.setattr(np, "full", meanwhile)
    assert table(few).tolist() == [[1, 1, 1], [*b"abc"]]
    assert table(more).tolist() == [[1, 1, 1], [*b"xyz"]]
    assert not others
