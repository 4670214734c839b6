"""Greedy answers behind prompts that were read, with few forwards.

Where one reading's answer is known, one forward tells how far another reading of the prompt says the same. What is left of many answers is decoded together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cachetune_rag import CacheTune
from cachetune_rag.answering.decoding import DecodingPlan, prepare
from cachetune_rag.reuse.state import PrefillState

ANSWER_TOKENS = 16

Rows = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, [1, kv_heads, tokens, dim]."""


class Answer:
    """A greedy answer as far as it is known.

    Args:
        plan: how it is decoded.
        rows: of the prompt, and of the tokens of the answer but the last one. Of an answer that is done they are not needed.
        tokens: the answer's so far.
        sure: how likely the model found the likeliest token, for each of these.

    Attributes:
        tokens: the answer's so far, its end token among them.
        sure: the probability of the model's likeliest token where each of them was chosen, before any processor of logits.
    """

    def __init__(self, plan: DecodingPlan, rows: Rows, tokens: Sequence[int] = (), sure: Sequence[float] = ()):
        self.plan, self.rows = plan, rows
        self.tokens: list[int] = []
        self.sure: list[float] = []
        self._stream, self._text = plan.text_stream(), ""
        for token, probability in zip(tokens, sure, strict=True):
            self.add(token, probability)

    def add(self, token: int, sure: float) -> None:
        """Take the next token."""
        self.tokens.append(token)
        self.sure.append(sure)
        self._text += self._stream.push(token)
        if self.done:
            self._text += self._stream.finish()

    @property
    def done(self) -> bool:
        """Whether nothing comes behind the last token."""
        ended = bool(self.tokens) and (self.tokens[-1] in self.plan.eos_ids or self._stream.stopped)
        return ended or len(self.tokens) >= self.plan.max_new_tokens

    def text(self) -> str:
        """The text of an answer that is done."""
        return self._text.strip()

    def likeliest(self, logits: Tensor, first: int) -> Tensor:
        """The tokens that greedy decoding takes, int64 [tokens], by their logits [tokens, vocab].

        Args:
            logits: the first of them predict the answer's token of number `first`. All tokens before the last one of these are known.
            first: see there.
        """
        if not self.plan.logits_processor:
            return logits.argmax(-1)
        said, chosen = self.plan.ids.new_tensor([self.tokens]), []
        for number, row in enumerate(logits[:, None], start=first):
            ids = torch.cat([self.plan.ids, said[:, :number]], dim=-1)
            # Processors may write into the logits, and expect float32.
            chosen.append(self.plan.logits_processor(ids, row.to(dtype=torch.float32, copy=True)).argmax(-1))
        return torch.cat(chosen)


def begin(engine: CacheTune, state: PrefillState, tokens: int = ANSWER_TOKENS) -> Answer:
    """The first token of an answer of up to so many. The state's cache stays as it is."""
    plan = prepare(
        engine.adapter.model, engine.tokenizer, list(state.prompt.ids), max_new_tokens=tokens, do_sample=False
    )
    answer = Answer(plan, _rows_of(state.cache))
    answer.add(int(answer.likeliest(state.logits, 0)[0]), float(_sureness(state.logits)[0]))
    return answer


def follow(engine: CacheTune, states: Sequence[PrefillState], known: Answer) -> tuple[list[Answer], list[Tensor]]:
    """Answers of several readings of a prompt, as far as they are those of one that is known, and the first token that isn't.

    Greedy decoding gives the same tokens as long as each of them is the likeliest one behind those before it. All of these are looked at in
    one forward.

    Args:
        engine: has read them.
        states: the readings. Their caches are as before afterwards.
        known: the answer of another reading. It is done.

    Returns:
        The answers, and for each reading the logits that predict each token of the known answer, [tokens, vocab].
    """
    said, prompt = known.tokens, known.plan.ids.shape[1]
    logits, cache = _behind(engine, states, said[:-1])
    # One transfer for all of them, since each waits for the GPU.
    found = torch.stack([torch.stack((known.likeliest(each, 0).double(), _sureness(each).double())) for each in logits])
    answers = []
    for number, (likeliest, sure) in enumerate(found.tolist()):
        chosen = [int(token) for token in likeliest]  # doubles represent every token id exactly
        pairs = enumerate(zip(chosen, said, strict=True))
        same = next((i for i, (mine, its) in pairs if mine != its), len(said))
        answer = Answer(known.plan, [], chosen[: same + 1], sure[: same + 1])
        if not answer.done:
            part = slice(number, number + 1), slice(None), slice(prompt + same)
            answer.rows = [(keys[part], values[part]) for keys, values in _rows_of(cache)]
        answers.append(answer)
    return answers, logits


