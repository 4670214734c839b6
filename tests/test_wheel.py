"""The wheel works without the checkout: it is built, installed into an empty environment with its dependencies, and used."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What `make` has installed is in uv's cache, so that nothing is fetched or unpacked again.
UV = (sys.executable, ROOT / "tools" / "run_uv.py")

USE = """
import sys, tempfile
import torch
from pathlib import Path
import cachetune_rag, cachetune_store
for module in (cachetune_rag, cachetune_store):
    assert sys.prefix in module.__file__, module.__file__
assert not any(m.split(".")[0] in ("llama_index", "langchain_core") for m in sys.modules)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
backend = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))
with tempfile.TemporaryDirectory() as store:
    with cachetune_rag.CacheTune(model, tokenizer, store) as engine:
        engine.precompute("A passage.")
        report = engine.generate(query="What?", chunks=["A passage."], ratio=0.5, max_new_tokens=2).report
        assert report.reused == report.recomputed == 5 and report.missed == 0, report
for adapter, extra in (("llama_index.llms.cachetune", "llama-index"), ("langchain_cachetune", "langchain")):
    try:
        __import__(adapter)
    except ImportError as error:
        assert f"cachetune-rag[{extra}]" in str(error), error
    else:
        raise AssertionError(f"{adapter} imported without its framework")
print("works")
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["UV_LINK_MODE"] = "hardlink"  # nothing here minds, and copying some GB takes long
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


def test_the_wheel_has_the_installed_names_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {
        "cachetune_rag", "cachetune_store", "llama_index", "langchain_cachetune", "cachetune_vllm", "cachetune_ray",
    }  # fmt: skip
    # A namespace package: other distributions put their own modules beside ours.
    assert "llama_index/__init__.py" not in names
    assert "llama_index/llms/__init__.py" not in names
    assert {"cachetune_rag/py.typed", "cachetune_store/py.typed"} <= set(names)


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    python = home / "bin" / "python"
    run(*UV, "venv", "--quiet", "--python", sys.executable, home, cwd=tmp_path)
    constraints = ROOT / "constraints.txt"
    run(*UV, "pip", "install", "--quiet", "--python", python, "--constraint", constraints, wheel, cwd=tmp_path)
    assert run(python, "-c", USE, cwd=tmp_path).strip().endswith("works")
    assert "0.1.0" in run(home / "bin" / "cachetune", "--version", cwd=tmp_path)
