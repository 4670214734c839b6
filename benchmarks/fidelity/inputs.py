"""What the benchmarks of answers begin with: the model, what results say of it, and the records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import environment
from smollm2 import model_path

from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_rag.model.loading import load_model

from .documents import Shape, read_documents
from .musique import read_musique
from .records import Dataset
from .sources import folder_sources, installed_sources


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer that `arguments.add_model` asks for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    return load_model(args.model or model_path(), gguf_file=args.gguf_file, device=args.device, dtype=args.dtype)


def header_of(benchmark: str, args: argparse.Namespace, model: Any, **more: Any) -> dict[str, Any]:
    """What a file of results says of the run; `more` is what this benchmark's rows depend on besides."""
    return {
        "benchmark": benchmark,
        "model": args.name or Path(model.config.name_or_path).name,
        "weights": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tf32": args.tf32,
        "device": model.device.type,
        "cuda_kernels": args.cuda_kernels,
        **more,
        "seed": args.seed,
        "commit": args.commit or environment()["commit"],
        "environment": environment(),
    }


def add_records(parser: argparse.ArgumentParser, count: int) -> Any:
    """Which records are measured, by default `count` of each set. Returns the group of arguments."""
    data = parser.add_argument_group("records")
    data.add_argument("--musique", type=Path, metavar="FILE", help="questions as JSON lines, plain or gzipped")
    data.add_argument(
        "--docs", type=Path, nargs="+", default=[], metavar="FOLDER", help="more documents, a source each"
    )
    data.add_argument("--docs-only", action="store_true", help="not those that come with Python and its packages")
    data.add_argument("--first", type=int, default=0, help="first record of each set")
    data.add_argument("--musique-records", type=int, default=count)
    data.add_argument("--passages", type=int, help="of a question, the first so many (default: all)")
    data.add_argument("--documents", type=int, default=count, help="records of documents, 0 for none")
    data.add_argument("--chunks", type=int, default=8)
    data.add_argument("--chunk-tokens", type=int, default=512)
    data.add_argument("--seed", type=int, default=0)
    return data


def read_sets(args: argparse.Namespace, tokenizer: Any, query: str = "{}") -> list[Dataset]:
    """The sets that `add_records` asks for: MuSiQue where its file is given, then documents."""
    sets = []
    if args.musique is not None:
        sets.append(read_musique(args.musique, tokenizer, args.first, args.musique_records, args.passages, query))
    if args.documents:
        sources = ({} if args.docs_only else installed_sources()) | dict(folder_sources(args.docs))
        shape = Shape(args.chunks, args.chunk_tokens)
        sets.append(read_documents(sources, tokenizer, shape, args.first, args.documents, args.seed))
    return sets
