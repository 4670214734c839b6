"""Explanations of requests that a vLLM server answered: what its worker adds to a report, and what is made of a response.

A server looks at nothing that takes time: other requests wait. So these explanations have no attention, no divergence and no second answer,
and the nearest stored text of a missed chunk is not looked for. They name no document: a client need not know of those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cachetune_rag.errors import ConfigError
from cachetune_rag.explaining.explanation import FORMAT, ExplainedAnswer, ExplainedChunk, Explanation
from cachetune_rag.explaining.parts import parts_of
from cachetune_rag.explaining.reasons import at_once
from cachetune_rag.explaining.spelling import Spelling
from cachetune_rag.reuse.account import Account
from cachetune_rag.text.prompts.prompt import Prompt

EXPLAINED = "explained"
"""The name under which a response's report holds the parts and chunks of its prompt."""
PARAMS, REPORT = "kv_transfer_params", "cachetune"


def explained(prompt: Prompt, account: Account, tokenizer: Any) -> dict[str, Any]:
    """What a report says of every token and chunk, for JSON."""
    chunks = (
        ExplainedChunk(each.number, each.outcome.value, at_once(each.outcome), None, "", each.tier, each.codec)
        for each in sorted(account.chunks, key=lambda chunk: chunk.number)
    )
    return {
        "format": FORMAT,
        "parts": [dataclasses.asdict(part) for part in parts_of(prompt, account, Spelling(tokenizer, prompt.ids))],
        "chunks": [dataclasses.asdict(chunk) for chunk in chunks],
    }


def explanation_of(response: Mapping[str, Any]) -> Explanation:
    """The explanation of a request, from the whole response of the server as JSON has it.

    Raises:
        ConfigError: it has no report of reuse, or was made by a server of another release.
    """
    params = response.get(PARAMS) if isinstance(response, Mapping) else None
    report = params.get(REPORT) if isinstance(params, Mapping) else None
    if not isinstance(report, Mapping):
        raise ConfigError(
            "the response has no report of reuse: give the whole JSON that the server answered with, and let the request say "
            f'"{PARAMS}": {{"{REPORT}": {{"explain": true}}}}.'
        )
    said = dict(report)
    more = said.pop(EXPLAINED, None)
    known = {} if more is None else {name: more[name] for name in ("parts", "chunks") if name in more}
    usage = response.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    if "prompt_tokens" not in said and isinstance(usage.get("prompt_tokens"), int):
        said["prompt_tokens"] = usage["prompt_tokens"]
    return Explanation.from_dict(
        {
            "question": "",
            "model": str(response.get("model") or ""),
            "source": "server",
            "report": said,
            "reuse": dataclasses.asdict(_answer(response, said, usage)),
            "left": str(said.get("left") or ""),
            "format": FORMAT if more is None else more.get("format"),
            **known,
        }
    )


def _answer(response: Mapping[str, Any], report: Mapping[str, Any], usage: Mapping[str, Any]) -> ExplainedAnswer:
    """The first answer of a chat or plain completion."""
    choices = response.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    message = first.get("message")
    text = message.get("content") if isinstance(message, Mapping) else first.get("text")
    tokens = usage.get("completion_tokens")
    return ExplainedAnswer(
        text if isinstance(text, str) else None,
        tokens if isinstance(tokens, int) else 0,
        first.get("finish_reason") != "length",
        report.get("ttft"),
        dict(report.get("timings") or {}),
    )