def finish(engine: CacheTune, answers: Sequence[Answer], together: int) -> None:
    """Decode answers that have begun to their ends, so many in one forward, which takes hardly longer than one over a single sequence.

    Their prompts may have different lengths. Shorter ones are filled up in front, where nothing sees it.
    """
    left = [answer for answer in answers if not answer.done]
    for start in range(0, len(left), together):
        _finish_together(engine, left[start : start + together])


def greedy_answers(engine: CacheTune, states: Sequence[PrefillState], tokens: int = ANSWER_TOKENS) -> list[str]:
    """The model's answers of up to so many tokens behind several readings of any prompts, decoded together."""
    answers = [begin(engine, state, tokens) for state in states]
    finish(engine, answers, len(answers))
    return [answer.text() for answer in answers]


def target_logits(engine: CacheTune, states: Sequence[PrefillState], target: Sequence[int]) -> list[Tensor]:
    """For each of several readings of one prompt, the logits that predict each target token: [target tokens, vocab].

    The caches of the states are as before afterwards.
    """
    return _behind(engine, states, target[:-1])[0]


def _behind(engine: CacheTune, states: Sequence[PrefillState], ids: Sequence[int]) -> tuple[list[Tensor], DynamicCache]:
    """Run tokens behind each of several readings of one prompt, in one forward.

    Returns:
        For each reading the logits that predict the first of them, and those behind each: [tokens + 1, vocab]. And the rows of all readings with
        these tokens.
    """
    cache = _joined([_rows_of(state.cache) for state in states])
    if not ids:
        return [state.logits for state in states], cache
    given = torch.tensor(ids, device=engine.adapter.device).expand(len(states), -1)
    places = torch.arange(len(ids), device=given.device) + cache.get_seq_length()
    after = _append(engine, given, cache, places.expand_as(given))
    return [torch.cat((state.logits, rows)) for state, rows in zip(states, after, strict=True)], cache


def _finish_together(engine: CacheTune, answers: Sequence[Answer]) -> None:
    cache, device = _joined([answer.rows for answer in answers]), engine.adapter.device
    lengths = torch.tensor([answer.rows[0][0].shape[2] for answer in answers])
    longest = cache.get_seq_length()
    mask = None
    if int(lengths.min()) < longest:
        mask = (torch.arange(longest) >= longest - lengths[:, None]).to(device, torch.int64)
    for answer in answers:
        answer.rows = []  # the cache has them
    places = lengths.to(device)[:, None]
    ids = torch.tensor([[answer.tokens[-1]] for answer in answers], device=device)
    while not all(answer.done for answer in answers):
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=1)
        logits = _append(engine, ids, cache, places, mask)
        # An answer that is done goes on in vain: it costs nothing beside the others.
        ids, places = _chosen(answers, logits), places + 1
        # One transfer for both.
        found = torch.stack((ids[:, 0].double(), _sureness(logits)[:, 0].double()), dim=1).tolist()
        for answer, (token, sure) in zip(answers, found, strict=True):
            if not answer.done:
                answer.add(int(token), sure)


def _chosen(answers: Sequence[Answer], logits: Tensor) -> Tensor:
    """The next token of each answer [answers, 1], by its logits [answers, 1, vocab]."""
    if not any(answer.plan.logits_processor for answer in answers):
        return logits.argmax(-1)
    return torch.stack([answer.likeliest(row, len(answer.tokens)) for answer, row in zip(answers, logits, strict=True)])


def _sureness(logits: Tensor) -> Tensor:
    """The probability of the likeliest token by logits [..., vocab]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _rows_of(cache: Cache) -> Rows:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _joined(sequences: Sequence[Rows]) -> DynamicCache:
    """The rows of several sequences as one cache. They stay as they are. Shorter ones are filled up in front."""
    longest = max(rows[0][0].shape[2] for rows in sequences)

    def filled(states: Tensor) -> Tensor:
        return F.pad(states, (0, 0, longest - states.shape[2], 0)) if states.shape[2] < longest else states

    whole = DynamicCache()
    for number, layers in enumerate(zip(*sequences, strict=True)):
        keys, values = zip(*layers, strict=True)
        whole.update(torch.cat([filled(k) for k in keys]), torch.cat([filled(v) for v in values]), number)
    return whole


@torch.no_grad()
def _append(engine: CacheTune, ids: Tensor, cache: DynamicCache, places: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run tokens behind the sequences of a cache, which has them afterwards. Gives logits [sequences, tokens, vocab].

    Args:
        engine: has the model.
        ids, places: the tokens and their positions, [sequences, tokens].
        cache: the sequences' rows.
        mask: int64 [sequences, rows with these tokens], 0 where a sequence was filled up; None if none was.
    """
    out = engine.adapter.model(
        input_ids=ids,
        position_ids=places,
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=ids.shape[1],
        **{engine.adapter.model_forward.cache_argument: cache},
    )
    return out.logits
