"""Taking turns inside vLLM's kernels for CPUs, in which one thread of a process may be at a time.

oneDNN's products, those of quantised weights, mixtures of experts and attention all write to the same scratch memory of the process, and
a product writes its arguments into memory of its layer. Whoever needs more scratch memory frees the old piece: also what vLLM computes of a
batch before its forward, which says how the attention is divided (`get_scheduler_metadata`). vLLM does all this from one thread. The one that
puts prompts together, and the one that stores missed chunks, call vLLM's products (`packed.py`) as well: without turns, they would write to memory
that was just freed, and the process would end with a message of malloc.

So vLLM's thread has the turn in whatever it asks of its model (forward, logits, embeddings of images) and of the attention's metadata
builders. Writing rows to pages needs no turn: that kernel uses nothing but its arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import nn

_turn = threading.RLock()
"""One for the process, as the scratch memory is, whichever models it has. A thread may take it again where it has it."""
_asked = ("embed_multimodal", "embed_input_ids", "compute_logits")
"""The methods of a model that vLLM calls beside its forward and that may compute products."""
_covered: WeakSet[Any] = WeakSet()
"""Modules and classes that take the turn already."""


def take_turns(vllm_model: nn.Module) -> AbstractContextManager[Any]:
    """Returns a context that excludes vLLM's computation: from now on, none of it runs while another thread is in the context, and no thread
    enters it while some of it runs.

    Args:
        vllm_model: the model as vLLM loaded it, with its attention layers.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    module: Any
    for module in vllm_model.modules():
        if hasattr(module, "get_attn_backend"):
            _cover_builder(module.get_attn_backend().get_builder_cls())
        # Logits processors, too: drafting may call one without the model's method.
        if (module is vllm_model or isinstance(module, LogitsProcessor)) and module not in _covered:
            _covered.add(module)
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)
            for name in _asked:
                if module is vllm_model and (method := getattr(module, name, None)) is not None:
                    setattr(module, name, _in_turn(method))
    return _turn


def _cover_builder(builder: type) -> None:
    """Of the class, because vLLM makes builders anew whenever it likes."""
    if builder not in _covered:
        _covered.add(builder)
        builder.build = _in_turn(builder.build)  # type: ignore[attr-defined]


def _in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _turn:
            return method(*args, **kwargs)

    return call


def _enter(*_: object) -> None:
    _turn.acquire()


def _leave(*_: object) -> None:
    _turn.release()
