"""`make demo-serve`: a vLLM server with a real model is asked over HTTP, with reuse and without.

What a user does by hand is done here in the same steps, each shown: `cachetune precompute` stores the documents' passages, `cachetune serve`
starts the server, and the `openai` client asks it. Documents, questions and model are those of `make demo`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import pydoc_data.topics
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import QUESTIONS, TOPICS, step
from retrieval import Retriever
from rich.console import Console
from rich.table import Table
from server_process import Server, ServerError
from smollm2 import model_path

from cachetune_rag.text.splitting import Splitter

NAME = "smollm2"
"""What clients call the model."""
OPTIONS = ["--served-model-name", NAME, "--max-model-len", "4096", "--enforce-eager"]
"""Of `vllm serve`. The last one leaves out compiling, which takes longer than this demo's few requests."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        text: what the model said.
        ttft: seconds from the request to the first piece of text.
        prompt_tokens: tokens of the prompt.
        reused: tokens of the prompt that the usage counts as cached.
        recomputed: stored tokens that were computed again, by the server's metrics.
    """

    text: str
    ttft: float
    prompt_tokens: int
    reused: int
    recomputed: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a vLLM server with and without reuse.")
    parser.add_argument("--passages", type=int, default=8, help="passages a question (default: 8)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens a passage at most (default: 256)")
    parser.add_argument("--answer-tokens", type=int, default=48, help="tokens an answer at most (default: 48)")
    parser.add_argument(
        "--questions", type=int, default=len(QUESTIONS), help="how many of the questions are asked (default: all)"
    )
    parser.add_argument(
        "--stay", action="store_true", help="leave the server up for questions of your own, until Ctrl-C"
    )
    args = parser.parse_args()
    for package in ("vllm", "openai"):
        if importlib.util.find_spec(package) is None:
            sys.exit(
                f"{package} isn't installed here: run `make demo-serve`, which sets up an environment with all that is needed."
            )
    # Wide enough for the table where there is no terminal to ask.
    console = Console(width=None if sys.stdout.isatty() else 150)
    model = model_path()
    with tempfile.TemporaryDirectory(prefix="demo-serve-") as folder:
        store, log = Path(folder) / "kv-store", Path(folder) / "server.log"
        passages = precompute(model, store, args.chunk_tokens)
        server = Server([str(model), "--store", str(store), *OPTIONS], log, step)
        step("starting the server, which takes up to a minute or so:")
        step(f"  $ {shown(server.words)}")
        with server:
            step(f"it answers at {server.url}/v1; its own start line was:\n  {start_line(log)}")
            retrieve = Retriever(passages)
            warm_up(server, passages[: args.passages])
            rows = []
            for number, question in enumerate(QUESTIONS[: args.questions], start=1):
                step(f"question {number} of {min(args.questions, len(QUESTIONS))}: {question}")
                found = retrieve(question, args.passages)
                random.Random(number).shuffle(found)  # any order will do
                rows.append((question, *ask_both(server, prompt(question, found), args.answer_tokens)))
            show(console, rows)
            print_next(model, server, args.stay)
            if args.stay:
                step("the server stays up until Ctrl-C ...")
                signal.pause()


def shown(words: list[str]) -> str:
    """A command as a user would type it."""
    return shlex.join(["cachetune", *words])


def precompute(model: Path, store: Path, chunk_tokens: int) -> list[str]:
    """Store the documents' passages by the command that users have; returns the passages.

    The passages are handed over as they are, one document a line, so that the prompts below show exactly what was stored.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    split = Splitter(lambda text: len(tokenizer.encode(text, add_special_tokens=False)), chunk_tokens).split
    texts = pydoc_data.topics.topics
    documents = {name: split(texts[name]) for name in TOPICS if name in texts}
    file = store.with_name("documents.jsonl")
    file.write_text("".join(json.dumps({"id": name, "chunks": chunks}) + "\n" for name, chunks in documents.items()))
    words = ["precompute", str(file), "--model", str(model), "--store", str(store)]
    step(f"storing the documents' passages, once (a few minutes on two cores):\n  $ {shown(words)}")
    done = subprocess.run([sys.executable, "-m", "cachetune_rag", *words])
    if done.returncode:
        sys.exit(f"precompute ended with status {done.returncode}; the lines above say why.")
    return [chunk for chunks in documents.values() for chunk in chunks]


