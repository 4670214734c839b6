"""Chunks that a request names by their texts, found in its prompt's token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cachetune_rag.text.recognising.id_recognizer import IdRecognizer, Spell
from cachetune_rag.text.recognising.id_spans import IdSpan


@dataclass(frozen=True)
class NamedChunks:
    """Where named chunks stand.

    Attributes:
        spans: in the prompt's order; the key of each is the number of its text.
        not_found: numbers of the texts that stand nowhere in the prompt, or are shorter than `id_recognizer.LEAST` tokens.
    """

    spans: tuple[IdSpan, ...]
    not_found: tuple[int, ...]


def find_named(
    texts: Sequence[str], prompt_ids: Sequence[int], encode: Callable[[str], Sequence[int]], spell: Spell
) -> NamedChunks:
    """Find chunks in a prompt by their texts, whether they are stored or not, by the rules of `IdRecognizer`.

    Args:
        texts: the texts of the chunks.
        prompt_ids: the whole prompt.
        encode: tokenises a chunk alone, as chunks are stored (`PromptBuilder.encode`).
        spell: says what tokens spell (`Spelling`).

    Raises:
        PromptError: a text can't be tokenised, or `prompt_ids` are no token ids.
    """
    recognizer = IdRecognizer(spell)
    numbers: dict[tuple[int, ...], int] = {}
    chunks = [tuple(encode(text)) for text in texts]
    for number, ids in enumerate(chunks):
        numbers.setdefault(ids, number)
    recognizer.update((number, ids) for ids, number in numbers.items())
    spans = recognizer.find(prompt_ids)
    found = {span.key for span in spans}
    return NamedChunks(tuple(spans), tuple(number for number, ids in enumerate(chunks) if numbers[ids] not in found))


def joined(first: Iterable[IdSpan], others: Iterable[IdSpan]) -> list[IdSpan]:
    """Spans of one prompt that were found in two ways, in order: all of `first`, and those of `others` that overlap none of them."""
    kept = sorted(first, key=lambda span: span.start)
    joined = list(kept)
    at = 0
    for span in sorted(others, key=lambda span: span.start):
        while at < len(kept) and kept[at].end <= span.start:
            at += 1
        if at == len(kept) or span.end <= kept[at].start:
            joined.append(span)
    return sorted(joined, key=lambda span: span.start)
