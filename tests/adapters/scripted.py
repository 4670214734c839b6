"""A tiny model with given answers, which go through its own decoding token by token. Random weights would never give them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor


class Scripted:
    """A logits processor that leaves one token to choose from: the next one of the answer.

    Args:
        answer: makes the answer of a prompt's text.

    Attributes:
        prompts: the prompts that were answered, in order.
    """

    def __init__(self, answer: Callable[[str], str]):
        self.prompts: list[str] = []
        self._answer, self._tokenizer = answer, tiny.tokenizer()
        self._turn = self._tokenizer.convert_tokens_to_ids("<|im_start|>")
        self._thought = self._tokenizer.encode(
            "<think>\n\n</think>\n\n", add_special_tokens=False
        )  # some templates' own
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        told = ids[0].tolist()
        start = len(told) - told[::-1].index(self._turn) + len("assistant\n")
        if told[start : start + len(self._thought)] == self._thought:
            start += len(self._thought)
        prompt = tuple(told[:start])
        if prompt not in self._known:
            self.prompts.append(self._tokenizer.decode(prompt))
            said = self._tokenizer.encode(self._answer(self.prompts[-1]), add_special_tokens=False)
            self._known[prompt] = [*said, self._tokenizer.eos_token_id]
        only = torch.full_like(scores, -torch.inf)
        only[0, self._known[prompt][len(told) - start]] = 0
        return only


def obedient(prompt: str) -> str:
    """Calls the tool that it is asked to, or that the user names, with arguments that fit; else JSON that fits; else a few words."""
    asked = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "<tool_response>" in asked:
        return "It is done."
    shown = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    tools = [json.loads(line)["function"] for line in shown[1].splitlines()] if shown else []
    for tool in tools:
        if tool["name"] in asked or len(tools) == 1 or "Answer by calling a function." in asked:
            call = {"name": tool["name"], "arguments": _filled(tool["parameters"], asked)}
            return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    if schema := re.search(r"keeps to this JSON schema, and nothing else:\n(.*?)<\|im_end\|>", asked, re.DOTALL):
        return f"```json\n{json.dumps(_filled(json.loads(schema[1]), asked))}\n```"
    if "one JSON object and nothing else" in asked:
        return '{"setup": "Why?", "punchline": "So."}'
    return "Some words."


def _filled(schema: dict[str, Any], asked: str) -> Any:
    """A value that a schema allows; a text is what the user put into quotes."""
    for alternative in schema.get("anyOf", ()):
        return _filled(alternative, asked)
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: _filled(value, asked) for name, value in schema.get("properties", {}).items()}
    quoted = re.search(r"'([^']+)'", asked)
    text = quoted[1] if quoted else "a text"
    return {"integer": 3, "number": 3.5, "string": text, "boolean": True, "array": []}.get(kind)
