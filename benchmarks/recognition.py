"""How long it takes to find the stored chunks in a long plain prompt.

    python benchmarks/recognition.py --out benchmarks/results/recognition-cpu.json

130,000 characters are about 32k tokens. In the second case all chunks begin with the same header, as a framework's metadata
makes them, so that many places look alike at first. The others are the worst there is: prompts in which a stored chunk may begin
at every character, with chunks of up to 2,000 lengths, made so that none of them is there. What is left out of the search then is
given too.
"""

from __future__ import annotations

import argparse
import random
import string
import sys
import tracemalloc
from functools import partial
from pathlib import Path

from common import environment, seconds, spread, write_json

from cachetune_rag.chunks.recognition import ChunkRecognizer
from cachetune_rag.text.prompts.prompt import Chunk

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--chunks", type=int, default=100_000, help="stored chunks")
    parser.add_argument("--characters", type=int, default=130_000, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    rows = []
    for name, header in HEADERS.items():
        rng = random.Random(9)
        vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(3000)]
        texts = [header + " ".join(rng.choices(vocabulary, k=rng.randint(100, 400))) for _ in range(1000)]
        recognizer = ChunkRecognizer()
        recognizer.update(enumerate(texts))
        recognizer.update((i, f"{header}{i:06d} {texts[i % 1000][len(header) :]}") for i in range(1000, args.chunks))
        prompt = "\n\n".join(rng.choice(texts) for _ in range(200))[: args.characters] + "\nQuestion: what?"
        found = sum(isinstance(s, Chunk) for s in recognizer.segment(prompt))
        took = [seconds(partial(recognizer.segment, prompt)) for _ in range(args.rounds)]
        rows.append({"case": name, "found": found, "seconds": spread(took)})
        print(f"{name}: {found} chunks found in {rows[-1]['seconds']['median'] * 1e3:.1f} ms (median)", file=sys.stderr)
    for name, (texts, repeated) in WORST.items():
        recognizer = ChunkRecognizer()
        recognizer.update(enumerate(texts))
        prompt = repeated * (WORST_CHARACTERS // len(repeated))
        result = recognizer.search(prompt)
        took = [seconds(partial(recognizer.search, prompt)) for _ in range(args.rounds)]
        rows.append({"case": name, "found": len(result.places), "left_out": result.left_out, "seconds": spread(took)})
        print(f"{name}: {rows[-1]['seconds']['median'] * 1e3:.1f} ms (median)", file=sys.stderr)
    tracemalloc.start()
    recognizer = ChunkRecognizer()
    recognizer.update((i, f"{i:06d} " + "x" * 200) for i in range(args.chunks))
    rows.append({"case": "memory", "bytes_a_chunk": tracemalloc.get_traced_memory()[0] / args.chunks})
    tracemalloc.stop()
    print(f"memory: {rows[-1]['bytes_a_chunk']:.0f} bytes a chunk", file=sys.stderr)
    settings = {"chunks": args.chunks, "characters": args.characters, "rounds": args.rounds}
    write_json(args.out, {"benchmark": "recognition", "environment": environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
