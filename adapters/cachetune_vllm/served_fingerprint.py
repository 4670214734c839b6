"""The fingerprint under which chunks of the served model are stored: that of the same checkpoint as transformers loads it.

`cachetune precompute` uses the same one. Where all weights can be viewed, the engine computes it from the weights as usual. Where vLLM
has packed some, or where this process has a part of them, it is computed from the checkpoint's files, and remembered in the store's folder, so that a restart doesn't read the
weights again.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.model.checkpoint import Checkpoint
from cachetune_store import StoreError
from cachetune_vllm.logs import logger
from cachetune_vllm.served_model import ServedModel

_KIND = "fingerprint"
_log = logger(__name__)


def config_of(model_config: Any) -> Any:
    """The configuration of the model that vLLM serves, as transformers reads it from the checkpoint.

    It is read again, since vLLM changes its own copy. The operator's overrides (`--hf-overrides`) are applied.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        model_config.model, revision=model_config.revision, trust_remote_code=model_config.trust_remote_code
    )
    overrides = model_config.hf_overrides
    if callable(overrides):
        return overrides(config)
    config.update(overrides or {})
    return config


def served_fingerprint(served: ServedModel, model_config: Any, profiles: Profiles) -> str | None:
    """The fingerprint to give to an engine on this model; None where the engine finds it itself.

    Args:
        served: the model.
        model_config: vLLM's configuration of it.
        profiles: the store's, where it is remembered.

    Raises:
        ModelLoadError: the checkpoint can't be read.
    """
    if served.form == "dense" and not served.heads.shared:
        return None
    dtype: torch.dtype = served.model.dtype
    checkpoint = Checkpoint(model_config.model, dtype, model_config.revision, served.config)
    identity = checkpoint.identity()
    key = {"files": identity or "", "transformers": transformers.__version__}
    if identity is not None and (known := profiles.load(_KIND, key)) is not None:
        return str(known["model"])
    _log.info("the fingerprint of %s is computed from its files, once", model_config.model)
    found = checkpoint.fingerprint()
    if identity is not None:
        try:
            profiles.save(_KIND, key, {"model": found})
        except StoreError as error:
            _log.warning("the model's fingerprint can't be remembered, so the next start computes it again: %s", error)
    return found
