"""A tokenizer's chat template: the prompt that it makes of a conversation, as in transformers, and where the chunks are in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from cachetune_rag.checking.arguments import hint
from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.chat_messages import Message, layouts
from cachetune_rag.text.prompts.chat_run import ChatRun
from cachetune_rag.text.prompts.segments import PromptPiece
from cachetune_rag.text.tokenizer import ContentTokenizer, check_text
from cachetune_store.printing import shown

ALWAYS = frozenset({"chat_template", "add_generation_prompt", "continue_final_message"})
"""Arguments that can be given for every template, as to transformers' `apply_chat_template`."""

_SUPPLIED = {
    "messages", "raise_exception", "strftime_now", "dict", "lipsum", "cycler", "joiner", "namespace", "range",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
}  # fmt: skip
"""Variables that the conversation, transformers or the tokenizer supply."""

_log = logging.getLogger(__name__)


class ChatTemplate:
    """Lays out conversations. Safe to use from many threads.

    The result is what transformers' `apply_chat_template` makes, with two exceptions. First, text in a message, in tools or in arguments
    that is spelt like a control token never becomes one: the template sees it with a mark inside. (Only in the assistant's messages may
    a template look for such text, for example to remove `<think>...</think>`.) Second, the white space at the ends of a chunk is kept
    even if the template trims contents, because the chunk's KV includes it.

    If a template refuses a conversation, or leaves out a message, other layouts are tried (see `layouts`).

    Args:
        content: the tokenizer, and what is spelt like its control tokens.
        defaults: arguments of the template for every conversation, e.g. enable_thinking. A caller's arguments replace them.

    Raises:
        PromptError: the template doesn't use one of the defaults.
    """

    def __init__(self, content: ContentTokenizer, defaults: Mapping[str, Any]):
        self._content, self._tokenizer = content, content.tokenizer
        self._told: set[str] = set()
        self._defaults: dict[str, Any] = {}
        self._defaults = self._arguments(defaults, None)

    @property
    def names(self) -> frozenset[str]:
        """Names of the arguments that a caller may give the template."""
        return variables(self._source(self._defaults, None)) | ALWAYS

    def pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[PromptPiece]:
        """The pieces from which a conversation's prompt is tokenised.

        Raises:
            PromptError: the template refuses the conversation, leaves out a message, or alters a chunk; or it doesn't use an
                argument.
        """
        given = self._arguments(arguments or {}, tools)
        try:
            return self._accepted(messages, tools, given)
        except RecursionError:
            raise PromptError("a message, a tool or an argument is nested too deeply for a chat template.") from None

    # -- what a caller gives --------------------------------------------------------------------------------------

    def _source(self, arguments: Mapping[str, Any], tools: Sequence[Any] | None) -> str:
        try:
            return str(self._tokenizer.get_chat_template(arguments.get("chat_template"), tools))
        except ValueError as error:
            raise PromptError(f"no chat template can be chosen: {error}") from error

    def _arguments(self, arguments: Mapping[str, Any], tools: Sequence[Any] | None) -> dict[str, Any]:
        """All arguments of the template: the defaults and a caller's, checked."""
        given = {**self._defaults, **arguments}
        template = given.get("chat_template")
        if template is not None:
            check_text(template, "chat_template")
        used = variables(self._source(given, tools))
        known = sorted(used | ALWAYS)
        for name in arguments:
            if name not in known:
                advice = hint(name, known, f"it uses {', '.join(known)}.")
                raise PromptError(f"the chat template has no variable {shown(name)}: {advice}")
        if tools is not None:
            if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
                raise PromptError(f"tools is {shown(tools)}: use a list of JSON schemas (dicts) or functions.")
            if tools and "tools" not in used:
                raise PromptError(
                    "the chat template has no place for tools: leave them out, say in a message what they are, or set a "
                    "tokenizer.chat_template that uses the variable tools."
                )
        return given

    # -- layouts --------------------------------------------------------------------------------------------------

    def _accepted(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, arguments: Mapping[str, Any]
    ) -> list[PromptPiece]:
        """The prompt in the first layout that the template accepts. If it accepts none, the first error is raised.

        Each layout is tried with contents as strings, and as lists of typed parts, which templates of multimodal models may need.
        """
        first: PromptError | None = None
        for what, layout in layouts(messages):
            for typed in (False, True):
                run = ChatRun(self._tokenizer, self._content, tools, arguments, typed)
                try:
                    pieces = run.pieces(layout)
                except PromptError as error:
                    first = first or error
                    continue
                if what and what not in self._told:
                    self._told.add(what)
                    _log.info("the chat template refuses or drops some messages as they are: %s.", what)
                return pieces
        assert first is not None
        raise first


class _Generation(Extension):
    """transformers' block tag around what the assistant wrote. Here it only has to be parsed."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def variables(template: str) -> frozenset[str]:
    """Names of the variables that a chat template uses and a caller may give; empty if the template can't be parsed."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])  # parses only, and renders nothing
    try:
        found = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:
        return frozenset()
    return frozenset(found) - _SUPPLIED
