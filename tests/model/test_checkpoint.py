"""The fingerprint of a checkpoint on disk is that of the model which transformers loads from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cachetune_rag import ModelLoadError
from cachetune_rag.model import checkpoint
from cachetune_rag.model.checkpoint import Checkpoint
from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from tests import families, tiny

WHOLE = ("gpt-neox", "gpt-oss", "mixtral", "qwen3-moe")
"""Families whose tensors transformers may join or change as it loads them: their models have to be loaded."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-llama3", "gemma2", "phi3", "cohere2", *WHOLE])
def test_it_is_that_of_the_loaded_model(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.model_of(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    wanted = model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    if name not in WHOLE:
        monkeypatch.delattr(checkpoint, "load_model")  # tensor by tensor
    assert Checkpoint(tmp_path, dtype).fingerprint() == wanted


def test_several_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    monkeypatch.delattr(checkpoint, "load_model")
    assert Checkpoint(tmp_path, torch.float32).fingerprint() == model_fingerprint(model)


def test_its_identity_follows_files_dtype_and_configuration(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    first = Checkpoint(tmp_path, torch.float32).identity()
    assert first == Checkpoint(tmp_path, torch.float32).identity()
    seen = {first, Checkpoint(tmp_path, torch.bfloat16).identity()}
    weights = tmp_path / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    seen.add(Checkpoint(tmp_path, torch.float32).identity())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    seen.add(Checkpoint(tmp_path, torch.float32).identity())
    assert len(seen) == 4


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no model could be read from .*save_pretrained"):
        Checkpoint(tmp_path, torch.float32)
