"""A tokenizer's chat template: what it makes of a conversation, as transformers would, and where the chunks stand in that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cachetune_rag.checking.nearest import hint
from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.chat_messages import Message, layouts
from cachetune_rag.text.prompts.chat_run import ChatRun
from cachetune_rag.text.prompts.segments import Part
from cachetune_rag.text.prompts.template_arguments import ALWAYS, variables
from cachetune_rag.text.tokenizer import ContentTokenizer, check_text
from cachetune_store.printing import shown

_log = logging.getLogger(__name__)


class ChatTemplate:
    """Lays out conversations. Safe to use from many threads.

    What transformers' `apply_chat_template` renders is what comes out, with two exceptions. What is spelt like a control token
    in a message, in tools or in arguments never becomes one: the template sees it with a mark inside, so that it can't be misled
    by it. (In the assistant's own messages a template may look for such spellings, to cut `<think>...</think>` out, say. That is
    followed.) And the white space at the ends of a chunk is kept where a template trims a content, for its KV belongs to it.

    Where a template refuses a conversation, or leaves out what someone said in it, `layouts` says what is tried.

    Args:
        content: the tokenizer, and what is spelt like its control tokens.
        defaults: arguments of the template for every conversation, e.g. enable_thinking; a caller's own go first.

    Raises:
        PromptError: the defaults name what the template doesn't use.
    """

    def __init__(self, content: ContentTokenizer, defaults: Mapping[str, Any]):
        self._content, self._tokenizer = content, content.tokenizer
        self._told: set[str] = set()
        self._defaults: dict[str, Any] = {}
        self._defaults = self._arguments(defaults, None)

    @property
    def names(self) -> frozenset[str]:
        """What a caller may give the template by name."""
        return variables(self._source(self._defaults, None)) | ALWAYS

    def parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[Part]:
        """What the prompt of a conversation is tokenised from.

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
        """All that the template is given by name."""
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
    ) -> list[Part]:
        """The first layout that the template takes, with contents as strings or, as templates of multimodal models may want it,
        as lists of typed parts. If it takes none, the first error stands."""
        first: PromptError | None = None
        for what, layout in layouts(messages):
            for typed in (False, True):
                run = ChatRun(self._tokenizer, self._content, tools, arguments, typed)
                try:
                    parts = run.parts(layout)
                except PromptError as error:
                    first = first or error
                    continue
                if what and what not in self._told:
                    self._told.add(what)
                    _log.info("the chat template refuses or drops some messages as they are: %s.", what)
                return parts
        assert first is not None
        raise first