def prompt(question: str, passages: list[str]) -> str:
    """What a pipeline puts into its message; the passages stand there as they were stored."""
    return "Answer the question from these passages.\n\n" + "\n\n".join(passages) + f"\n\nQuestion: {question}"


def warm_up(server: Server, passages: list[str]) -> None:
    """The first request of a kind sets things up that later ones find: it is not counted."""
    step("warming up ...")
    ask_both(server, prompt("What is this about?", passages[::-1]), 1)


def ask_both(server: Server, content: str, tokens: int) -> tuple[Answer, Answer]:
    """Ask without reuse and with it. The reusing request comes first: what vLLM has computed and kept of an equal prompt would be taken
    by it, while pages with reused chunks are never seen by the plain one."""
    reused = ask(server, content, tokens, True)
    return ask(server, content, tokens, False), reused


def ask(server: Server, content: str, tokens: int, reuse: bool) -> Answer:
    """Ask once, and take the time until the first piece of the answer."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="-")
    # Reuse needs no word from the client. Only asking for none does.
    extra: dict[str, Any] = {} if reuse else {"kv_transfer_params": {"cachetune": {"reuse": False}}}
    before, started = recomputed_by(server), time.perf_counter()
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": content}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    text, ttft, usage = "", 0.0, None
    for piece in stream:
        if piece.choices and (said := piece.choices[0].delta.content):
            ttft = ttft or time.perf_counter() - started
            text += said
        usage = piece.usage or usage
    assert usage is not None  # asked for
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
    return Answer(text, ttft, usage.prompt_tokens, (cached or 0) if reuse else 0, recomputed_by(server) - before)


def recomputed_by(server: Server) -> int:
    """Stored tokens that the server has computed again so far."""
    return int(server.metric("cachetune_vllm_chunk_tokens_total", 'kind="recomputed"'))


def show(console: Console, rows: list[tuple[str, Answer, Answer]]) -> None:
    """Print the table, and the answers below it."""
    table = Table(title="Seconds until the answer begins, over HTTP", header_style="bold")
    for name in (
        "question",
        "prompt tokens",
        "without reuse",
        "with reuse",
        "sooner",
        "reused",
        "recomputed",
        "answer",
    ):
        table.add_column(name, justify="left" if name in ("question", "answer") else "right")
    for question, plain, reused in rows:
        table.add_row(
            question,
            str(plain.prompt_tokens),
            f"{plain.ttft:.2f} s",
            f"{reused.ttft:.2f} s",
            f"{plain.ttft / reused.ttft:.1f}x",
            str(reused.reused),
            str(reused.recomputed),
            "the same" if plain.text == reused.text else "other words",
        )
    console.print(table)
    for question, plain, reused in rows:
        console.print(f"[bold]{question}[/bold]")
        console.print("  without reuse: ", end="")
        console.print(" ".join(plain.text.split()), markup=False, highlight=False)
        console.print("  with reuse:    ", end="")
        console.print(
            "(the same)" if plain.text == reused.text else " ".join(reused.text.split()), markup=False, highlight=False
        )


def start_line(log: Path) -> str:
    """The line of `vllm serve` that `cachetune serve` printed."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith("vllm serve ")), "(not found in its log)")


def print_next(model: Path, server: Server, stays: bool) -> None:
    """Say what to do after the demo."""
    command = Path(sys.executable).with_name("cachetune")
    lines = [
        "",
        "What to try next, with documents of your own (docs/vllm.md has more):",
        f"  {command} precompute your-documents/ --model {model} --store kv-store",
        f"  {command} serve {model} --store kv-store --port 8000",
    ]
    if stays:
        body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 16})
        lines += [
            "This server is still up:",
            f"  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        ]
    print("\n".join(lines), flush=True)


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """Ctrl-C and a request to end leave through `with` blocks, so that the server and the temporary folder go too."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    try:
        yield
    except KeyboardInterrupt:
        step("\ninterrupted; nothing is left running.")
        sys.exit(130)
    except ServerError as error:
        sys.exit(f'{error}\n\ndocs/vllm.md says under "Troubleshooting" what to do about servers that don\'t start.')


if __name__ == "__main__":
    began = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a package that the retriever loads would show each request
    with ends_cleanly():
        main()
    step(f"\ndemo took {time.perf_counter() - began:.0f} s")
