"""Compiled layers give what the layers give, for every number of tokens, and leave the model as it was."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import llama
from torch import Tensor
from torch._dynamo.utils import counters

from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.cuda.compiled_layers import FusedLayers
from cachetune_rag.model.cuda.device_forward import KernelCache, opaque_cache
from cachetune_rag.model.plain.attention import by_kernel


class Plain:
    """Stands for a `KernelCall`: causal attention among the tokens themselves."""

    def __init__(self, specs: Any):
        self.specs, self.seen = specs, 0

    def scatter(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def attention(self, query: Tensor, scaling: float | None) -> Tensor:
        self.seen += 1
        out = F.scaled_dot_product_attention(
            query, self.keys, self.values, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)


def forward(adapter: ModelAdapter, fused: FusedLayers, tokens: int) -> Tensor:
    call: Any = Plain(adapter.layers)
    cuts: list[int] = []
    cache = (opaque_cache() if fused.ready else KernelCache)(call, cuts.append)
    ids = torch.arange(tokens)[None] % adapter.config.vocab_size
    with torch.no_grad(), by_kernel(call), fused.active():
        logits = adapter.model_forward.selected(ids, torch.arange(tokens)[None], None, cache)
    assert cuts == list(range(adapter.num_layers))
    assert call.seen == adapter.num_layers
    return logits


def test_compiled_once_for_all_layers_and_token_counts() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = llama(layers=3)
    adapter = ModelAdapter(model)
    fused = FusedLayers(adapter.decoder_layers)
    wanted = {n: forward(adapter, fused, n) for n in (24, 40, 64)}
    # What the compiler's front end sees is what matters here; turning it into kernels takes long.
    assert fused.compile(lambda: forward(adapter, fused, 40), backend="aot_eager")
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6, "layers were compiled one by one"
    for _ in range(5):
        for tokens, logits in wanted.items():
            assert float((forward(adapter, fused, tokens) - logits).abs().max()) <= 1e-5
    assert counters["stats"]["unique_graphs"] == graphs, "something was compiled again"
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


@pytest.mark.parametrize("fused", [False, True])
def test_a_cache_is_gone_with_its_last_user(fused: bool) -> None:
    # What it calls holds a prompt's buffers: gigabytes are not to wait for the garbage collector.
    def before(_layer: int) -> None:
        pass

    watched = weakref.ref(before)
    gc.collect()
    gc.disable()
    try:
        cache = (opaque_cache() if fused else KernelCache)(Plain(ModelAdapter(llama()).layers), before)  # type: ignore[arg-type]
        assert cache.get_seq_length() == 0
        del cache, before
        assert watched() is None
    finally:
        gc.enable()


def test_layers_that_come_out_different_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = llama(layers=1)
    adapter = ModelAdapter(model)
    fused = FusedLayers(adapter.decoder_layers)

    def wrong(graph: Any, _inputs: Any) -> Any:
        return lambda *args: tuple(x * 1.5 if isinstance(x, Tensor) else x for x in graph(*args))

    with caplog.at_level(logging.WARNING):
        assert not fused.compile(lambda: forward(adapter, fused, 40), backend=wrong)
    assert "different when compiled" in caplog.text
    assert not fused.ready


def test_layers_that_cannot_be_compiled_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = llama(layers=1)
    adapter = ModelAdapter(model)
    fused = FusedLayers(adapter.decoder_layers)
    wanted = forward(adapter, fused, 40)

    def broken(_graph: Any, _inputs: Any) -> Any:
        raise ValueError("no such operation")

    with caplog.at_level(logging.WARNING):
        assert not fused.compile(lambda: forward(adapter, fused, 40), backend=broken)
    assert "no such operation" in caplog.text
    assert torch.equal(forward(adapter, fused, 40), wanted)
