"""Arguments of the chat template, from the engine's methods to the prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from chat_templates import GEMMA2, QWEN3
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk, ConfigError, PromptError

PASSAGE = "The dam is 214 metres high, and was finished in 1936. " * 2
NOT_THINKING = "<think>\n\n</think>\n\n"


def thinking_tokenizer(template: str = QWEN3) -> Any:
    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    return made


@pytest.fixture(name="engine", scope="module")
def _engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), thinking_tokenizer(), None, lead_in="first_token") as engine:
        yield engine


def shown(engine: CacheTune, prompt: Any) -> str:
    return str(engine.tokenizer.decode(prompt.ids))


def test_a_requests_arguments_reach_the_template(engine: CacheTune) -> None:
    state = engine.prefill("How high?", [PASSAGE], enable_thinking=False)
    assert shown(engine, state.prompt).endswith(NOT_THINKING)
    assert engine.full_prefill("How high?", [PASSAGE], enable_thinking=False).prompt == state.prompt
    assert NOT_THINKING not in shown(engine, engine.prefill("How high?", [PASSAGE], enable_thinking=True).prompt)
    answer = engine.generate("How high?", [PASSAGE], enable_thinking=False, temperature=0, max_new_tokens=4)
    assert answer.report.prompt_tokens == len(state.prompt.ids)
    with engine.stream("How high?", [PASSAGE], enable_thinking=False, max_new_tokens=4) as pieces:
        assert "".join(pieces) == answer.text
    many = engine.generate_many([{"query": "How high?", "chunks": [PASSAGE]}], enable_thinking=False, max_new_tokens=4)
    assert [a.text for a in many] == [answer.text]


def test_messages_and_tools(engine: CacheTune) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
    messages = [{"role": "user", "content": [Chunk(PASSAGE), " How high?"]}]
    prompt = engine.prompt_from_messages(messages, tools=[tool], enable_thinking=False)
    plain = [{"role": "user", "content": PASSAGE + " How high?"}]
    assert shown(engine, prompt) == engine.tokenizer.apply_chat_template(
        plain, tools=[tool], enable_thinking=False, tokenize=False, add_generation_prompt=True
    )
    assert prompt.chunk_texts == (PASSAGE,)
    assert engine.prompt_from_messages(messages, recognise=False, tools=[tool], enable_thinking=False) == prompt
    with_tools = engine.generate("How high?", [PASSAGE], tools=[tool], max_new_tokens=1).report.prompt_tokens
    assert with_tools > engine.generate("How high?", [PASSAGE], max_new_tokens=1).report.prompt_tokens


def test_an_engines_own_defaults() -> None:
    options: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    with CacheTune(llama(), thinking_tokenizer(), None, lead_in="first_token", **options) as engine:
        messages = [{"role": "user", "content": "How high?"}]
        assert shown(engine, engine.prefill("How high?").prompt).endswith(NOT_THINKING)
        assert shown(engine, engine.prompt_from_messages(messages)).endswith(NOT_THINKING)
        assert NOT_THINKING not in shown(engine, engine.prompt_from_messages(messages, enable_thinking=True))
        assert NOT_THINKING not in shown(engine, engine.prefill("How high?", enable_thinking=True).prompt)


@pytest.mark.parametrize(
    ("template", "kwargs", "message"),
    [
        (QWEN3, {"enable_thinkin": True}, "did you mean 'enable_thinking'"),
        (GEMMA2, {"enable_thinking": True}, "has no variable 'enable_thinking'"),
        (QWEN3, ["enable_thinking"], "use a dict"),
        (None, {"enable_thinking": True}, "this tokenizer has no chat template"),
    ],
)
def test_defaults_that_the_template_doesnt_use_are_refused(template: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheTune(llama(), thinking_tokenizer(template), None, chat_template_kwargs=kwargs)


def test_other_arguments_are_refused_with_the_nearest_name(engine: CacheTune) -> None:
    with pytest.raises(ConfigError, match=r"'enable_thinkin' is no .* did you mean 'enable_thinking'"):
        engine.generate("q", enable_thinkin=False)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        engine.generate("q", temperatur=0.5)
    with pytest.raises(PromptError, match="did you mean 'enable_thinking'"):
        engine.prefill("q", enable_thinkin=False)
    with pytest.raises(PromptError, match="did you mean 'enable_thinking'"):
        engine.prompt_from_messages([{"role": "user", "content": "q"}], enable_thinkin=False)
    prompt = engine.prompts.build(query="q", chunks=[])
    with pytest.raises(ConfigError, match="prompt= is laid out already"):
        engine.generate(prompt=prompt, enable_thinking=False)


def test_a_variable_that_the_template_doesnt_have_is_said_to_be_none() -> None:
    message = r"the chat template has no such variable, only .*chat_template"
    with (
        CacheTune(llama(), thinking_tokenizer(GEMMA2), None, lead_in="first_token") as engine,
        pytest.raises(ConfigError, match=message),
    ):
        engine.generate("q", enable_thinking=False)


def test_contents_as_openais_clients_send_them(engine: CacheTune) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "high?"}]
    messages = [{"role": "user", "content": parts}]
    plain = engine.prompt_from_messages([{"role": "user", "content": "How high?"}])
    assert engine.prompt_from_messages(messages) == plain
    assert engine.prompt_from_messages(messages, recognise=False) == plain
    assert engine.prompts.build_messages(messages) == plain
    for part, named in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"text": "no type"}, "None"),
        ({"type": "text"}, "None"),
        ({"type": "text", "text": 3}, "3"),
    ):
        with pytest.raises(PromptError, match=rf"content\[1\].* {named}"):
            engine.prompt_from_messages([{"role": "user", "content": ["How?", part]}])


def test_a_prompt_template_takes_no_arguments() -> None:
    template = "{prefix}{chunks}{query}"
    with CacheTune(llama(), thinking_tokenizer(), None, prompt_template=template, lead_in="first_token") as engine:
        with pytest.raises(ConfigError, match="no generation setting"):
            engine.generate("q", enable_thinking=False)
        with pytest.raises(PromptError, match="laid out by prompt_template"):
            engine.prefill("q", enable_thinking=False)
        conversation = engine.prompt_from_messages([{"role": "user", "content": "q"}], enable_thinking=False)
        assert shown(engine, conversation).endswith(NOT_THINKING)


def test_recognised_chunks_are_counted_as_the_prompt_has_them(engine: CacheTune) -> None:
    engine.precompute([PASSAGE])
    thought = f"<think>\n{PASSAGE}\n</think>\n\nYes."
    messages = [
        {"role": "user", "content": PASSAGE + " How high?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "Sure?"},
    ]
    prompt = engine.prompt_from_messages(messages)
    assert prompt.recognised == len(prompt.spans) == 1
    assert shown(engine, prompt) == engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
