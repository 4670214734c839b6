"""The sets of a run, in the forms that are asked for: records that are changed, and records of other text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cachetune_rag.text.prompts.prompt import PromptBuilder

from .contents import CONTENTS, prose_source
from .documents import Shape, read_documents, recut, shuffled
from .forms import FORMS, PLAIN, Material, of_documents, sentences_of, system_text
from .records import Dataset, Record

COPIED = 4
"""One chunk of so many stands a second time, where chunks do."""


def in_form(dataset: Dataset, form: str, encode: Callable[[str], Sequence[int]], seed: int = 0) -> Dataset:
    """The same records in a form of `FORMS` that is made of their own text.

    Raises:
        ValueError: a system prompt is asked for, and there is too little text for it.
    """
    if form == PLAIN:
        return dataset
    system = cache(lambda: system_text(dataset.spare, encode, dataset.name))
    records = []
    for record in dataset.records:
        laid = FORMS[form].change(record.laid, _material(record, 1 if dataset.continues else 0, system, seed))
        records.append(replace(record, chunks=laid.chunks, before=laid.before, turns=laid.turns, form=form))
    return replace(dataset, records=tuple(records))


def questions_in_forms(
    questions: Dataset, forms: Sequence[str], encode: Callable[[str], Sequence[int]], seed: int = 0
) -> list[Dataset]:
    """Questions over given passages, in those of the forms that can be made of these."""
    return [in_form(questions, form, encode, seed) for form in forms if not of_documents(form)]


def documents_in_forms(
    documents: Callable[[], Dataset],
    forms: Sequence[str],
    sizes: Sequence[int],
    prose: Sequence[Path],
    shape: Shape,
    mixed: int,
    tokenizer: Any,
    first: int = 0,
    count: int = 40,
    seed: int = 0,
) -> list[Dataset]:
    """Records of documents in all forms, and the first `mixed` of each form with its chunks in another order.

    Args:
        documents: reads those that the forms are made of. It is not called if none of them is needed.
        forms: names of `FORMS`.
        sizes: the same text in chunks of so many tokens.
        prose: files of other languages, each a form of its own.
        shape: of the records.
        mixed: see there; 0 for none.
        tokenizer: the model's.
        first, count, seed: as for `read_documents`.
    """
    encode = PromptBuilder(tokenizer).encode
    sets: list[Dataset] = []

    def add(made: Dataset, in_order: bool = True) -> None:
        sets.append(made)
        if mixed and in_order:
            sets.append(shuffled(made, mixed, seed))

    own = [form for form in forms if FORMS[form].content == "prose"]
    plain = documents() if own or sizes else None
    for form in own:
        assert plain is not None
        made = in_form(plain, form, encode, seed)
        if FORMS[form].copies:  # the other chunks are in the order that they have without copies
            add(made, in_order=False)
            if mixed:
                sets.append(in_form(shuffled(plain, mixed, seed), form, encode, seed))
        else:
            add(made)
    for size in sizes:
        assert plain is not None
        add(recut(plain, size, tokenizer))
    others = {form: CONTENTS[FORMS[form].content] for form in forms if form not in own}
    for form, sources in others.items():
        add(_called(read_documents(sources(), tokenizer, shape, first, count, seed), form))
    for path in prose:
        source = prose_source(path, lambda text: len(encode(text)), shape)
        add(_called(read_documents(source, tokenizer, shape, first, count, seed), path.stem))
    return sets


def _called(dataset: Dataset, form: str) -> Dataset:
    return replace(dataset, records=tuple(replace(record, form=form) for record in dataset.records))


def _material(record: Record, last: int, system: Callable[[], str], seed: int) -> Material:
    """The chunks that stand a second time are drawn; of questions, those with an answer in them come first."""
    chunks = record.chunks

    def order(number: int) -> tuple[bool, str]:
        """By the text, so that the same chunks are taken if they stand in another order."""
        return not _has(chunks[number], record.answers), sha256(f"{seed} {chunks[number]}".encode()).hexdigest()

    copied = sorted(sorted(range(len(chunks) - last), key=order)[: max(1, len(chunks) // COPIED)])
    return Material(copied, [_without_a_sentence(chunks[number], record.answers) for number in copied], system, last)


def _without_a_sentence(text: str, answers: Sequence[str]) -> str:
    """An earlier version of a chunk: without its first sentence with an answer, or that in the middle. A chunk of blanks alone stays as it is."""
    if not text.strip():
        return text
    sentences = sentences_of(text)
    left_out = next((each for each in sentences if _has(each, answers)), sentences[len(sentences) // 2])
    if len(sentences) == 1:  # no sentence ends in it: its second half
        left_out = left_out[len(left_out) // 2 :]
    before, _, after = text.partition(left_out)
    return before + after.lstrip() if before else after.lstrip()


def _has(text: str, answers: Sequence[str]) -> bool:
    return any(answer.casefold() in text.casefold() for answer in answers if answer)
