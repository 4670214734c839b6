"""Training text as token ids: which of them are learned, and batches of one length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cachetune_rag.text.prompts.prompt import PromptBuilder

from .contexts import Context, ContextMaker

SHARES = {1024: 0.25, 2048: 0.35, 4096: 0.3, 8192: 0.1}
"""How long prompts are, and the share of steps with this length. A step has about the same number of tokens whatever the length."""

_ASKED = 600
"""At most so many tokens of a prompt are kept for questions and answers."""
_APART = 1 << 40
"""How far off the number is whose text stands in for one that is too long. No batch has it."""


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model learns to predict it."""

    ids: list[int]
    learned: list[bool]


class Encoder:
    """Lays out training text as the engine lays out prompts, with further questions behind each answer.

    Args:
        tokenizer: the model's. It has a chat template that ends an answer with a token.

    Attributes:
        end: the token that ends an answer in the chat template, whatever the tokenizer calls its end token.
    """

    def __init__(self, tokenizer: Any):
        self._prompts, self._special = PromptBuilder(tokenizer), _special_ids(tokenizer)
        self.end, self._rest = self._behind_an_answer()

    def encode(self, context: Context, most: int | None = None) -> Example:
        """A context's ids, with as many of its questions as fit into `most` tokens; the first one in any case."""
        first, *others = context.turns
        start = self._prompts.build(query=first.question, chunks=context.chunks, prefix=context.prefix).ids
        ids, learned = list(start), [False] * len(start)
        for turn, following in zip(context.turns, [*others, None], strict=True):
            answer = [*self._prompts.encode(turn.answer), self.end]
            if most is not None and len(ids) + len(answer) > most and ids != list(start):
                break
            ids += answer
            learned += [True] * len(answer)
            if following is None:
                break
            between = self._between(following.question)
            ids += between
            learned += [False] * len(between)
        while learned and not learned[-1]:  # a question without its answer
            ids.pop(), learned.pop()
        return Example(ids, learned)

    def _between(self, question: str) -> list[int]:
        """What stands between the end of an answer and that of the next question, in the tokenizer's own layout."""
        return self._laid_out(question)[self._rest :]

    def _behind_an_answer(self) -> tuple[int, int]:
        """The token that ends an answer, and how many tokens an answer of one dot has with it."""
        answer = list(self._prompts.encode("."))
        rest = self._laid_out(".")
        end = rest[len(answer)] if rest[: len(answer)] == answer and len(rest) > len(answer) else None
        if end not in self._special:
            raise ValueError("this tokenizer's chat template has no token that ends an answer: it can't be trained on.")
        return end, len(answer) + 1

    def _laid_out(self, question: str) -> list[int]:
        """An answer of one dot, and what stands behind it up to the end of the next question."""
        asked = {"role": "user", "content": "."}
        spoken = [asked, {"role": "assistant", "content": "."}, {"role": "user", "content": f"Question: {question}"}]
        short = self._prompts.build_messages([asked]).ids
        long = self._prompts.build_messages(spoken).ids
        if long[: len(short)] != short:
            raise ValueError(
                "this tokenizer's chat template lays out a question otherwise once it is answered: it can't be trained on several turns."
            )
        return list(long[len(short) :])


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of special tokens, also of those that have no role by name."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


@dataclass(frozen=True)
class Batch:
    """Prompts of about one length, filled up behind their ends.

    Attributes:
        ids: [prompts, tokens].
        at: which of the flattened positions predict a token that is learned.
        wanted: the learned tokens.
    """

    ids: Tensor
    at: Tensor
    wanted: Tensor


def batch_of(examples: Sequence[Example], fill: int) -> Batch:
    """Examples as one batch. Attention is causal, so what fills up behind an end changes nothing before it."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), fill)
    at, wanted = [], []
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        places = [i for i, learned in enumerate(example.learned) if learned]
        at += [row * longest + i - 1 for i in places]
        wanted += [example.ids[i] for i in places]
    return Batch(ids, torch.tensor(at), torch.tensor(wanted))


class Batches(IterableDataset[Batch]):
    """The batches of one of several processes, without end. Which there are depends on the seed and the number of processes alone.

    Args:
        maker: makes the text.
        tokenizer: the model's.
        tokens: about how many a batch has.
        lengths: which of `SHARES` there are.
        shares: of steps with each of these lengths; those of `SHARES` if None.
        rank, world: number of this process, and how many there are. All have the same length at the same step.
        first: number of the first step.
    """

    def __init__(
        self,
        maker: ContextMaker,
        tokenizer: Any,
        tokens: int,
        lengths: Sequence[int],
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        shares: Sequence[float] | None = None,
    ):
        self._shares = [SHARES[length] for length in lengths] if shares is None else list(shares)
        self._maker, self._tokenizer, self._tokens = maker, tokenizer, tokens
        self._lengths, self._rank, self._world, self._first = list(lengths), rank, world, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (self._first + worker.id, worker.num_workers) if worker else (self._first, 1)
        encoder = Encoder(self._tokenizer)  # of this process, since the workers are forked
        while True:
            yield self._batch(step, encoder)
            step += stride

    def _batch(self, step: int, encoder: Encoder) -> Batch:
        (length,) = random.Random(f"length {step}").choices(self._lengths, self._shares)
        count = max(1, self._tokens // length)
        first = (step * self._world + self._rank) * count
        examples = [self._example(number, length, encoder) for number in range(first, first + count)]
        return batch_of(examples, encoder.end)

    def _example(self, number: int, length: int, encoder: Encoder) -> Example:
        """Text of a number that has at most `length` tokens, its first answer among them. How long a text will be is known only once it is
        encoded. Where the facts alone are too long, another number's is taken.
        """
        while True:
            tokens = length - min(_ASKED, length // 4)  # the rest is for questions and answers
            while tokens >= length // 16:
                example = encoder.encode(self._maker.context(number, tokens), length)
                if len(example.ids) <= length:
                    return example
                tokens = tokens * length // len(example.ids) - 16
            number += _APART
