"""How long an answer may get: what was asked for, what configurations say, and where the context ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny import llama, tokenizer
from transformers import GenerationConfig

from cachetune_rag import CacheTune, ConfigError

CONTEXT = 320
NEVER: dict[str, Any] = {"eos_token_id": []}


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(max_positions=CONTEXT), tokenizer(), prompt_template="{prefix}{chunks}{query}") as made:
        yield made


def length(engine: CacheTune, query: str = "Who?", **options: Any) -> int:
    answer = engine.generate(query, prefix="", **NEVER, **options)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + answer.completion_tokens <= CONTEXT
    return answer.completion_tokens


def test_nobody_says(engine: CacheTune) -> None:
    assert length(engine) == 256
    assert length(engine, max_new_tokens="auto") == 256
    assert length(engine, max_new_tokens=7) == 7


def test_the_context_is_the_end_whatever_is_asked_for(engine: CacheTune) -> None:
    long = "x" * 300
    prompt = engine.full_prefill(long, prefix="").report.prompt_tokens
    assert length(engine, long) == length(engine, long, max_new_tokens=10**9) == CONTEXT - prompt
    short = engine.full_prefill("Who?", prefix="").report.prompt_tokens
    assert length(engine, max_new_tokens=None) == CONTEXT - short
    assert length(engine, generation_config=GenerationConfig(max_new_tokens=5000)) == CONTEXT - short


def test_a_configuration_counts_and_the_nearest_one_goes_first(engine: CacheTune) -> None:
    assert length(engine, generation_config=GenerationConfig(max_new_tokens=3)) == 3
    assert length(engine, generation_config=GenerationConfig(max_new_tokens=3), max_new_tokens=None) == 3
    assert length(engine, generation_config=GenerationConfig(max_new_tokens=3), max_new_tokens=5) == 5
    engine.adapter.model.generation_config.max_new_tokens = 9
    assert length(engine) == length(engine, max_new_tokens=None) == 9
    assert length(engine, generation_config=GenerationConfig(max_new_tokens=3)) == 3
    assert length(engine, generation_config=GenerationConfig(temperature=0.5)) == 9
    assert length(engine, max_new_tokens=4) == 4


def test_max_length_counts_the_prompt(engine: CacheTune) -> None:
    prompt = engine.full_prefill("Who?", prefix="").report.prompt_tokens
    engine.adapter.model.generation_config.max_length = prompt + 6
    assert length(engine) == 6
    assert length(engine, generation_config=GenerationConfig(max_length=prompt + 2)) == 2
    assert length(engine, generation_config=GenerationConfig(max_length=prompt + 2, max_new_tokens=3)) == 3
    assert length(engine, max_new_tokens=8) == 8
    with pytest.raises(ConfigError, match=rf"max_length .* is {prompt}, which counts the prompt's {prompt} tokens"):
        engine.generate("Who?", prefix="", generation_config=GenerationConfig(max_length=prompt))


@pytest.mark.parametrize("given", [0, -1, True, 2.5, "many", float("nan"), [3]])
def test_what_is_no_length_is_refused(engine: CacheTune, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens is .*'auto'.*None"):
        engine.generate("Who?", max_new_tokens=given)


def test_the_models_own_end_tokens_and_stop_strings_count(engine: CacheTune) -> None:
    free = engine.generate("Who?", prefix="", **NEVER, max_new_tokens=12)
    config = engine.adapter.model.generation_config
    last = next(i for i in range(2, 12) if free.token_ids[i] not in free.token_ids[:i])
    config.eos_token_id = [260, free.token_ids[last]]
    ended = engine.generate("Who?", prefix="")
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[: last + 1], "stop")
    config.eos_token_id = []
    assert engine.generate("Who?", prefix="", max_new_tokens=12).token_ids == free.token_ids
    text = next(c for c in free.text if c != "\ufffd")
    config.stop_strings = [text]
    assert engine.generate("Who?", prefix="", max_new_tokens=12).text == free.text[: free.text.index(text)]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**64},
        {"seed": True},
        {"eos_token_id": [None]},
        {"eos_token_id": 261},
        {"pad_token_id": -1},
        {"bad_words_ids": [[5], [261]]},
        {"suppress_tokens": [10**6]},
        {"sequence_bias": [[[300], -10.0]]},
        {"top_k": float("inf")},
        {"max_time": "x"},
        {"max_time": float("nan")},
        {"no_repeat_ngram_size": True},
        {"min_new_tokens": 2**64},
        {"logits_processor": [3]},
        {"logits_processor": "x"},
        {"stopping_criteria": 3},
    ],
    ids=str,
)
def test_settings_that_would_fail_amid_the_answer_are_refused_before(
    engine: CacheTune, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        engine.generate("Who?", max_new_tokens=2, **options)
    assert engine.stats().requests == 0


def test_a_model_without_a_configuration_says_so(engine: CacheTune) -> None:
    engine.adapter.model.generation_config = None
    with pytest.raises(ConfigError, match="generation_config is None"):
        engine.generate("Who?", max_new_tokens=1)
