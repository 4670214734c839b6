"""An interrupted forward leaves nothing on the model that affects the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import llama
from torch import nn

from cachetune_rag.model.family import taps
from cachetune_rag.model.plain import attention
from cachetune_rag.model.plain.watch import Watch


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_hook_whose_making_was_interrupted_does_nothing(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    model = llama()
    layers = list(model.model.layers)
    seen: list[int] = []
    made: list[Any] = []
    real = nn.Module.register_forward_pre_hook

    def register(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = real(module, *args, **kwargs)
        made.append(handle)
        if len(made) > last:
            raise KeyboardInterrupt  # before the caller has the handle
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_pre_hook", register)
        with pytest.raises(KeyboardInterrupt), taps.inputs_tapped(layers, lambda layer, _: seen.append(layer)):
            pass
    model(torch.tensor([[1, 2, 3]]))
    assert seen == []


def test_attention_settings_end_with_an_interrupt() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        attention.by_position(torch.arange(5)),
        attention.watched(Watch(1, lambda _: None)),
    ):
        raise KeyboardInterrupt
    assert attention.current_blocks.get() is None
    assert attention.current_watch.get() is None
