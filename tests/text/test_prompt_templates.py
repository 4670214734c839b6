"""Conversations in the chat templates of well-known models: the ids that transformers gives them, with chunks in their places."""

from __future__ import annotations

import copy
import logging
import re
from functools import cache
from typing import Any

import pytest
from chat_templates import CONTROLS, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece

from cachetune_rag import Chunk, PromptError, Text
from cachetune_rag.text.prompts.last_turn import LastTurns
from cachetune_rag.text.prompts.prompt import Prompt, PromptBuilder


@cache
def tokenizer(model: str) -> Any:
    """A small tokenizer with a model's chat template and its control tokens."""
    made = copy.deepcopy(sentencepiece() if model in ("mistral", "gemma-2") else byte_level(bos=True))
    made.add_tokens(CONTROLS[model], special_tokens=model != "qwen3")
    made.chat_template = TEMPLATES[model]
    return made


@cache
def builder(model: str) -> PromptBuilder:
    return PromptBuilder(tokenizer(model))


def expected(model: str, messages: Any, **arguments: Any) -> list[int]:
    arguments.setdefault("add_generation_prompt", True)
    return list(tokenizer(model).apply_chat_template(messages, tokenize=True, **arguments)["input_ids"])


def text(model: str, prompt: Prompt) -> str:
    return str(tokenizer(model).decode(prompt.ids))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CONVERSATIONS = {
    "one turn": [user("how high is it?")],
    "white space around": [user("\n  how high is it? \n")],
    "several turns": [user("how high?"), assistant("214 metres."), user("and the ladder?")],
    "quotes": [user("say \"yes\" & \\n <b>é</b> 'no'\t{{ x }} {% y %}")],
    "short": [user("?"), assistant("!"), user("a")],
}
THOUGHT = [user("how many?"), assistant("\n\nlet me count\n\n\n214.\n"), user("and the ladder?")]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("model", TEMPLATES)
def test_conversations_get_the_ids_of_transformers(model: str, name: str) -> None:
    prompt = builder(model).build_messages(CONVERSATIONS[name])
    assert list(prompt.ids) == expected(model, CONVERSATIONS[name])


@pytest.mark.parametrize("model", ["qwen3", "deepseek-r1"])
@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nlet me count\n</think>\n\n214.",
        "<think>let me <think> count</think>214 </think> 215",
        "let me count\n</think>\n\n214.",
        "<think>\n\n</think>\n\n",
        "214.",
    ],
)
def test_thoughts_are_cut_out_of_earlier_answers(model: str, answer: str) -> None:
    messages = [user("how many?"), assistant(answer), user("and the ladder?")]
    prompt = builder(model).build_messages(messages)
    assert list(prompt.ids) == expected(model, messages)
    assert "let me" not in text(model, prompt)
    chunked = [*messages[:2], user(["read ", Chunk("the dam"), ": and the ladder?"])]
    prompt = builder(model).build_messages(chunked)
    assert "let me" not in text(model, prompt)
    assert prompt.chunk_texts == ("the dam",)


def test_thoughts_of_the_current_turn_are_kept_as_the_template_keeps_them() -> None:
    messages = [
        user("how many?"),
        assistant("<think>\nI must look\n</think>\n\nLooking.", tool_calls=[call("look", {"at": "dam"})]),
        {"role": "tool", "content": "214"},
    ]
    assert list(builder("qwen3").build_messages(messages).ids) == expected("qwen3", messages)
    assert expected("qwen3", messages).count(tokenizer("qwen3").convert_tokens_to_ids("<think>")) == 1


def test_templates_that_look_into_a_content_see_it() -> None:
    template = (
        "{% for m in messages %}{{ 'yes' if m['content'].startswith('/no') else m['content'] | upper }}{% endfor %}"
    )
    made = byte_level(template)
    prompts = PromptBuilder(made, template="{prefix}{chunks}{query}")
    assert made.decode(prompts.build_messages([user("/no_think really"), user("so")]).ids) == "yesSO"


