"""How long it takes to find the stored chunks in a long plain prompt, given as a text or as token ids.

    python benchmarks/recognition.py --out benchmarks/results/recognition-cpu.json

130,000 characters are about 32k tokens. In the second case all chunks begin with the same header, as a framework's metadata
makes them, so that many places look alike at first. The others are the worst there is: prompts in which a stored chunk may begin
at every character, with chunks of up to 2,000 lengths, made so that none of them is there. What is left out of the search then is
given too.

The same for token ids, of as many chunks: of one length, of mixed lengths, all with one header, and short ones; then prompts that
repeat what stored chunks begin with, or an interior whose edges never fit. `times` is how many times as long that takes as the
usual case, chunks of one length. Seconds are those of the process (`time.process_time`), which other processes disturb less.
"""

from __future__ import annotations

import argparse
import random
import string
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, spread, write_json

from cachetune_rag.chunks.recognition import ChunkRecognizer
from cachetune_rag.text.prompts.prompt import Chunk
from cachetune_rag.text.recognising.id_recognizer import ANCHOR, EDGE, LEAST, IdRecognizer

WORST_CHARACTERS = 200_000
WORST = {
    "one chunk, nearly everywhere": (["a" * 1000 + "b"], "a"),
    "2,000 lengths, nearly everywhere": (["a" * (1024 + i) + "b" for i in range(2000)], "a"),
    "1,000 periods, nearly everywhere": (["ab" * (600 + i) + "#" for i in range(1000)], "ab"),
    "2,000 lengths, all there": (["a" * (1024 + i) for i in range(2000)], "a"),
    "lengths of all sizes, nearly everywhere": (["a" * (32 << i) + "b" for i in range(13)], "a"),
}
"""Stored chunks, and what the prompt repeats."""

HEADERS = {"no header": "", "shared header": "file_path: /data/documents/handbook.txt\ntitle: The handbook\n\n"}

PROMPT_IDS = 32_768
TARGET = 0.005
"""Seconds in which a usual prompt's ids are searched."""
LENGTHS = {
    "ids: 512 tokens": (512, 512, 0),
    "ids: 16 to 1,024 tokens": (16, 1024, 0),
    "ids: 512 tokens, shared header": (512, 512, 24),
    "ids: up to 40 tokens": (LEAST, 40, 0),
}
"""Shortest and longest stored chunk, and how many tokens all of them begin with."""


def between_other_edges(interior: list[int]) -> list[list[int]]:
    """Chunks that differ at their edges alone."""
    return [[1] * EDGE + interior + [2] * (EDGE - 1) + [100 + i] for i in range(1000)]


