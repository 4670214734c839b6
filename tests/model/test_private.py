"""Which names that aren't public the installed torch and transformers still have: a release that lacks one is noticed here.

The package runs without most of them (model/libraries/private.py says what is lost), so nothing else would fail.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tiny import llama
from torch import nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.libraries import private


def _can_patch_compiler() -> bool:
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        return bool(torch._dynamo.config.allow_unspec_int_on_nn_module)


HAS: dict[str, Callable[[], bool]] = {
    "torch._dynamo.config.allow_unspec_int_on_nn_module": _can_patch_compiler,
    "torch._dynamo.exc.TorchDynamoException": lambda: len(private.compiler_errors()) == 2,
    "torch._foreach_copy_": lambda: hasattr(torch, "_foreach_copy_"),
    "torch.Tensor._version": lambda: private.version_of(torch.zeros(1).add_(1)) == 1,
    "transformers: config._attn_implementation": lambda: private.attention_set(llama().config) is not None,
    "transformers: model._supports_sdpa": lambda: private.sdpa_is_right(llama()),
    "transformers.conversion_mapping": lambda: private.loads_weights_as_they_are(llama()),
    "transformers: config._name_or_path": lambda: hasattr(llama().config, "_name_or_path"),
    **{f"torch.nn.Module.{name}": lambda name=name: name in vars(nn.Module()) for name in (
        private.MODULES, private.PARAMETERS, private.BUFFERS, private.NON_PERSISTENT, *private.HOOKS,
    )},
    f"torch.nn.Module.{private.COMPILED}": private.can_swap_compiled,
}  # fmt: skip


@pytest.mark.parametrize("name", HAS)
def test_the_installed_release_still_has_the_name(name: str) -> None:
    releases = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert HAS[name](), f"{name} is gone in {releases}: see model/libraries/private.py for what is lost without it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch built without CUDA has no graphs' memory pools")
def test_a_release_with_cuda_still_has_the_end_of_a_capture() -> None:
    assert hasattr(torch._C, "_cuda_endAllocateToPool"), f"gone in torch {torch.__version__}: see `end_allocation`"


def test_modules_that_keep_their_parts_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "HOOKS", (*private.HOOKS, "_hooks_of_tomorrow"))
    with pytest.raises(UnsupportedModelError, match="_hooks_of_tomorrow"):
        private.check_modules()