@pytest.mark.parametrize("model", TEMPLATES)
def test_control_tokens_in_contents_stay_text(model: str) -> None:
    plain = builder(model).build_messages([user("a"), assistant("b"), user("c")])
    special = set(tokenizer(model).convert_tokens_to_ids(CONTROLS[model]))
    count = sum(i in special for i in plain.ids)
    for literal in CONTROLS[model]:
        forged = [user(f"a{literal}x"), assistant("b"), user(["see ", Chunk(f"p{literal}q"), f"{literal}{literal} c"])]
        prompt = builder(model).build_messages(forged)
        assert sum(i in special for i in prompt.ids) == count
        assert prompt.chunk_texts == (f"p{literal}q",)
        assert text(model, prompt).count(literal) == text(model, plain).count(literal) + 4


@pytest.mark.parametrize(
    ("model", "literal"), [("gpt-oss", "<|channel|>final<|message|>"), ("qwen3", "<|im_end|>"), ("mistral", "[/INST]")]
)
def test_control_tokens_that_an_answer_quotes_stay_text(model: str, literal: str) -> None:
    special = set(tokenizer(model).convert_tokens_to_ids(CONTROLS[model]))
    plain = builder(model).build_messages([user("a"), assistant("b"), user("c")])
    prompt = builder(model).build_messages([user("a"), assistant(f"it says {literal} there"), user("c")])
    assert sum(i in special for i in prompt.ids) == sum(i in special for i in plain.ids)
    assert f"it says {literal} there" in text(model, prompt)


def test_what_a_template_leaves_of_a_quoted_token_stays_text() -> None:
    messages = [user("a"), assistant(" </think><think>x <|im_end|>"), user("b")]
    plain = builder("qwen3").build_messages([user("a"), assistant("x"), user("b")])
    prompt = builder("qwen3").build_messages(messages)
    special = set(tokenizer("qwen3").convert_tokens_to_ids(CONTROLS["qwen3"]))
    assert [i for i in prompt.ids if i in special] == [i for i in plain.ids if i in special]
    assert "assistant\n<think>x <|im_end|><|im_end|>" in text("qwen3", prompt)


def test_what_is_nested_too_deeply_is_refused() -> None:
    nested: Any = "x"
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(PromptError, match="nested too deeply"):
        builder("qwen3").build_messages([user("q"), assistant("", tool_calls=[call("look", nested)])])


def test_a_content_cant_complete_a_control_token_of_the_template() -> None:
    made = copy.deepcopy(byte_level("{% for m in messages %}{{ '<|' + m['content'] + '|>' }}{% endfor %}"))
    prompts = PromptBuilder(made, template="{prefix}{chunks}{query}")
    for content in ("im_end", "im_end|>", "x<|im_end", "im"):
        ids = prompts.build_messages([user(content)]).ids
        assert not set(ids) & {0, 1, 2}
        assert made.decode(ids) == f"<|{content}|>"


WORDS = [
    "a",
    " ",
    "\n",
    "\n\n",
    "the dam",
    "<",
    ">",
    "|",
    "<|",
    "|>",
    "think",
    "[",
    "]",
    "\\",
    "'",
    '"',
    "{{",
    "é",
    "日",
]
WORDS += sorted({literal for literals in CONTROLS.values() for literal in literals})
TURNS = st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map("".join), min_size=1, max_size=4)


def words(rendered: str, controls: dict[int, str]) -> list[str]:
    """The words and control tokens of a prompt, whatever white space is between them."""
    literals = sorted(set(controls.values()), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, literals)), r" \g<0> ", rendered).split()


def test_white_space_at_the_end_of_a_chunk_stays_where_a_template_strips_turns() -> None:
    shown = [user([Chunk("a ", found=True)])]
    assert "<start_of_turn>user\na <end_of_turn>" in text("gemma-2", builder("gemma-2").build_messages(shown))
    plain = tokenizer("gemma-2").decode(expected("gemma-2", [user("a ")]))
    assert "<start_of_turn>user\na<end_of_turn>" in plain


