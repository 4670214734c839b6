"""Random requests to one vLLM, many at a time, some of them given up: every answer that is given has to be the embedded engine's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from cachetune_rag.text.prompts.segments import Prompt
from tests.vllm.test_connector import CHUNKS, Served, prompt_of, with_chunks

SETTINGS = [
    *({"selector": name, "ratio": ratio} for name in ("frequency", "expected_error") for ratio in (0.05, 0.3)),
    {"selector": "kv_deviation", "ratio": 0.15},
    {"selector": "none", "ratio": 0},
]
WITHOUT_REUSE: list[dict[str, Any]] = [{"reuse": False}, {"ratio": 1.0}]
AT_ONCE = 12
"""Requests that are under way; vLLM runs 8 of them and lets the others wait."""
UNKNOWN = "A text that is not in the store, and that every request has to compute."


@dataclass
class Asked:
    """A request.

    Attributes:
        prompt: with the chunks that are stored.
        settings: its reuse settings.
        answers, tokens: how many answers it asks for, each of so many tokens.
        steps: given up after so many steps of vLLM; None: never.
        found: the tokens of its answers, once it is answered.
    """

    prompt: Prompt
    settings: dict[str, Any]
    answers: int
    tokens: int
    steps: int | None
    found: list[list[int]] | None = None


class Fuzz:
    """A run of random requests.

    Args:
        served: where they go.
        seed: of their choice.
    """

    def __init__(self, served: Served, seed: int):
        self._served, self._rng = served, random.Random(seed)
        self._core = served.tiny.llm.llm_engine
        self._asked: dict[str, Asked] = {}
        self._seed = seed

    def run(self, count: int) -> list[Asked]:
        """Ask so many times. Returns the requests that were answered."""
        waiting = [self._choose() for _ in range(count)]
        while waiting or self._core.has_unfinished_requests():
            while waiting and self._core.get_num_unfinished_requests() < AT_ONCE:
                self._add(waiting.pop())
            for out in self._core.step():
                if out.finished and all(answer.finish_reason == "length" for answer in out.outputs):
                    self._asked[out.request_id].found = [list(answer.token_ids) for answer in out.outputs]
            self._give_up()
        return [asked for asked in self._asked.values() if asked.found is not None]

    def wrong(self, answered: list[Asked]) -> list[Asked]:
        """Those of the answered requests whose answers are not right."""
        right: dict[str, list[int]] = {}
        wrong = []
        for asked in answered:
            plain = asked.settings in WITHOUT_REUSE
            key = repr((asked.prompt.ids, not plain and asked.settings, asked.tokens))
            if key not in right:
                right[key] = (
                    self._served.tiny.reference_tokens(list(asked.prompt.ids), asked.tokens)
                    if plain
                    else self._served.engines([asked.prompt], tokens=asked.tokens, **asked.settings)[0]
                )
            if asked.found != [right[key]] * asked.answers:
                wrong.append(asked)
        return wrong

    def _choose(self) -> Asked:
        rng = self._rng
        texts = rng.choices(CHUNKS, k=rng.randint(1, 3))
        if rng.random() < 0.2:
            texts.insert(rng.randrange(len(texts) + 1), UNKNOWN)
        plain = rng.random() < 0.25
        # Requests without reuse begin in another way: what vLLM has computed for one is found by others with the same beginning.
        prompt = prompt_of(texts, f"What is {rng.randrange(3)}?", "<s>Tell me." if plain else "<s>Answer.")
        return Asked(
            with_chunks(prompt, [number for number, text in enumerate(texts) if text in CHUNKS]),
            rng.choice(WITHOUT_REUSE if plain else SETTINGS),
            answers=rng.choice([1, 1, 1, 2]),
            tokens=rng.choice([1, 4, 4, 10, 60]),
            steps=rng.randrange(12) if rng.random() < 0.25 else None,
        )

    def _add(self, asked: Asked) -> None:
        from vllm.sampling_params import RequestOutputKind

        name = f"fuzz{self._seed}.{len(self._asked)}"
        self._asked[name] = asked
        likeliest = {"temperature": 1.0, "top_k": 1}  # vLLM refuses several answers at temperature 0
        counts = {"n": asked.answers, "max_tokens": asked.tokens, "output_kind": RequestOutputKind.FINAL_ONLY}
        params = self._served.params(counts | likeliest, **asked.settings)
        self._core.add_request(name, {"prompt_token_ids": list(asked.prompt.ids)}, params)

    def _give_up(self) -> None:
        for name, asked in self._asked.items():
            if asked.steps is not None and asked.found is None:
                asked.steps -= 1
                if asked.steps == 0:
                    self._core.abort_request([name])
