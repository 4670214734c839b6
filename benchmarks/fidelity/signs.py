"""Signs of how far a request will be off, noted beside how far it is: what `benchmarks/bound.py` records.

Most of them are known once the tokens to recompute are chosen, and cost nothing that the request doesn't pay anyway. Others cost a second
look of the probe, or need the prompt's logits. They show what a dearer sign would be worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag import CacheTune, Document
from cachetune_rag.answering.decoding import decode, prepare
from cachetune_rag.measuring.divergence import Divergence, kl_divergence
from cachetune_rag.measuring.teacher import rewind
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.selection import ReusedChunk
from cachetune_rag.selection.base import SelectionContext, all_places, total_budget
from cachetune_rag.selection.bound import RatioFinder
from cachetune_rag.selection.choice import Choice
from cachetune_rag.selection.continued import with_continuations
from cachetune_rag.selection.probing import ProbingSelector

from .answers import target_logits
from .evaluate import Engines, spent
from .records import Dataset, Record
from .rows import Key, Row, key_of
from .settings import Setting
from .shaken import Shaken

TOKENS = 16
"""Most tokens of full prefill's greedy continuation that are compared."""


class NotingSelector(ProbingSelector):
    """Chooses as another selector does, and keeps what it chose by.

    Args:
        noted: that selector.

    Attributes:
        found: scores of the present prompt's tokens, by name: what the choice goes by, the same with the last token alone watched, and the
            attention that tokens receive.
        chunks: its reused chunks.
        watched: how many of its tokens are watched.
        chosen: places of the tokens that were chosen last.
    """

    name = "noted"
    uses_deviations = True

    def __init__(self, noted: ProbingSelector):
        super().__init__(noted.depth, noted.queries)
        self._noted, self.shift = noted, noted.shift
        self.found: dict[str, Tensor] = {}
        self.chunks: Sequence[ReusedChunk] = ()
        self.watched = 0
        self.chosen = torch.empty(0, dtype=torch.int64)

    def scores(self, context: SelectionContext, num_layers: int, chosen: int | None = None) -> Tensor:
        """See `ProbingSelector.scores`."""
        return self._noted.scores(context, num_layers, chosen)

    def choose(self, context: SelectionContext, ratio: float, finder: RatioFinder | None = None) -> Choice:
        """See `Selector.choose`."""
        if not self.found:
            layers = self.layers(context.num_layers)
            end = max(chunk.start + chunk.tokens for chunk in context.chunks)
            self.chunks, self.watched = context.chunks, min(self.queries, max(1, context.length - end))
            self.found = {
                # The sum over the watched tokens, of which `expected_error` gives the mean.
                "error": with_continuations(
                    self.scores(context, layers).cpu() * self.watched, context.continuations, context.chunks
                ),
                "error_last": context.expected_error(layers, 1).cpu(),
                "error_last_half": context.expected_error(max(1, layers // 2), 1).cpu(),
                "mass": context.received_attention(layers, self.queries).cpu(),
            }
        places, count = all_places(context.chunks), total_budget(context.chunks, ratio)
        self.chosen = self._noted.chooser(context, places)(self.found["error"]).take(count)
        return Choice(self.chosen, ratio)

    def forget(self) -> None:
        """The next prompt is another one."""
        self.found = {}

    def left(self) -> NDArray[np.int64]:
        """Places of the chunk tokens that the last choice left as they are stored."""
        return np.setdiff1d(all_places(self.chunks).numpy(), self.chosen.numpy())

    def signs(self) -> dict[str, float]:
        """The signs of the last choice. `left`: of tokens that are reused; `all`: of all tokens of reused chunks."""
        places, left = all_places(self.chunks).numpy(), self.left()
        signs: dict[str, float] = {"chunks": len(self.chunks), "watched": self.watched, "reused": len(left)}
        for name, scores in self.found.items():
            numbers = scores.double().numpy()
            signs[f"{name}_all"], signs[f"{name}_left"] = float(numbers[places].sum()), float(numbers[left].sum())
            signs[f"{name}_left_squares"] = float(np.square(numbers[left]).sum())
            signs[f"{name}_left_max"] = float(numbers[left].max(initial=0.0))
            signs[f"{name}_elsewhere"] = float(numbers.sum() - numbers[places].sum())
        by_chunk = [
            float(self.found["error"].double()[chunk.start : chunk.start + chunk.tokens].sum()) for chunk in self.chunks
        ]
        signs["error_all_chunk_max"] = max(by_chunk)
        return signs


class SignStudy:
    """Takes signs and measures KL, for the records of one set.

    Args:
        engines: the model's engines.
        dataset: says how the records are laid out.
        noting: the selector that is registered as "noted".
        selector: the name of the one that it notes.
        ratios: what is measured, beside 0.
        lead_in, codec: of the engine.
    """

    def __init__(
        self,
        engines: Engines,
        dataset: Dataset,
        noting: NotingSelector,
        selector: str,
        ratios: Sequence[float],
        lead_in: str = "auto",
        codec: str = "exact",
    ):
        self._engines, self._dataset, self._noting = engines, dataset, noting
        self._settings = [Setting(lead_in, codec, selector, ratio) for ratio in sorted({0.0, *ratios})]

    def run(self, record: Record, known: dict[Key, Row]) -> Iterator[Row]:
        """Measure a record, unless all of its rows are known."""
        heads = [self._head(record, setting) for setting in self._settings]
        if all(key_of(head) in known for head in heads):
            return
        engine = self._engines.get(self._dataset, self._settings[0].lead_in, self._settings[0].codec)
        prompt = self._dataset.prompt(engine.prompts, record)
        reference = engine.full_prefill(prompt=prompt)
        plan = prepare(engine.adapter.model, engine.tokenizer, prompt.ids, max_new_tokens=TOKENS, do_sample=False)
        target = tuple(decode(_steps(engine, reference), plan, reference.logits))
        # What was decoded is in the cache; the same tokens are run again in one forward, as they are behind a reused prompt.
        rewind(reference.cache, len(prompt.ids))
        full = target_logits(engine, [reference], target)[0]
        engine.precompute(Document(record.name, list(record.chunks)))
        self._noting.forget()
        try:
            nothing: PrefillState | None = None
            shaken: Shaken | None = None
            for setting, head in zip(self._settings, heads, strict=True):
                state = engine.prefill(prompt=prompt, selector=self._noting.name, ratio=setting.ratio)
                nothing = nothing or state
                shaken = shaken or Shaken(engine, nothing, self._noting.chunks)
                found = Divergence.of([full], [target_logits(engine, [state], target)[0]])
                yield (
                    head
                    | spent(engine, record.name, state.report)
                    | {
                        "kl": [round(kl, 8) for kl in found.kl],
                        "same": [int(same) for same in found.same],
                        "signs": self._noting.signs()
                        | _moved(state, nothing)
                        | _sureness(state, nothing)
                        | _likeliest(engine, state)
                        | shaken.signs(self._noting.left().tolist()),
                        "full_sureness": _entropy(reference.logits),
                    }
                )
        finally:
            engine.remove(record.name)

    def _head(self, record: Record, setting: Setting) -> Row:
        named = {"set": self._dataset.name, "record": record.name, "digest": record.digest, "source": record.source}
        measured = {"selector": setting.selector, "ratio": setting.ratio, "budget": "ratio"}
        return {**named, "lead_in": setting.lead_in, "codec": setting.codec, **measured}


def _steps(engine: CacheTune, state: PrefillState) -> Callable[[int], Tensor]:
    def step(token: int) -> Tensor:
        return engine.adapter.forward(torch.tensor([token], device=engine.adapter.device), state.cache)

    return step


def _entropy(logits: Tensor) -> float:
    log = logits[-1].double().log_softmax(-1)
    return float(-(log.exp() * log).sum())


def _sureness(state: PrefillState, nothing: PrefillState) -> dict[str, float]:
    """What the logits say: how sure they are, and how far they moved from those with nothing recomputed."""
    return {"entropy": _entropy(state.logits), "kl_to_nothing": float(kl_divergence(state.logits, nothing.logits)[0])}


def _likeliest(engine: CacheTune, state: PrefillState) -> dict[str, float]:
    """How the next token's probability is divided: the likeliest token's, how far the second is behind it (in nats), and how far apart the likely ones are.

    For a small error of the last hidden state that has no particular direction, KL is proportional to the last: to the variance, over the
    distribution, of the tokens' rows of the output matrix.
    """
    log = state.logits[-1].float().log_softmax(-1)
    first, second = log.topk(2).values.tolist()
    weight = engine.adapter.model.get_output_embeddings().weight.detach()
    p = log.exp()
    mean = p @ weight.float()
    spread = float(p @ weight.float().square().sum(-1) - mean.square().sum())
    return {"likeliest": math.exp(first), "margin": first - second, "spread": max(0.0, spread)}


def _moved(state: PrefillState, nothing: PrefillState) -> dict[str, float]:
    """How far values moved from what is stored, relative to their size: what recomputing and the chunk shift did, mean over layers."""
    off = []
    for layer, before in zip(state.cache.layers, nothing.cache.layers, strict=True):
        length = min(layer.values.shape[2], before.values.shape[2])
        moved = (layer.values[:, :, :length] - before.values[:, :, :length]).double().square().sum()
        off.append(math.sqrt(float(moved / before.values[:, :, :length].double().square().sum())))
    return {"moved": sum(off) / len(off)}