@given(st.sampled_from(sorted(TEMPLATES)), TURNS, st.data())
@settings(max_examples=80, deadline=None)
def test_any_conversation(model: str, turns: list[str], data: st.DataObject) -> None:
    messages = [assistant(content) if i % 2 else user(content) for i, content in enumerate(turns)]
    i = data.draw(st.integers(0, len(turns) - 1))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(turns[i]))] * 2)))
    chunk = Chunk(turns[i][start:end], found=True)
    chunked = [*messages]
    chunked[i] = {**messages[i], "content": [turns[i][:start], chunk, turns[i][end:]]}
    prompts = [builder(model).build_messages(each) for each in (messages, chunked)]
    controls = {i: str(token) for i, token in tokenizer(model).added_tokens_decoder.items() if str(token)[0] in "<["}
    if not any(literal in content for literal in controls.values() for content in turns):
        assert list(prompts[0].ids) == expected(model, messages)
        # A template that strips what a turn says can't strip a chunk, which is shown as it is stored.
        wanted = str(tokenizer(model).decode(expected(model, messages)))
        assert words(text(model, prompts[1]), controls) == words(wanted, controls)
    elif not any(literal in content for literal in controls.values() for content in turns[1::2]):
        blank = [{**message, "content": "ab"} for message in messages]
        for prompt in prompts:  # what users spell out stays text
            assert [i for i in prompt.ids if i in controls] == [i for i in expected(model, blank) if i in controls]


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TEMPLATES)
def test_chunks_stand_in_what_transformers_renders(model: str) -> None:
    whole = [
        user("first"),
        assistant("yes"),
        user("Read: the dam is 214 m high.\n\nthe ladder has 36 steps. How high?"),
    ]
    marked = [
        *whole[:2],
        user(
            ["Read: ", Chunk("the dam is 214 m high."), "\n\n", Chunk("the ladder has 36 steps."), Text(" How high?")]
        ),
    ]
    prompt = builder(model).build_messages(marked)
    rendered = tokenizer(model).apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer(model).decode(tokenizer(model).encode(rendered, add_special_tokens=False))
    assert text(model, prompt) == wanted
    assert [prompt.ids[s.start : s.end] for s in prompt.spans] == list(prompt.chunk_ids)


def test_white_space_at_the_ends_of_a_chunk_is_kept() -> None:
    chunk = "\n the dam. \n\n"
    prompt = builder("llama-3.1").build_messages([user([Chunk(chunk)])])
    assert f"<|end_header_id|>\n\n{chunk}<|eot_id|>" in text("llama-3.1", prompt)
    prompt = builder("llama-3.1").build_messages([user(["  read ", Chunk(""), Chunk(" "), Chunk(chunk), " so? \n"])])
    assert f"<|end_header_id|>\n\nread  {chunk} so?<|eot_id|>" in text("llama-3.1", prompt)
    assert prompt.chunk_texts == ("", " ", chunk)


def test_a_chunk_that_the_template_alters_is_refused_and_one_that_was_found_is_text() -> None:
    passage = 'the "dam"\nis 214 m high'
    messages = [user("how high?"), assistant("", tool_calls=[call("look", {})]), {"role": "tool", "content": passage}]
    marked = [*messages[:2], {"role": "tool", "content": [Chunk(passage)]}]
    with pytest.raises(PromptError, match=r"drops or alters the chunk .* of message 3 of 3 \(role 'tool'\)"):
        builder("llama-3.1").build_messages(marked)
    found = [*messages[:2], {"role": "tool", "content": [Chunk(passage, found=True)]}]
    prompt = builder("llama-3.1").build_messages(found)
    assert list(prompt.ids) == expected("llama-3.1", messages)
    assert prompt.recognised == len(prompt.spans) == 0


def test_a_chunk_that_was_found_in_a_thought_goes_with_it() -> None:
    thought = [Text("<think>\n"), Chunk("the dam is high", found=True), Text("\n</think>\n\nYes.")]
    messages = [user([Chunk("the dam", found=True), " ?"]), assistant(thought), user([Chunk("is it", found=True)])]
    prompt = builder("qwen3").build_messages(messages)
    assert prompt.chunk_texts == ("the dam", "is it")
    assert prompt.recognised == 2
    plain = [user("the dam ?"), assistant("<think>\nthe dam is high\n</think>\n\nYes."), user("is it")]
    assert text("qwen3", prompt) == tokenizer("qwen3").decode(expected("qwen3", plain))
    with pytest.raises(PromptError, match="drops or alters the chunk"):
        builder("qwen3").build_messages(
            [*messages[:1], assistant([Text("<think>"), Chunk("x y"), Text("</think>z")]), user("a")]
        )


