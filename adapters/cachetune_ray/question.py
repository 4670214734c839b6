"""A request on its way from the ingress to a replica."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cachetune_ray.sketch import Samples, samples_of


@dataclass(frozen=True)
class Question:
    """What a client sent, and the hashes by which a router knows which chunks it shows.

    Attributes:
        method, path, headers, body: as they came; the path with its query.
        samples: hashes of the prompt's texts.
        streamed: whether the client wants the answer piece by piece.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    samples: Samples
    streamed: bool

    @classmethod
    def of(cls, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Question:
        """A request. What is no JSON has no hashes: the server says what is wrong with it."""
        try:
            said = json.loads(body) if body else None
        except (ValueError, RecursionError):
            said = None
        fields = said if isinstance(said, dict) else {}
        texts = list(_texts(fields.get("messages"))) + list(_texts(fields.get("prompt")))
        return cls(method, path, headers, body, samples_of(texts), fields.get("stream") is True)


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """The strings of a prompt, of a list of prompts, or of messages. Token ids have none."""
    if isinstance(value, str):
        yield value
    elif depth < 4:
        if isinstance(value, list):
            for each in value:
                yield from _texts(each, depth + 1)
        elif isinstance(value, dict):
            yield from _texts(value.get("content", value.get("text")), depth + 1)
