"""Tool calls in an answer's text: each family's form, and what only looks like one."""

from __future__ import annotations

import pytest

from cachetune_rag.text.tool_calls import ToolCall, ToolCallStream, parse

ADD = ToolCall("add", {"a": 1, "b": [2, {"c": "x"}]})
ARGUMENTS = '{"a": 1, "b": [2, {"c": "x"}]}'
HERMES = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
LLAMA = f'{{"name": "add", "parameters": {ARGUMENTS}}}'
MISTRAL = f'[{{"name": "add", "arguments": {ARGUMENTS}}}]'

FORMS = {
    "Hermes": (HERMES, "", [ADD]),
    "Hermes, two, with text": (f"I'll add.\n{HERMES}\n{HERMES}\nDone.", "I'll add.\nDone.", [ADD, ADD]),
    "Hermes, cut off at the closing tag": (HERMES.removesuffix("\n</tool_call>"), "", [ADD]),
    "Hermes, arguments with the closing tag in them": (
        '<tool_call>{"name": "say", "arguments": {"text": "</tool_call>"}}</tool_call>',
        "",
        [ToolCall("say", {"text": "</tool_call>"})],
    ),
    "Hermes, behind a thought that names a call": (
        f'<think>\nMaybe <tool_call>{{"name": "no", "arguments": {{}}}}</tool_call>\n</think>\n\n{HERMES}',
        '<think>\nMaybe <tool_call>{"name": "no", "arguments": {}}</tool_call>\n</think>',
        [ADD],
    ),
    "Llama": (LLAMA, "", [ADD]),
    "Llama with its tag": (f"<|python_tag|>{LLAMA}", "", [ADD]),
    "Llama, two": (f"{LLAMA}; {LLAMA}", "", [ADD, ADD]),
    "Llama, typed": (f'{{"type": "function", "name": "add", "parameters": {ARGUMENTS}}}', "", [ADD]),
    "Llama, fenced": (f"```json\n{LLAMA}\n```", "", [ADD]),
    "Mistral": (f"[TOOL_CALLS] {MISTRAL}", "", [ADD]),
    "Mistral, its mark skipped": (MISTRAL, "", [ADD]),
    "Mistral with text": (f"Let me see.[TOOL_CALLS]{MISTRAL}", "Let me see.", [ADD]),
    "Mistral, named": (f"[TOOL_CALLS]add{ARGUMENTS}[TOOL_CALLS]add[ARGS]{ARGUMENTS}", "", [ADD, ADD]),
    "Mistral, named with an id": (f"[TOOL_CALLS]add[CALL_ID]a1B2c3d4e[ARGS]{ARGUMENTS}", "", [ADD]),
    "OpenAI's wrapping": (
        '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}',
        "",
        [ToolCall("add", {"a": 1})],
    ),
    "no arguments": ('<tool_call>{"name": "now", "arguments": {}}</tool_call>', "", [ToolCall("now", {})]),
    "a line break inside a string": (
        '<tool_call>{"name": "say", "arguments": {"text": "a\nb"}}</tool_call>',
        "",
        [ToolCall("say", {"text": "a\nb"})],
    ),
}

NO_CALLS = {
    "nothing": "",
    "plain text": "  It has 214 steps.\n",
    "JSON that is no call": '{"name": "Ann", "age": 3}',
    "a list that is no call": "[1, 2]",
    "a call inside a sentence": f"Write {LLAMA} to call it.",
    "broken JSON inside tags": '<tool_call>{"name": "add", "arguments": {"a": </tool_call>',
    "tags around something else": "<tool_call>add 1 and 2</tool_call>",
    "a tag alone": "The mark <tool_call> begins one.",
    "NaN": '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
    "arguments that are no object": '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    "a name that is none": '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    "deeply nested": "<tool_call>" + "[" * 100_000,
    "an unfinished thought": f"<think>I could {HERMES}",
    "Mistral's mark alone": "[TOOL_CALLS] nothing",
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form(name: str) -> None:
    text, content, calls = FORMS[name]
    assert parse(text) == (content, calls)
    assert parse(text, ["add", "say", "now"]) == (content, calls)


@pytest.mark.parametrize("name", NO_CALLS)
def test_what_is_no_call_stays_as_it_is(name: str) -> None:
    assert parse(NO_CALLS[name]) == (NO_CALLS[name], [])
    assert parse(NO_CALLS[name], ["add"]) == (NO_CALLS[name], [])


def test_names_tell_bare_json_from_an_answer_that_is_json() -> None:
    assert parse(LLAMA, ["subtract"]) == (LLAMA, [])
    assert parse(HERMES, ["subtract"]) == ("", [ADD]), (
        "a marked call is one: the caller says that there is no such tool"
    )
    assert parse(f"add{ARGUMENTS}", ["add"]) == ("", [ADD]), "Mistral's named form, its marks skipped"
    assert parse(f"add{ARGUMENTS}") == (f"add{ARGUMENTS}", [])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", [text for text, *_ in FORMS.values()] + [t for t in NO_CALLS.values() if len(t) < 500])
def test_a_stream_shows_the_content_and_no_call(text: str, size: int) -> None:
    names = ["add", "say", "now"]
    stream = ToolCallStream(names)
    shown = "".join(stream.push(text[i : i + size]) for i in range(0, len(text), size))
    last, calls = stream.finish()
    assert (shown + last, calls) == parse(text, names)


def test_a_stream_shows_text_as_it_comes() -> None:
    stream = ToolCallStream(["add"])
    assert [stream.push(piece) for piece in ("It", " has", " 214", " steps.")] == ["It", " has", " 214", " steps."]
    assert stream.push(" <tool") == ""
    assert stream.push("s> are") == " <tools> are"
    assert stream.push(f" here: {HERMES}") == " here:"
    assert stream.finish() == ("", [ADD])
