"""What a selector chooses of one prompt, with the revision at which it does so."""

from __future__ import annotations

import hashlib

import pytest
import torch
from test_selection import FakeContext
from tiny import tokenizer
from torch import Tensor

from cachetune_rag.selection import ReusedChunk, get_selector, names
from cachetune_rag.text.prompts.continuations import Continuations
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.prompts.sentences import Sentences

CHUNKS = [
    "The mill is old. It has a door. The access code of the mill",
    "is 48213. Nobody knows it. The door is shut.\n\n| part | stock |\n| bolt | 12 |\n| copper nut |",
    "8 |\n| wire | 3 |\n\nThe copper nut is kept in the shed behind the mill. Visitors climb 214 steps.",
    "for step in steps:\n    climb(step)\nmill_width_in_steps =",
    "214\nfor rung in ladder:\n    climb(rung)",
    "Nobody asks for the wire. The last forty steps are a ladder, so take care of the copper nut. It has 214 steps. The mill has",
    "214 steps.",
]
QUERY = "How many of the copper nut are there, how many mill_width_in_steps, and what is the access code of the mill?"

CHOICES = {
    names.EXPECTED_ERROR: (7, "b929b9090962"),
    names.EXPECTED_ERROR_EARLY: (6, "c30c046d4e1c"),
    names.EXPECTED_ERROR_TOKENS: (5, "c30c046d4e1c"),
    names.PROBE: (5, "c30c046d4e1c"),
    names.FREQUENCY: (5, "fb0f244f69bb"),
    names.CHUNK_HEAD: (1, "f0453fe9be04"),
}
"""The revision, and the beginning of a sum of the chosen places."""


class OfAPrompt(FakeContext):
    """A context whose scores don't depend on a shortlist."""

    def expected_error(
        self, num_layers: int, queries: int, shortlist: tuple[int, int] | None = None, whole: bool = False
    ) -> Tensor:
        return self.received_attention(num_layers, queries)


def context() -> OfAPrompt:
    """The prompt, with scores that are made up."""
    prompt = PromptBuilder(tokenizer()).build(query=QUERY, chunks=CHUNKS)
    made = OfAPrompt([])
    made.length, made.ids = len(prompt.ids), prompt.ids_array
    scores = torch.arange(made.length) * 7919 % 1009 / 1009
    made.attention = scores.repeat(made.num_layers, 1)
    made.chunks = [
        ReusedChunk(s.start, torch.argsort(scores[s.start : s.end]), scores[s.start : s.end]) for s in prompt.spans
    ]
    made.sentences, made.continuations = Sentences(tokenizer())(prompt), Continuations(tokenizer())(prompt)
    assert len(made.continuations) == 4
    return made


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_changes_with_its_revision(name: str) -> None:
    """Where this fails because a selector now chooses other tokens, raise its revision, and say so in the changelog: what was calibrated before holds for another choice."""
    selector = get_selector(name)
    places = sorted(selector.select(context(), 0.15).tolist())
    assert (selector.revision, hashlib.sha256(repr(places).encode()).hexdigest()[:12]) == CHOICES[name]
