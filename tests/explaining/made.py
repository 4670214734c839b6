"""Explanations made up for tests of the page: no model is run for them."""

from __future__ import annotations

import random
from typing import Any

from cachetune_rag.explaining.explanation import (
    AnswerToken,
    Attended,
    Attention,
    ExplainedAnswer,
    ExplainedChunk,
    Explanation,
    NearText,
    Part,
    PredictedDivergence,
    Run,
    TrueDivergence,
)

FATES = ("computed", "kept", "reused", "recomputed", "skipped", "missed")
WORDS = [
    "the",
    "keeper",
    "of",
    "the",
    "lighthouse",
    "wrote",
    "down",
    "every",
    "ship",
    "that",
    "passed",
    "the",
    "reef",
    "in",
    "winter",
    "&",
    "one",
    "balloon",
]


def made(count: int = 3, tokens: int = 60, seed: int = 0, **fields: Any) -> Explanation:
    """An explanation with every section, of `count` chunks of `tokens` tokens."""
    chance = random.Random(seed)
    parts = [
        Part("prefix", 0, (Run("kept", 3, "<s>Answer "), Run("computed", 4, "the question.\n\n")), None, 0.3, 0.31)
    ]
    at = 7
    for number in range(count):
        runs = _runs(chance, tokens, "missed" if number == 1 else None)
        parts.append(Part("chunk", at, runs, number, 0.5 / count, 0.5 / count, 0.1))
        parts.append(Part("between", at + tokens, (Run("computed", 1, "\n\n"),), None, 0.0, 0.0))
        at += tokens + 1
    parts[-1] = Part("query", at - 1, (Run("computed", 6, "\n\nQuestion: how many?"),), None, 0.2, 0.19)
    total = sum(part.tokens for part in parts)
    sums = {fate: sum(part.count(fate) for part in parts) for fate in FATES}
    near = NearText("altered", "a text much like it is stored", 4, "The ", "four brothers", "three brothers")
    given: dict[str, Any] = {
        "question": "How many ships?",
        "model": "a-model",
        "source": "engine",
        "report": {
            "prompt_tokens": total, "reused": sums["reused"], "recomputed": sums["recomputed"] + sums["skipped"], "missed": sums["missed"],
            "skipped": sums["skipped"], "prefix_kept": sums["kept"], "bytes_read": {"host": 123456, "disk": 0}, "ratio": 0.15,
            "prediction": None, "selector": "expected_error", "ttft": 0.08, "timings": {"lookup": 0.01, "select": 0.02, "load": 0.01, "compute": 0.03},
        },
        "parts": tuple(parts),
        "chunks": tuple(
            ExplainedChunk(n, "missed", "It is not in the store.", None, "ab", "", "", near)
            if n == 1
            else ExplainedChunk(n, "stored", "It is in the store.", f"d{n}", "ab", "host", "exact")
            for n in range(count)
        ),
        "attention": Attention(6, 0.3, (Attended(9, 0.2, "reused", "of ", "the", " ship", 0), Attended(8, 0.1, "skipped", "", " ", "x", 0))),
        "predicted": PredictedDivergence(0.4, 0.12, 0.03, 0.95, 0.9),
        "divergence": TrueDivergence(0.01, 0.02, 0.5, (AnswerToken("El", 0.01, True), AnswerToken("even", 0.03, False))),
        "reuse": ExplainedAnswer("Eleven ships.", 4, True, 0.08, {"lookup": 0.01, "select": 0.02, "load": 0.01, "compute": 0.03}),
        "full": ExplainedAnswer("Eleven balloons.", 4, False, 0.5, {"compute": 0.5}),
    }  # fmt: skip
    return Explanation(**(given | fields))


def _runs(chance: random.Random, tokens: int, only: str | None) -> tuple[Run, ...]:
    runs, left = [], tokens
    fate = "reused"
    while left:
        count = min(left, chance.randint(1, 12) if fate == "reused" else chance.randint(1, 2))
        text = "".join(f" {chance.choice(WORDS)}" for _ in range(count))
        runs.append(Run(only or fate, count, text))
        fate = chance.choice(("recomputed", "recomputed", "skipped")) if fate == "reused" else "reused"
        left -= count
    return tuple(runs)