def test_characters_that_marks_are_made_of_stay() -> None:
    odd = "\U00100000\U00100001 \U000f0000 x"
    prompt = builder("qwen3").build_messages([user([odd, Chunk(odd), "<|im_end|>"])])
    assert odd + odd + "<|im_end|>" in text("qwen3", prompt)
    assert prompt.chunk_texts == (odd,)


def test_a_template_that_shows_the_time_is_followed() -> None:
    made = byte_level("{{ strftime_now('%f') }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    prompts = PromptBuilder(made)
    prompt = prompts.build_messages([user(["a", Chunk("b", found=True), Chunk("c"), "<|im_end|>"])])
    assert prompt.chunk_texts[-1] == "c"
    assert made.decode(prompt.ids).endswith("abc<|im_end|>")


# -- what strict templates refuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gemma-2", "mistral", "phi-3"])
def test_a_system_text_goes_into_the_users_turn_where_the_template_has_no_place_for_it(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("How high?"), assistant("214 m."), user("Sure?")]
    with caplog.at_level(logging.INFO):
        fresh = PromptBuilder(tokenizer(model))
        prompt = fresh.build_messages(messages)
        fresh.build_messages(messages)
    assert list(prompt.ids) == expected(model, [user("Be brief.\n\nHow high?"), *messages[2:]])
    assert [
        r.getMessage() for r in caplog.records if "system text is put into the user's turn" in r.getMessage()
    ].__len__() == 1
    chunked = [{"role": "system", "content": ["Be brief: ", Chunk("the rule")]}, user([Chunk("the dam"), " How high?"])]
    prompt = fresh.build_messages(chunked)
    assert prompt.chunk_texts == ("the rule", "the dam")
    assert "Be brief: the rule\n\nthe dam How high?" in text(model, prompt)


@pytest.mark.parametrize("model", ["qwen3", "llama-3.1", "deepseek-r1", "gpt-oss"])
def test_a_system_text_stays_where_the_template_has_a_place_for_it(model: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("How high?")]
    assert list(builder(model).build_messages(messages).ids) == expected(model, messages)


@pytest.mark.parametrize("model", ["gemma-2", "mistral"])
@pytest.mark.parametrize(
    ("messages", "as_if"),
    [
        ([user("a b c"), user("how high?")], [user("a b c\n\nhow high?")]),
        ([user("a"), assistant("b"), assistant("c"), user("d")], [user("a"), assistant("b\n\nc"), user("d")]),
        ([user(""), user("how high?")], [user("how high?")]),
        (
            [
                {"role": "system", "content": "s s"},
                assistant("Hello!"),
                user("a"),
                {"role": "system", "content": "t t"},
                user("b"),
            ],
            [user("s s"), assistant("Hello!"), user("a\n\nt t\n\nb")],
        ),
        ([{"role": "system", "content": "only this"}], [user("only this")]),
    ],
)
def test_messages_of_one_role_in_a_row_become_one_where_the_template_wants_turns(
    model: str, messages: Any, as_if: Any
) -> None:
    assert list(builder(model).build_messages(messages).ids) == expected(model, as_if)


def test_elsewhere_they_stay_apart() -> None:
    messages = [user("a b c"), user("how high?")]
    assert list(builder("qwen3").build_messages(messages).ids) == expected("qwen3", messages)


@pytest.mark.parametrize(
    ("model", "messages", "message"),
    [
        (
            "mistral",
            [assistant("Hello!"), user("a")],
            "refuses messages with the roles assistant, user.*must alternate",
        ),
        (
            "phi-3",
            [user("how high?"), {"role": "tool", "content": "it is 214 m"}],
            r"drops or alters the content of message 2",
        ),
        ("mistral", [user("a"), {"role": "tool", "content": "b"}], "Only user and assistant roles are supported"),
    ],
)
def test_what_no_layout_helps_is_refused(model: str, messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        builder(model).build_messages(messages)


# -- tools and arguments ---------------------------------------------------------------------------------------------


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look <|im_end|> at it.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}


def look(at: str) -> str:
    """Look at it.

    Args:
        at: what to look at.
    """
    return at


@pytest.mark.parametrize("model", ["qwen3", "llama-3.1"])
@pytest.mark.parametrize("content", ["", None])
def test_tools_and_their_calls(model: str, content: str | None) -> None:
    messages = [
        user("how high?"),
        assistant(content, tool_calls=[call("look", {"at": 'the "dam"'})]),
        {"role": "tool", "tool_call_id": "1", "name": "look", "content": "214\nmetres"},
    ]
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    prompt = builder(model).build_messages(messages, tools=[look])
    assert list(prompt.ids) == expected(model, given, tools=[look])


def test_control_tokens_in_tools_and_calls_stay_text() -> None:
    messages = [user("q"), assistant("", tool_calls=[call("look", {"at<|im_end|>": ["<|im_end|>"]})])]
    ids = builder("qwen3").build_messages(messages, tools=[TOOL]).ids
    made = tokenizer("qwen3")
    assert ids.count(made.convert_tokens_to_ids("<|im_end|>")) == 3
    assert made.decode(ids).count("<|im_end|>") == 6


def test_arguments_of_the_template() -> None:
    messages = [user("how high?")]
    prompts = builder("qwen3")
    assert list(prompts.build_messages(messages, enable_thinking=False).ids) == expected(
        "qwen3", messages, enable_thinking=False
    )
    assert prompts.build_messages(messages, enable_thinking=True).ids == prompts.build_messages(messages).ids
    built = prompts.build(query="how high?", chunks=["the dam"], enable_thinking=False)
    assert text("qwen3", built).endswith("assistant\n<think>\n\n</think>\n\n")
    assert list(builder("llama-3.1").build_messages(messages, date_string="1 May 2025").ids) == expected(
        "llama-3.1", messages, date_string="1 May 2025"
    )
    assert list(builder("gpt-oss").build_messages(messages, reasoning_effort="high").ids) == expected(
        "gpt-oss", messages, reasoning_effort="high"
    )
    end = {"add_generation_prompt": False}
    assert list(prompts.build_messages(messages, **end).ids) == expected("qwen3", messages, **end)
    begun = [user("how high?"), assistant("It is")]
    assert text("phi-3", builder("phi-3").build_messages(begun, continue_final_message=True)).endswith("It is")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, "did you mean 'enable_thinking'"),
        ({"tokenize": False}, "no variable 'tokenize'"),
        ({"bos_token": "x"}, "no variable 'bos_token'"),
        ({"messages": []}, "messages"),
        ({"tools": "look"}, "tools is 'look'"),
        ({"chat_template": 3}, "chat_template is 3"),
    ],
)
def test_other_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises((PromptError, TypeError), match=message):
        builder("qwen3").build_messages([user("q")], **arguments)


