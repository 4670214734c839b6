"""A user's own prompts, to measure with: checked and built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cachetune_rag.checking.arguments import is_iterable
from cachetune_rag.errors import ConfigError, PromptError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store.printing import shown


def prompts_of(bench: Bench, samples: Iterable[Any]) -> list[Prompt]:
    """Prompts made of samples: dicts (or objects) with query, chunks and perhaps prefix, as for `generate`. Prompts are taken too.

    Raises:
        ConfigError, PromptError: there are no samples, or one can't be used. The message says which and why.
    """
    if isinstance(samples, str | bytes | Mapping) or not is_iterable(samples):
        raise ConfigError(
            f"samples is {shown(samples)}, a {type(samples).__name__}: use a list of dicts with query and chunks, or of Prompts."
        )
    prompts = [_prompt(bench, number, sample) for number, sample in enumerate(samples, start=1)]
    if not prompts:
        raise ConfigError("there are no samples: give some of your own prompts (10 to 50 are a good number).")
    return prompts


def _prompt(bench: Bench, number: int, sample: Any) -> Prompt:
    try:
        prompt = bench.checked(sample) if isinstance(sample, Prompt) else _build(bench, sample)
    except PromptError as error:
        raise type(error)(f"sample {number}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"sample {number}: {error}") from error
    if not any(prompt.chunk_ids):
        raise ConfigError(f"sample {number} has no chunks, so nothing could be reused: leave it out.")
    if len(prompt.ids) <= bench.adapter.reuse_beyond:
        raise ConfigError(
            f"sample {number} has {len(prompt.ids)} tokens; this model's prompts of up to "
            f"{bench.adapter.reuse_beyond} are computed whole: use longer samples."
        )
    return prompt


def _build(bench: Bench, sample: Any) -> Prompt:
    if isinstance(sample, Mapping):
        unknown = sorted(set(map(str, sample)) - {"query", "chunks", "prefix"})
        if unknown:
            raise ConfigError(f"it has the key {shown(unknown[0])}: use query, chunks and prefix.")
        values = [sample.get(name) for name in ("query", "chunks", "prefix")]
    else:
        values = [getattr(sample, name, None) for name in ("query", "chunks", "prefix")]
    query, chunks, prefix = values
    if not isinstance(query, str) or isinstance(chunks, str) or not isinstance(chunks, Sequence):
        raise ConfigError(
            f"it is {shown(sample)}: use a dict (or an object) with query, a string, and chunks, a list of strings; "
            "or a Prompt."
        )
    return bench.prompt(query, chunks, prefix)
