"""A line of code, or of anything else that is no prose, that begins in one chunk of a prompt and goes on in the next is found in its token ids."""

from __future__ import annotations

import pytest
from test_continuations import found, prompt_of
from tiny import tokenizer

from cachetune_rag.text.prompts.continuations import MOST_TOKENS, Continuations

LOOP = "for name in names:\n    total += sizes[name]\n"
BLOCK = "static int size(void) {\n  int a = 3;\n  int b = 4;\n  use(a);\n  use(b);\n"
NEXT = "\nprint(total)\nprint(names)"


@pytest.mark.parametrize(
    ("first", "second", "begun", "rest"),
    [
        # operators and what else wants something on its other side
        (LOOP + "mill_code =", "48213" + NEXT, "mill_code =", "48213"),
        (LOOP + "mill_code", "= 48213" + NEXT, "mill_code", "= 48213"),
        (LOOP + "mill, code", ", gate = 48213" + NEXT, "mill, code", ", gate = 48213"),
        (LOOP + '{"mill code":', '48213, "gate": 3}' + NEXT, '{"mill code":', '48213, "gate": 3}'),
        ("if [ -f mill ] &&", "[ -f gate ]; then\n  ls\nfi", "if [ -f mill ] &&", "[ -f gate ]; then"),
        ("make mill \\", "--code 48213\nls", "make mill \\", "--code 48213"),
        # brackets and quotes that are open
        (LOOP + "set_code(mill, 482", "13, True)" + NEXT, "set_code(mill, 482", "13, True)"),
        (LOOP + "codes = {mill: 482", "13, gate: 3}" + NEXT, "codes = {mill: 482", "13, gate: 3}"),
        (LOOP + "say('the code of the mill", "Is 48213 now')" + NEXT, "say('the code of the mill", "Is 48213 now')"),
        (LOOP + "set_code(\n    mill,", "48213,\n)" + NEXT, "set_code(\n    mill,", "48213,\n)"),
        # a line ends as no other line does
        (BLOCK + "  int mill_code", "_new = 48213;\n  use(mill);\n", "int mill_code", "_new = 48213;"),
        # words between code
        (LOOP + "The access code of the mill", "is 48213." + NEXT, "The access code of the mill", "is 48213."),
        (LOOP + "# The access code of the mill", "# is 48213." + NEXT, "# The access code of the mill", "# is 48213."),
        (BLOCK + "  // The code of the mill", "// is 48213.\n  use(a);", "// The code of the mill", "// is 48213."),
        ("Mill and gate\nThe code of the mill", "is 48. It is new. More", "The code of the mill", "is 48."),
        # a blank within a line
        (LOOP + "return mill", " or Gate" + NEXT, "return mill", " or Gate"),
        (LOOP + "return mill ", "or Gate" + NEXT, "return mill", "or Gate"),
    ],
)
def test_a_line_that_goes_on_is_found(first: str, second: str, begun: str, rest: str) -> None:
    ((before, after),) = found(prompt_of("Something else.", first, second, "Something else."))
    assert before == begun
    assert after.rstrip("\n") == rest


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LOOP + "return total", "def more(x):\n    return x"),
        (LOOP + "return total\n", "= 3 +\n"),
        (LOOP + "return total", "\nis 48213." + NEXT),
        (LOOP + "return total", "    # is 48213.\n    pass"),  # a comment of its own
        (BLOCK + "  use(mill);", " use(gate);\n}"),
        (BLOCK + "  use(mill);", "use(gate);\n}"),
        ("void use(int a) {", "  b();\n}\n"),  # a block has lines of its own
        (LOOP + "# It's the mill's", "# It isn't the gate" + NEXT),  # apostrophes
        ("Mill\n====", "Gates\n===="),
        ("- the mill", "- the gate"),
        ("Turn it on", "2. Turn it off. Wait"),
        ("mill: 1\ngate:", "door: 3\nroof: 4"),
        ("| bolt | 12 |\n| nut | 8 |", "|| 3 |\n| wire | 3 |"),
        ("mill =", ""),
        ("", "= 48213"),
        ("mill =", " "),
        ("\n", "\n"),
        ("f(" + "1, " * MOST_TOKENS + "a;", "2, " * MOST_TOKENS + ")"),  # too long to be followed
    ],
)
def test_nothing_is_found_between_whole_lines(first: str, second: str) -> None:
    assert found(prompt_of(first, second)) == []


def test_a_cut_at_any_blank_of_a_statement_is_found() -> None:
    """Chunks that are cut by their number of tokens begin with the blank before a word."""
    line = "config.set_access_code(mill, number = 48213, valid = True)"
    for place, letter in enumerate(line):
        if letter == " ":
            ((before, after),) = found(prompt_of(LOOP + line[:place], line[place:] + NEXT))
            assert (before + after).strip() == line


def test_a_line_in_three_chunks_goes_on_twice() -> None:
    parts = found(prompt_of(LOOP + "set_code(mill,", " number =", " 48213)" + NEXT))
    assert [rest.strip() for _, rest in parts] == ["number =", "48213)"]


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [
        ("f(", ")", 1),
        ("x=", "y", 1),
        ("=", "x", 0),
        ("(" * 3000, ")" * 3000, MOST_TOKENS),
        ("a=" * 3000, "b=" * 3000, MOST_TOKENS),
    ],
)
def test_of_chunks_of_a_token_and_of_endless_lines_no_more_is_found_than_there_is(
    first: str, second: str, length: int
) -> None:
    prompt = prompt_of(first, second)
    before, after = prompt.spans
    parts = Continuations(tokenizer())(prompt)
    assert [len(rest) for _, rest in parts] == [length] * bool(length)
    for begun, rest in parts:
        assert before.start <= begun.start < before.end <= begun.stop == rest.start == after.start