_INTERIOR = list(range(10, 10 + ANCHOR))
_SAME = [7] * ANCHOR
WORST_IDS: dict[str, tuple[Iterable[list[int]], list[int]]] = {
    "ids: one chunk, nearly everywhere": ([[7] * 1000 + [8] * (EDGE + 1)], [7]),
    "ids: 2,000 lengths, nearly everywhere": ([[7] * (100 + i) + [8] * (EDGE + 1) for i in range(2000)], [7]),
    "ids: the shortest chunk, everywhere": ([[7] * (ANCHOR + 2 * EDGE)], [7]),
    "ids: an interior between other edges": (between_other_edges(_INTERIOR), _INTERIOR),
    "ids: between other edges, everywhere": (between_other_edges(_SAME), [7]),
}
"""Stored chunks, and what the prompt repeats."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--chunks", type=int, default=100_000, help="stored chunks")
    parser.add_argument("--characters", type=int, default=130_000, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", choices=("text", "ids"), help="one half of the cases")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.only != "ids":
        rows += text_rows(args.chunks, args.characters, args.rounds)
    if args.only != "text":
        rows += id_rows(args.chunks, args.rounds)
    print(table(rows), file=sys.stderr)
    settings = {"chunks": args.chunks, "characters": args.characters, "prompt_ids": PROMPT_IDS, "rounds": args.rounds}
    write_json(args.out, {"benchmark": "recognition", "environment": environment(), "settings": settings, "rows": rows})


def text_rows(chunks: int, characters: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Chunks in a text."""
    for name, header in HEADERS.items():
        rng = random.Random(9)
        vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(3000)]
        texts = [header + " ".join(rng.choices(vocabulary, k=rng.randint(100, 400))) for _ in range(1000)]
        recognizer = ChunkRecognizer()
        recognizer.update(enumerate(texts))
        recognizer.update((i, f"{header}{i:06d} {texts[i % 1000][len(header) :]}") for i in range(1000, chunks))
        prompt = "\n\n".join(rng.choice(texts) for _ in range(200))[:characters] + "\nQuestion: what?"
        found = sum(isinstance(s, Chunk) for s in recognizer.segment(prompt))
        yield told({"case": name, "found": found}, partial(recognizer.segment, prompt), rounds)
    for name, (texts, repeated) in WORST.items():
        recognizer = ChunkRecognizer()
        recognizer.update(enumerate(texts))
        search = partial(recognizer.search, repeated * (WORST_CHARACTERS // len(repeated)))
        result = search()
        yield told({"case": name, "found": len(result.places), "left_out": result.left_out}, search, rounds)
    yield memory("memory", lambda: ChunkRecognizer(), ((i, f"{i:06d} " + "x" * 200) for i in range(chunks)), chunks)


def id_rows(chunks: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Chunks in token ids."""
    usual = 0.0
    for name, (shortest, longest, header) in LENGTHS.items():
        rng = np.random.default_rng(9)
        head, stored = random_ids(rng, header), []
        recognizer = IdRecognizer(spell)
        for number in range(chunks):
            ids = [*head, *random_ids(rng, int(rng.integers(shortest, longest + 1)) - header)]
            recognizer.add(number, ids)
            if number < 3000:
                stored.append(ids)
        prompt: list[int] = []
        while len(prompt) < PROMPT_IDS:
            prompt += [*random_ids(rng, 3), *stored[int(rng.integers(len(stored)))]]
        del prompt[PROMPT_IDS:]
        row = told({"case": name, "found": len(recognizer.find(prompt))}, partial(recognizer.find, prompt), rounds)
        usual = usual or row["seconds"]["median"]
        yield row
    for name, (known, repeated) in WORST_IDS.items():
        recognizer = IdRecognizer(spell)
        recognizer.update(enumerate(known))
        prompt = (repeated * PROMPT_IDS)[:PROMPT_IDS]
        result = recognizer.search(prompt)
        row = told(
            {"case": name, "found": len(result.places), "left_out": result.left_out},
            partial(recognizer.find, prompt),
            rounds,
        )
        yield row | {"times": row["seconds"]["median"] / usual}
    rng = np.random.default_rng(1)
    items = ((number, random_ids(rng, 512)) for number in range(chunks))
    yield memory("ids: memory", lambda: IdRecognizer(spell), items, chunks)


def random_ids(rng: np.random.Generator, count: int) -> list[int]:
    """Token ids of which some are far more frequent than others, as in texts."""
    return np.minimum(rng.zipf(1.2, count), 127_999).tolist()  # type: ignore[no-any-return]


def spell(ids: Iterable[int]) -> str:
    """Stands for a tokenizer's pieces."""
    return "".join([f" {number}" for number in ids])


def told(row: dict[str, Any], work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """The row with how long the work takes, in seconds of this process."""
    work()
    took = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        took.append(time.process_time() - started)
    row["seconds"] = spread(took)
    print(f"{row['case']}: {row['found']} found in {row['seconds']['median'] * 1e3:.1f} ms (median)", file=sys.stderr)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in short, as Markdown. A usual prompt is to be searched in `TARGET`, a hostile one in some times as long."""
    lines = [
        "| case | chunks found | places left out | ms (median) | ms (slowest) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "seconds" in row:
            median, slowest = row["seconds"]["median"] * 1e3, max(row["seconds"]["samples"]) * 1e3
            lines.append(
                f"| {row['case']} | {row['found']} | {row.get('left_out', 0)} | {median:.1f} | {slowest:.1f} |"
            )
    over = [row["case"] for row in rows if row["case"] in LENGTHS and row["seconds"]["median"] > TARGET]
    said = (
        f"more than {TARGET * 1e3:.0f} ms: {', '.join(over)}"
        if over
        else f"all usual prompts of ids within {TARGET * 1e3:.0f} ms"
    )
    return "\n".join([*lines, said])


def memory(name: str, make: Callable[[], Any], items: Iterable[tuple[int, Any]], chunks: int) -> dict[str, Any]:
    """What a recogniser takes for each chunk."""
    tracemalloc.start()
    recognizer = make()
    recognizer.update(items)
    row = {"case": name, "bytes_a_chunk": tracemalloc.get_traced_memory()[0] / chunks}
    tracemalloc.stop()
    print(f"{name}: {row['bytes_a_chunk']:.0f} bytes a chunk", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
