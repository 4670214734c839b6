"""Where a family's attention lets keys and queries be read before they are rotated.

RoPE runs before `cache.update`, so what a cache receives is rotated already, and rotating back is not exact. The
vectors before the rotation are the output of a submodule of the attention: a norm over keys if the family has
one, otherwise the key projection, or a slice of a fused projection. Forward hooks read them there; no model code is
replaced. The check at load finds the submodule and the layout of its output: it compares the tapped keys, rotated,
with the keys that the model puts into its cache (see `loadcheck.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class StopForward(Exception):
    """Raised inside a forward to end it early, when all wanted layers have run or when a request is waiting."""


# (key submodule, query submodule), most processed first: a norm over the keys comes after their projection.
_SEPARATE = (
    ("k_norm", "q_norm"),
    ("k_layernorm", "q_layernorm"),
    ("key_layernorm", "query_layernorm"),
    ("k_proj", "q_proj"),
)
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")


@dataclass(frozen=True)
class HeadShape:
    """Head counts and width of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Tap:
    """A place to read unrotated keys and queries of one attention layer.

    `key` and `query` turn the output of the submodule of that name into [tokens, heads, head_dim] for a batch row.
    """

    key_module: str
    query_module: str
    key: Callable[[Tensor], Tensor]
    query: Callable[[Tensor], Tensor]


def _token_major(heads: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Output [batch, tokens, heads * dim] or [batch, tokens, heads, dim] -> [batch, tokens, heads, dim]."""
    return lambda out: out.reshape(out.shape[0], out.shape[1], heads, dim)


def _head_major(heads: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Output [batch, heads, tokens, dim] -> [batch, tokens, heads, dim]."""
    return lambda out: out.reshape(out.shape[0], heads, -1, dim).transpose(1, 2)


def _slice(start: int, heads: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Fused output [batch, tokens, q | k | v] -> the part that begins at `start`."""
    return lambda out: out[..., start : start + heads * dim].reshape(out.shape[0], out.shape[1], heads, dim)


def _interleaved(which: int, heads: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Fused output [batch, tokens, heads x (q | k | v)] -> the part number `which` of every head."""
    return lambda out: out.reshape(out.shape[0], out.shape[1], heads, 3, dim)[..., which, :]


def candidates(attention: nn.Module, shape: HeadShape) -> Iterator[Tap]:
    """Every tap that `attention` could have, the likeliest first."""
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    for key_name, query_name in _SEPARATE:
        if isinstance(getattr(attention, key_name, None), nn.Module):
            for layout in (_token_major, _head_major):
                yield Tap(key_name, query_name, layout(kv, dim), layout(heads, dim))
    for name in _FUSED:
        if isinstance(getattr(attention, name, None), nn.Module):
            yield Tap(name, name, _slice(heads * dim, kv, dim), _slice(0, heads, dim))
            if heads == kv:
                yield Tap(name, name, _interleaved(1, kv, dim), _interleaved(0, heads, dim))


class Hooks:
    """Temporary hooks. To end them, set `hooks.live = False`, then call `remove()`.

    Each hook checks `live` first: if Ctrl-C arrives after a hook was registered and before its handle was stored, the hook stays
    on its module, and must do nothing there. (Setting an attribute can't be interrupted halfway; calling a method can.)
    """

    def __init__(self) -> None:
        self.live = True
        self.handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Remove the hooks from their modules."""
        for handle in self.handles:
            handle.remove()


@contextmanager
def tapped(attentions: list[nn.Module], modules: list[str], receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the context is open, `receive(layer, output)` gets what the named submodule of each layer returns.

    Hooks see every forward of the model, so the caller holds the lock under which the model runs.
    """
    hooks = Hooks()
    try:
        for layer, (attention, name) in enumerate(zip(attentions, modules, strict=True)):

            def hook(_module: nn.Module, _args: Any, output: Tensor, layer: int = layer) -> None:
                if hooks.live:
                    receive(layer, output)

            hooks.handles.append(getattr(attention, name).register_forward_hook(hook))
        yield
    finally:
        hooks.live = False
        hooks.remove()


@contextmanager
def inputs_tapped(layers: list[nn.Module], receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the context is open, `receive(layer, hidden)` gets each decoder layer's input, [batch, tokens, hidden]."""
    hooks = Hooks()
    try:
        for number, module in enumerate(layers):

            def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], number: int = number) -> None:
                if hooks.live:
                    receive(number, args[0] if args else kwargs["hidden_states"])

            hooks.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        hooks.live = False
        hooks.remove()


@contextmanager
def interruptible(attentions: Sequence[nn.Module], device: torch.device, stop: Callable[[], bool]) -> Iterator[None]:
    """While the context is open, a forward ends with `StopForward` before the first layer at which `stop()` is true.

    Hooks see every forward of the model, so the caller holds the lock under which the model runs.
    """

    def check(*_: object) -> None:
        if device.type == "cuda":
            # The host queues work several layers ahead of the device, and queued work can't be taken back.
            torch.cuda.synchronize(device)
        if hooks.live and stop():
            raise StopForward

    hooks = Hooks()
    try:
        hooks.handles += [attention.register_forward_pre_hook(check) for attention in attentions]
        yield
    finally:
        hooks.live = False
        hooks.remove()


def first_matching(taps: Iterator[Tap], outputs: dict[str, Tensor], wanted: Callable[[Tensor], bool]) -> Tap | None:
    """The first tap whose keys satisfy `wanted`; a tap whose layout does not fit its output is passed over."""
    for tap in taps:
        output = outputs.get(tap.key_module)
        if not isinstance(output, torch.Tensor):
            continue
        try:
            keys = tap.key(output)
        except RuntimeError:  # the output doesn't have this layout
            continue
        if wanted(keys):
            return tap
    return None
