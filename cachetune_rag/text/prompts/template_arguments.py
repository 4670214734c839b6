"""Which variables a chat template uses: what a caller may give it by name."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

ALWAYS = frozenset({"chat_template", "add_generation_prompt", "continue_final_message"})
"""What can be given whatever the template is, as in transformers' `apply_chat_template`."""

_SUPPLIED = {
    "messages", "raise_exception", "strftime_now", "dict", "lipsum", "cycler", "joiner", "namespace", "range",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
}  # fmt: skip
"""Variables that the conversation, transformers or the tokenizer supply."""


class _Generation(Extension):
    """transformers' block tag, which says what the assistant wrote. Here it is only to be parsed."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def variables(template: str) -> frozenset[str]:
    """Names of the variables that a chat template reads and a caller may give; none of a template that can't be parsed."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])  # parses only, and renders nothing
    try:
        found = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:
        return frozenset()
    return frozenset(found) - _SUPPLIED
