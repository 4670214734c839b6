"""The output projection, head by head, against what the attention modules really put out."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family, ids_of, random_ids
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.family.output import gain, gram, output_heads


@torch.no_grad()
def outputs_of(adapter: ModelAdapter, token: int) -> tuple[list[Tensor], list[Tensor]]:
    """Values [kv_heads, v_dim] and attention outputs [hidden] of every layer for a prompt of one token, which attends to
    nothing but itself."""
    outputs: list[Tensor] = []
    hooks = [a.register_forward_hook(lambda _m, _a, out: outputs.append(out[0][0, 0])) for a in adapter.attentions]
    cache = DynamicCache()
    adapter.forward(torch.tensor([token]), cache)
    for hook in hooks:
        hook.remove()
    return [entry.values[0, :, 0] for entry in cache.layers], outputs


@pytest.mark.parametrize("family", FAMILIES, ids=ids_of(FAMILIES))
def test_values_become_outputs_through_it(family: Family) -> None:
    model = family.build()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(-1e4)  # else a token doesn't attend to itself in full
    adapter = ModelAdapter(model)
    one, other = random_ids(2, seed=3)
    pairs = zip(outputs_of(adapter, one), outputs_of(adapter, other), strict=True)
    values, outputs = ([a - b for a, b in zip(*pair, strict=True)] for pair in pairs)  # differences: no bias in them
    heads = adapter.config.num_attention_heads
    for layer, spec in enumerate(adapter.layers):
        weight = output_heads(adapter.attentions[layer], heads, spec.v_head_dim)
        assert weight is not None
        assert weight.shape == (adapter.config.hidden_size, heads, spec.v_head_dim)
        by_query = values[layer].repeat_interleave(heads // spec.heads, dim=0)
        torch.testing.assert_close(torch.einsum("ngd,gd->n", weight, by_query), outputs[layer], rtol=1e-4, atol=1e-4)


def test_gram_and_gain_are_their_formulas() -> None:
    weight = torch.randn(7, 6, 4, generator=torch.Generator().manual_seed(0))
    products, gains = gram(weight, 2), gain(weight)
    assert products.shape == (2, 4, 4)
    for h in range(2):
        wanted = sum(weight[:, g].T @ weight[:, g] for g in range(3 * h, 3 * h + 3)) / 3
        torch.testing.assert_close(products[h], wanted)
    for g in range(6):
        torch.testing.assert_close(gains[g], torch.linalg.matrix_norm(weight[:, g]) / 2)


def test_where_there_is_none_it_says_so() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(24, 24))

    attention = nn.Module()
    attention.c_proj = Conv1D()
    attention.odd = nn.Linear(24, 7, bias=False)
    attention.odd.weight = nn.Parameter(torch.zeros(84, 2), requires_grad=False)
    assert output_heads(attention, 4, 6) is None
    attention.o_proj = nn.Linear(24, 32)
    assert output_heads(attention, 4, 6).shape == (32, 4, 6)
    attention.config = type("Config", (), {"hidden_size": 48})()
    assert output_heads(attention, 4, 6) is None
