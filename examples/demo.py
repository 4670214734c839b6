"""`make demo`: a real model answers questions over real documents, with reuse and by full prefill.

Documents: topics of Python's language reference, which ship with Python (`pydoc_data.topics`). Passages are picked by a faiss
retriever over real embeddings. The model is SmolLM2-135M-Instruct, float32, on the CPU (or a GPU if there is one).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import tempfile
import time
from pathlib import Path

from retrieval import Retriever
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from smollm2 import model_path

from cachetune_rag import CacheTune, Document, Splitter
from cachetune_rag.chunks.precompute import Progress as PrecomputeProgress

TOPICS = [
    "assert", "break", "calls", "comparisons", "context-managers", "continue", "del", "exceptions", "for", "global", "if", "nonlocal",
    "pass", "raise", "return", "try", "while", "with", "yield",
]  # fmt: skip

QUESTIONS = [
    "What does the nonlocal statement do?",
    "When is the else clause of a for loop executed?",
    "How does the with statement use a context manager?",
    "What happens when an assert statement fails?",
    "How can comparisons be chained?",
]
RATIOS = (0.05, 0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer questions from reused KV, beside full prefill.")
    parser.add_argument("--passages", type=int, default=8, help="passages a question (default: 8)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens a passage at most (default: 256)")
    parser.add_argument("--answer-tokens", type=int, default=48, help="tokens an answer at most (default: 48)")
    args = parser.parse_args()
    # Wide enough for the table where there is no terminal to ask.
    console = Console(width=None if sys.stdout.isatty() else 150)

    folder = model_path()
    step(f"loading {folder.name} ...")
    with tempfile.TemporaryDirectory() as store, CacheTune.from_pretrained(folder, store) as engine:
        splitter = Splitter(lambda text: len(engine.prompts.encode(text)), args.chunk_tokens)
        texts = pydoc_data.topics.topics
        documents = [Document(name, splitter.split(texts[name])) for name in TOPICS if name in texts]
        index(engine, documents, console)
        retrieve = Retriever([chunk for document in documents for chunk in document.chunks])
        results = []
        for number, question in enumerate(QUESTIONS, start=1):
            step(f"question {number} of {len(QUESTIONS)}: {question}")
            results.append(ask(engine, question, retrieve(question, args.passages), args.answer_tokens))
        show(console, results)


def step(message: str) -> None:
    """Say what happens now, also where there is no terminal to draw a bar on."""
    print(message, file=sys.stderr, flush=True)


def index(engine: CacheTune, documents: list[Document], console: Console) -> None:
    """Store the documents' chunks. This is needed once for a collection of documents."""
    total = sum(len(d.chunks) for d in documents)
    step(f"precomputing {total} chunks of {len(documents)} documents ...")
    if not console.is_terminal:
        console.print(str(engine.precompute(documents, progress=Lines(total))))
        return
    columns = (
        TextColumn("precompute"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} chunks"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        summary = engine.precompute(documents, progress=lambda p: bar.update(task, completed=p.chunks + p.skipped))
    console.print(str(summary))


class Lines:
    """Shows progress in lines, one every ten seconds, where a bar can't be drawn."""

    def __init__(self, total: int):
        self._total, self._spoke = total, time.monotonic()

    def __call__(self, progress: PrecomputeProgress) -> None:
        if time.monotonic() - self._spoke >= 10:
            self._spoke = time.monotonic()
            step(f"{progress.chunks + progress.skipped} of {self._total} chunks")


def ask(engine: CacheTune, question: str, passages: list[str], answer_tokens: int) -> dict:
    """Answer one question by full prefill and with reuse: reports, KL of the next token, and answers."""
    full = engine.full_prefill(query=question, chunks=passages)
    reference = full.logits.log_softmax(-1)
    rows = []
    for ratio in RATIOS:
        state = engine.prefill(query=question, chunks=passages, ratio=ratio)
        odds = state.logits.log_softmax(-1)
        divergence = float((reference.exp() * (reference - odds)).sum())
        answer = engine.generate(
            query=question, chunks=passages, ratio=ratio, max_new_tokens=answer_tokens, do_sample=False
        )
        rows.append((state.report, divergence, answer.text))
    answer = engine.generate(
        query=question, chunks=passages, reuse=False, max_new_tokens=answer_tokens, do_sample=False
    )
    return {"question": question, "full": full.report, "full_answer": answer.text, "rows": rows}


def show(console: Console, results: list[dict]) -> None:
    """Print the table, and the answers below it."""
    table = Table(title="Time to first token: full prefill and reuse", header_style="bold")
    for name in (
        "question",
        "prompt",
        "full prefill",
        "r",
        "reuse",
        "speed-up",
        "reused",
        "recomputed",
        "missed",
        "KL",
    ):
        table.add_column(name, justify="left" if name == "question" else "right")
    for result in results:
        for i, (report, divergence, _) in enumerate(result["rows"]):
            first = i == 0
            table.add_row(
                result["question"] if first else "",
                str(report.prompt_tokens) if first else "",
                f"{result['full'].ttft:.2f} s" if first else "",
                f"{report.ratio:.2f}",
                f"{report.ttft:.2f} s",
                f"{result['full'].ttft / report.ttft:.1f}x",
                str(report.reused),
                str(report.recomputed),
                str(report.missed),
                f"{divergence:.4f}",
                end_section=i == len(result["rows"]) - 1,
            )
    console.print(table)
    console.print("KL: divergence of the next token's distribution from full prefill's; 0 is identical.\n")
    for result in results:
        console.print(f"[bold]{result['question']}[/bold]")
        console.print("  full prefill: ", end="")
        console.print(" ".join(result["full_answer"].split()), markup=False, highlight=False)
        for report, _, text in result["rows"]:
            console.print(f"  reuse r={report.ratio:.2f}: ", end="")
            same = text == result["full_answer"]
            console.print("(the same)" if same else " ".join(text.split()), markup=False, highlight=False)


if __name__ == "__main__":
    started = time.perf_counter()
    sys.path.insert(0, str(Path(__file__).parent))
    main()
    print(f"\ndemo took {time.perf_counter() - started:.0f} s", file=sys.stderr)
