"""The fingerprint of a checkpoint, computed from its files. For a process whose loaded weights can't be read, such as a server that
has packed them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cachetune_rag.checking.escaping import words_of
from cachetune_rag.errors import ModelLoadError
from cachetune_rag.model.libraries.neutral import neutral
from cachetune_rag.model.libraries.private import loads_weights_as_they_are
from cachetune_rag.model.loaded.fingerprint import fingerprint_of
from cachetune_rag.model.loading import load_model
from cachetune_store.printing import shown

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_log = logging.getLogger(__name__)


class Checkpoint:
    """The files of a model that transformers can load.

    Args:
        source: a folder made by `save_pretrained`, or a hub id.
        dtype: the type in which transformers would load the weights.
        revision: branch, tag or commit on the hub.
        config: the model's configuration, if it is not to be the one in its files.

    Raises:
        ModelLoadError: there is no configuration, or it can't be read.
    """

    def __init__(
        self, source: str | os.PathLike[str], dtype: torch.dtype, revision: str | None = None, config: Any = None
    ):
        from transformers import AutoConfig, AutoModelForCausalLM

        self._source, self._dtype, self._revision = source, dtype, revision
        extra: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            self._config = config or AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)
            with neutral(), torch.device("meta"):
                self._skeleton: Any = AutoModelForCausalLM.from_config(self._config, dtype=dtype)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelLoadError(
                f"no model could be read from {shown(os.fspath(source))}: {words_of(error)} Give a folder made by save_pretrained, or a "
                "hub id."
            ) from error
        self._files = self._found()

    def identity(self) -> str | None:
        """A value that changes whenever one of the files does: SHA-256 (hex) over their names, sizes and modification times, and over the
        model's class, dtype and configuration. None where the weights don't lie in safetensors files.
        """
        if not self._files:
            return None
        digest = hashlib.sha256(f"{type(self._skeleton).__name__}|{self._dtype}".encode())
        for path in sorted(set(self._files.values())):
            known = path.stat()
            digest.update(f"{path.name}|{known.st_size}|{known.st_mtime_ns}\n".encode())
        digest.update(self._config.to_json_string(use_diff=False).encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """`model_fingerprint` of the model that transformers loads from these files.

        Tensors are read one by one where transformers loads them as they are; else the whole model is loaded once, into the host's memory.

        Raises:
            ModelLoadError: transformers can't load it.
        """
        places = self._places()
        if places is not None:
            return self._of(self._tensors(places))
        _log.info(
            "%s is loaded once to find its fingerprint: its files don't hold its weights one by one", self._source
        )
        with neutral():
            model, _ = load_model(self._source, device="cpu", dtype=self._dtype, revision=self._revision)
            return self._of(sorted(model.state_dict().items()))

    def _of(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        return fingerprint_of(type(self._skeleton).__name__, self._skeleton.config, weights)

    def _found(self) -> dict[str, Path]:
        """The safetensors file of each tensor; empty where there are none."""
        index = self._file(_INDEX)
        if index is not None:
            names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            files = {name: self._file(name) for name in set(names.values())}
            return {key: path for key, name in names.items() if (path := files[name]) is not None}
        single = self._file(_SINGLE)
        if single is None:
            return {}
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)

    def _file(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        found = cached_file(
            self._source, name, revision=self._revision or "main", _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else Path(found)

    def _places(self) -> dict[str, str] | None:
        """For each tensor of the model, its name in the files; None if the files don't hold every tensor in the form that is loaded."""
        if not self._files or not loads_weights_as_they_are(self._skeleton):
            return None
        state = self._skeleton.state_dict(keep_vars=True)
        prefix = f"{self._skeleton.base_model_prefix}."
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)  # tied weights are saved under one of their names
        places: dict[str, str] = {}
        for name, tensor in state.items():
            candidates = [c for n in (name, *names[id(tensor)]) for c in (n, n.removeprefix(prefix))]
            found = next((c for c in candidates if c in self._files), None)
            if found is None:
                return None
            with safe_open(self._files[found], framework="pt") as opened:
                if tuple(opened.get_slice(found).get_shape()) != tuple(tensor.shape):
                    return None
            places[name] = found
        return places

    def _tensors(self, places: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        state = self._skeleton.state_dict()
        for name in sorted(places):
            with safe_open(self._files[places[name]], framework="pt") as opened:
                tensor = opened.get_tensor(places[name])
            yield name, tensor.to(state[name].dtype) if tensor.is_floating_point() else tensor