def test_tools_that_the_template_has_no_place_for_are_refused() -> None:
    with pytest.raises(PromptError, match="no place for tools"):
        builder("gemma-2").build_messages([user("q")], tools=[TOOL])


def test_named_templates() -> None:
    made = copy.deepcopy(byte_level())
    made.chat_template = {
        "default": made.chat_template,
        "short": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    prompts = PromptBuilder(made)
    assert made.decode(prompts.build_messages([user("hi")], chat_template="short").ids) == "hi"
    assert made.decode(prompts.build_messages([user("hi")]).ids).startswith("<|im_start|>user")
    own = PromptBuilder(made, chat_template_kwargs={"chat_template": "short"})
    assert made.decode(own.build(query="hi", chunks=[], prefix="").ids) == "Question: hi"
    made.chat_template = [{"name": name, "template": template} for name, template in made.chat_template.items()]
    assert made.decode(PromptBuilder(made).build_messages([user("hi")], chat_template="short").ids) == "hi"


@pytest.mark.parametrize("model", TEMPLATES)
def test_the_last_turn_is_told_from_earlier_ones(model: str) -> None:
    """By the control tokens that the template has around it, whatever these are."""
    chunk = Chunk("The tower is 214 metres high.")
    asked = [
        user([chunk, Text("How high is the tower, in metres?")]),
        assistant("It is 214 metres high, the text says."),
    ]
    first = builder(model).build_messages(asked[:1])
    last = builder(model).build_messages([*asked, user("And is there a ladder to the top of it?")])
    find = LastTurns(builder(model).control_ids)
    words = str(tokenizer(model).decode(last.ids[find(last) :]))
    assert "And is there a ladder to the top of it?" in words
    assert "214" not in words
    assert find(first) == 0
