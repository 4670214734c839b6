"""Layers of transformers of which this process has a part, where a model is divided among processes as vLLM divides it.

Queries, keys, values, gate and up are divided by their outputs: transformers' layer runs with fewer of them. The output projection of an
attention and the down projection of an MLP are divided by their inputs: what the processes' parts give is added up. Embedding and head are
divided by the vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.loaded.foreign import ForeignLinear
from cachetune_vllm.divided_heads import DividedHeads


def divided_config(config: Any, count: int) -> Any:
    """A configuration of the part of a model that one of `count` processes has: with its share of heads and of the MLP's width.

    Raises:
        UnsupportedModelError: the configuration doesn't say how many heads there are.
    """
    made = deepcopy(config)
    text = made.get_text_config(decoder=True)
    heads = kv_heads_of(text), text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads[1]
    try:
        text.head_dim = head_dim
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = max(1, heads[0] // count)
        text.num_attention_heads = heads[1] // count
        if getattr(text, "intermediate_size", None) is not None:
            text.intermediate_size //= count
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(config).__name__}: it can't be divided among {count} processes ({error}), so reuse can't run it as vLLM does with "
            "--tensor-parallel-size."
        ) from error
    return made


def kv_heads_of(text_config: Any) -> int:
    """Key-value heads of a layer."""
    return getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads


class SummedLinear(nn.Linear):
    """A linear layer with a part of the input features: what the processes' parts give is added up, then the bias is added.

    Args:
        linear: the layer with this process's part, on the meta device; its parameters are assigned later.
        heads: adds up.
    """

    def __init__(self, linear: nn.Linear, heads: DividedHeads):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=linear.weight.dtype
        )
        self._heads = heads

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        total = self._heads.added_up(F.linear(input, self.weight))
        return total if self.bias is None else total + self.bias


class DividedEmbedding(nn.Module):
    """An embedding with a part of the vocabulary.

    Args:
        part: the embedding of transformers, whose weight holds this process's rows.
        first, count: the ids that these are for.
        vocabulary: how many ids there are.
        heads: adds up.
    """

    def __init__(self, part: nn.Embedding, first: int, count: int, vocabulary: int, heads: DividedHeads):
        super().__init__()
        self.part, self.num_embeddings, self._first, self._count, self._heads = part, vocabulary, first, count, heads

    @property
    def weight(self) -> Tensor:
        """The rows of this process."""
        return self.part.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width]."""
        rows = ids - self._first
        here = (rows >= 0) & (rows < self._count)
        found: Tensor = self.part(torch.where(here, rows, 0))
        return self._heads.added_up(found.masked_fill(~here[..., None], 0))


class DividedHead(ForeignLinear):
    """The matrix of the logits with a part of the vocabulary.

    Args:
        part: gives the logits of this process's part of the (padded) vocabulary.
        in_features: the model's width.
        vocabulary: how many ids there are.
        heads: joins the parts.
    """

    def __init__(self, part: Any, in_features: int, vocabulary: int, heads: DividedHeads):
        super().__init__(in_features, vocabulary)
        self.part, self._heads = part, heads

    @property
    def weight(self) -> Tensor:
        """The rows of this process."""
        weight: Tensor = self.part.weight
        return weight

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] -> [..., vocabulary]."""
        return self._heads.joined(self.part(states), -1)[..., : self.out_features]
