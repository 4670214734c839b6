"""The forms in which users have chunks: what a prompt of chunks without overlap is made into. Both benchmarks of answers make them here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.text.prompts.prompt import Chunk, Segment, Text

PLAIN = "plain"
SYSTEM_TOKENS = 2000
TURNS = 3
_LEAST_SHARE = 0.75
"""Of the tokens of a system prompt: a text with fewer is refused."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Turn:
    """What was said behind the chunks before the question: a user's words and the answer."""

    asked: str
    answered: str


@dataclass(frozen=True)
class Laid:
    """A prompt's parts.

    Attributes:
        chunks: texts of the chunks, in prompt order.
        before: text that stands before everything else, a system prompt's.
        turns: what was said between the chunks and the question.
    """

    chunks: tuple[str, ...]
    before: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Material:
    """What a form takes beside a prompt's chunks.

    Attributes:
        copied: numbers of the chunks that stand a second time.
        changed: what stands in place of each of them, where only nearly the same stands a second time.
        system: makes the text of a system prompt, which is nowhere else in the prompt.
        last: how many chunks at the end stay behind those that are added.
    """

    copied: Sequence[int]
    changed: Sequence[str]
    system: Callable[[], str]
    last: int = 0


def overlapping(laid: Laid, material: Material) -> Laid:
    """Windows: each chunk begins with the last third of the one before."""
    chunks = [laid.chunks[0]]
    for before, chunk in zip(laid.chunks, laid.chunks[1:], strict=False):
        chunks.append(f"{_last_third(before)}{'' if chunk[:1].isspace() else ' '}{chunk}")
    return replace(laid, chunks=tuple(chunks))


def twice(laid: Laid, material: Material) -> Laid:
    """Some chunks stand a second time behind the others, as when two searches find them."""
    return _with(laid, [laid.chunks[number] for number in material.copied], material)


def nearly_twice(laid: Laid, material: Material) -> Laid:
    """Behind the others stands, of some chunks, an earlier version that lacks a sentence."""
    return _with(laid, material.changed, material)


def system_prompt(laid: Laid, material: Material) -> Laid:
    """A system prompt of about 2,000 tokens, of text that is nowhere else in the prompt."""
    return replace(laid, before=material.system())


def turns_after(laid: Laid, material: Material) -> Laid:
    """Three questions on the chunks and their answers stand before the question."""
    said = []
    for number in range(TURNS):
        at = number * len(laid.chunks) // TURNS
        first = " ".join(laid.chunks[at].split(". ")[0].split())
        said.append(Turn(f"How does passage {at + 1} begin?", f'It begins with: "{first[:120]}"'))
    return replace(laid, turns=tuple(said))


def _as_it_is(laid: Laid, material: Material) -> Laid:
    return laid


def _with(laid: Laid, added: Sequence[str], material: Material) -> Laid:
    end = len(laid.chunks) - material.last
    return replace(laid, chunks=(*laid.chunks[:end], *added, *laid.chunks[end:]))


def _last_third(text: str) -> str:
    """By words; of a text without spaces by characters."""
    words = text.split(" ")
    if len(words) < 3:
        return text[len(text) - len(text) // 3 :]
    return " ".join(words[-(len(words) // 3) :])


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        change: makes it of a prompt's parts and what there is beside them.
        content: what the chunks are: prose, code or tables.
        neighbours: whether it is made of chunks that follow one another in a document.
        chat: whether it takes a chat template.
        copies: whether chunks stand a second time in it.
    """

    change: Callable[[Laid, Material], Laid] = _as_it_is
    content: str = "prose"
    neighbours: bool = False
    chat: bool = False
    copies: bool = False


FORMS = {
    PLAIN: Form(),
    "overlapping": Form(overlapping, neighbours=True),
    "twice": Form(twice, copies=True),
    "nearly_twice": Form(nearly_twice, copies=True),
    "system_prompt": Form(system_prompt, chat=True),
    "turns_after": Form(turns_after, chat=True),
    "code": Form(content="code"),
    "tables": Form(content="tables"),
}
"""Forms by name. Other languages are other prose: `--prose` of the benchmarks."""


def of_documents(form: str) -> bool:
    """Whether a form can be made of documents only, and not of passages that are given, as those of questions are."""
    return form not in FORMS or FORMS[form].neighbours or FORMS[form].content != FORMS[PLAIN].content


def check_chat(tokenizer: Any, forms: Sequence[str]) -> None:
    """Refuse forms that a tokenizer has no layout for.

    Raises:
        ValueError: it has no chat template, and one of the forms takes one.
    """
    if not getattr(tokenizer, "chat_template", None) and (odd := [form for form in forms if FORMS[form].chat]):
        raise ValueError(
            f"--forms has {' and '.join(odd)}, and this model's tokenizer has no chat template to lay them out: leave them out, or "
            "measure a model that has one."
        )


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, and its lines."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]


def system_text(texts: Sequence[str], encode: Callable[[str], Sequence[int]], whose: str) -> str:
    """A system prompt's: the first sentences of texts that are in no prompt; `whose` is the name of the set.

    Raises:
        ValueError: there are too few.
    """
    taken: list[str] = []
    total = 0
    for sentence in (each for text in texts for each in sentences_of(text)):
        length = len(encode(" " + sentence))
        if total + length > SYSTEM_TOKENS:
            break
        taken.append(sentence)
        total += length
    if total < _LEAST_SHARE * SYSTEM_TOKENS:
        raise ValueError(
            f"{whose}: the text that is kept out of all prompts has {total} tokens, and a system prompt takes about {SYSTEM_TOKENS}: give longer "
            "texts, or leave system_prompt out of --forms."
        )
    return " ".join(taken)


def conversation(laid: Laid, prefix: str, separator: str, last: Segment) -> list[dict[str, Any]]:
    """A prompt with a system prompt or with turns behind its chunks, as messages.

    Args:
        laid: its parts.
        prefix: text before the chunks.
        separator: text between them.
        last: what is asked at the end. A `Chunk` continues the text before it and stands right behind it.
    """
    content: list[Segment] = [Text(f"{prefix}\n\n")]
    for number, chunk in enumerate(laid.chunks):
        content += [Text(separator), Chunk(chunk)] if number and separator else [Chunk(chunk)]
    asked: list[Segment] = [*(Text(f"Question: {turn.asked}") for turn in laid.turns), last]
    content += [asked[0]] if isinstance(asked[0], Chunk) else [Text("\n\n"), asked[0]]
    said: list[dict[str, Any]] = [{"role": "system", "content": laid.before}] if laid.before else []
    said.append({"role": "user", "content": content})
    for turn, question in zip(laid.turns, asked[1:], strict=True):
        said += [{"role": "assistant", "content": turn.answered}, {"role": "user", "content": [question]}]
    return said
