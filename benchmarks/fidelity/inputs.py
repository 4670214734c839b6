"""What the benchmarks of answers begin with: the model, what results say of it, and the records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import environment
from smollm2 import model_path

from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_rag.model.loading import load_model
from cachetune_rag.text.prompts.prompt import PromptBuilder

from .documents import Shape, read_documents, recut_form
from .formed import documents_in_forms, questions_in_forms
from .forms import FORMS, PLAIN, check_chat, of_documents
from .forms_report import of_documents_only
from .musique import read_musique
from .orders import in_orders
from .records import Dataset
from .sources import folder_sources, installed_sources

T = TypeVar("T")
LEAST_CHUNK = 40
"""Tokens of the smallest chunks that documents are cut into: up to 32 of them are looked at for the end of a word."""


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer that `arguments.add_model` asks for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    return load_model(args.model or model_path(), gguf_file=args.gguf_file, device=args.device, dtype=args.dtype)


def most_positions(model: Any) -> int | None:
    """How many tokens a model reads at most; None if its configuration doesn't say."""
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most


def refused(call: Callable[..., T], *args: Any, what: str = "") -> T:
    """What a call returns. If it raises a ValueError, the program ends with its words behind `what`."""
    try:
        return call(*args)
    except ValueError as error:
        sys.exit(f"{what}{error}")


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


def add_forms(data: Any) -> None:
    """In which forms the records are measured; `data` is their group of arguments."""
    data.add_argument("--forms", nargs="+", default=[PLAIN], choices=list(FORMS), help="in which users have chunks")
    data.add_argument(
        "--recut",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="the same documents in chunks of these sizes too",
    )
    data.add_argument(
        "--prose", type=Path, nargs="+", default=[], metavar="FILE", help="text of other languages, each file a form"
    )


def check_forms(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse forms that can't be made of the records that are asked for."""
    args.forms, args.recut, args.prose = (list(dict.fromkeys(each)) for each in (args.forms, args.recut, args.prose))
    made_of_them = [f"--forms {name}" for name in args.forms if of_documents(name)]
    made_of_them += [f"--{name}" for name in ("recut", "prose") if getattr(args, name)]
    if made_of_them and not args.documents:
        parser.error(f"{made_of_them[0]} is made of documents, and --documents is 0: ask for some, or leave it out.")
    if args.musique is not None and all(of_documents(name) for name in args.forms):
        parser.error(
            f"--forms has {' '.join(args.forms)}, which the passages of --musique can't have: add {PLAIN}, or leave --musique out."
        )
    more = [name for name in args.forms if FORMS[name].neighbours or FORMS[name].copies]
    if more and args.documents and args.chunks < 2:
        parser.error(f"--forms {more[0]} takes documents of 2 chunks or more, and --chunks is {args.chunks}.")
    tokens = args.chunks * args.chunk_tokens
    for size in args.recut:
        if not LEAST_CHUNK <= size <= tokens // 2:
            parser.error(
                f"--recut is {size}: a record has {tokens} tokens (--chunks times --chunk-tokens), so use {LEAST_CHUNK} to {tokens // 2}."
            )
        if size == args.chunk_tokens:
            parser.error(f"--recut is {size}, as --chunk-tokens is: leave it out, the form {PLAIN} has these chunks.")
    names = [path.stem for path in args.prose]
    for path in args.prose:
        if not path.is_file():
            parser.error(f"--prose is {path}, and no such file is there: give text files.")
        if names.count(path.stem) > 1 or path.stem in {*FORMS, *map(recut_form, args.recut)}:
            parser.error(f"--prose has {path}, and another form is called {path.stem!r}: rename the file.")


def read_sets(args: argparse.Namespace, tokenizer: Any) -> list[Dataset]:
    """The sets that `add_records` asks for, as they are: MuSiQue where its file is given, then documents."""
    sets = [] if args.musique is None else [_questions(args, tokenizer)]
    return sets + ([_documents(args, tokenizer)] if args.documents else [])


def read_sets_in_forms(args: argparse.Namespace, tokenizer: Any) -> list[Dataset]:
    """The same in all forms that `add_forms` asks for, and documents also with their chunks in another order.

    Raises:
        ValueError: the texts are too few or too short; or a form takes a chat template, and there is none.
    """
    check_chat(tokenizer, args.forms)
    sets = []
    if args.musique is not None:
        questions, encode = _questions(args, tokenizer, args.query), PromptBuilder(tokenizer).encode
        for asked in in_orders(questions, args.orders, args.seed):
            sets += questions_in_forms(asked, args.forms, encode, args.seed)
        forms = [*args.forms, *map(recut_form, args.recut), *(path.stem for path in args.prose)]
        if only := [form for form in forms if of_documents(form)]:
            print(of_documents_only(questions.name, only), file=sys.stderr)
    if args.documents:
        sets += documents_in_forms(
            lambda: _documents(args, tokenizer),
            args.forms,
            args.recut,
            args.prose,
            Shape(args.chunks, args.chunk_tokens),
            args.shuffled,
            tokenizer,
            args.first,
            args.documents,
            args.seed,
        )
    return sets


def check_lengths(sets: Sequence[Dataset], tokenizer: Any, model: Any, answer_tokens: int = 0) -> None:
    """Refuse records that are longer than what the model reads, before anything is measured.

    Raises:
        ValueError: one is.
    """
    most = most_positions(model)
    for dataset in sets if most is not None else ():
        prompts = PromptBuilder(tokenizer, chunk_separator=dataset.separator)
        for record in dataset.records:
            tokens = len(dataset.prompt(prompts, record).ids) + max(len(record.target), answer_tokens)
            if tokens > most:
                raise ValueError(
                    f"{dataset.name}, {record.form}: {record.name} has {tokens} tokens with what follows, and this model reads at most {most}: "
                    "use fewer or shorter chunks (--chunks, --chunk-tokens, --passages), or leave the form out."
                )


def _questions(args: argparse.Namespace, tokenizer: Any, query: str = "{}") -> Dataset:
    return read_musique(args.musique, tokenizer, args.first, args.musique_records, args.passages, query)


def _documents(args: argparse.Namespace, tokenizer: Any) -> Dataset:
    sources = ({} if args.docs_only else installed_sources()) | dict(folder_sources(args.docs))
    shape = Shape(args.chunks, args.chunk_tokens)
    return read_documents(sources, tokenizer, shape, args.first, args.documents, args.seed)
