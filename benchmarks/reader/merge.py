"""Merge the reader's adapter into the model that it was trained on; see docs/quality-reader.md.

    python benchmarks/reader/merge.py --adapter ADAPTER --out FOLDER [--model FOLDER]

FOLDER then is a model of its own, in float32, for `--model` of the benchmarks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from smollm2 import model_path

from cachetune_rag.model.loading import load_model
from reader.lora import merge


def main(argv: Sequence[str] | None = None) -> None:
    """Read the model, add the adapter, write both as one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--model", type=Path, help="folder of the model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged model")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.model or model_path(), device="cpu", dtype="float32")
    merge(model, args.adapter)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
