"""Runs a chat template over a conversation, and finds the chunks and the control tokens that messages spell out in its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.checking.escaping import words_of
from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.chat_messages import Message
from cachetune_rag.text.prompts.content_marks import Marks
from cachetune_rag.text.prompts.segments import Chunk, PromptPiece, Segment, TemplateText, Text
from cachetune_rag.text.tokenizer import ContentTokenizer
from cachetune_store.printing import shown

_CERTAIN = 12
"""If a content of at least so many characters occurs in the output, the template put it there. A shorter one may occur by chance."""
_MOST_SPELLINGS = 64
"""Up to so many control tokens that the assistant's messages spell out are tried one by one."""
_WAY_OUT = (
    "Change the messages' order or roles, set another tokenizer.chat_template, or pass a prompt template with {prefix}, "
    "{chunks} and {query}."
)

Spelling = Callable[[int, str], str]
"""Says how a control token's text in the message of this number is marked. See `Marks.around`."""


@dataclass
class ChatRun:
    """The template's output for one layout of a conversation.

    Attributes:
        tokenizer: has the chat template.
        content: finds text that is spelt like a control token.
        tools, arguments: what the template gets besides the messages.
        typed: whether contents are lists of typed parts instead of strings.
    """

    tokenizer: Any
    content: ContentTokenizer
    tools: Sequence[Any] | None
    arguments: Mapping[str, Any]
    typed: bool

    def pieces(self, messages: list[Message]) -> list[PromptPiece]:
        """What the prompt is tokenised from.

        Raises:
            PromptError: the template refuses the conversation, leaves out a message, or alters a chunk.
        """
        marks = Marks(self.content, self._texts(messages))
        plain, spelling = self._plain(messages, marks)
        self._check_dropped(messages, marks, marks.without(plain))
        patience = 3  # a template may show the time, which differs between two of its outputs
        # If the template alters a text that was only recognised as a chunk, the text is no longer treated as a chunk.
        while True:
            rendered = self._render(messages, marks, chunks=True, spelling=spelling)
            wrong = marks.altered(rendered, messages)
            if not wrong and _same_text(marks.without(rendered), marks.without(plain)):
                break
            found = {(i, j) for i, m in enumerate(messages) for j, s in enumerate(m.content or ()) if _found(s)}
            if given := [place for place in wrong if place not in found]:
                self._refuse_altered(messages, *given[0])
            again, _ = self._plain(messages, marks)
            if again != plain and patience:
                plain, patience = again, patience - 1
                continue
            loose = found & set(wrong) or self._looked_into(messages, marks, plain, found, spelling)
            if not loose:
                break  # the template looks into chunks that the caller gave, which is refused
            messages = [
                _without(message, {j for i, j in loose if i == number}) for number, message in enumerate(messages)
            ]
        return marks.pieces(self._spelt(messages, marks, rendered) if spelling is None else rendered, messages)

    # -- control tokens that are spelt out ------------------------------------------------------------------------

    def _plain(self, messages: Sequence[Message], marks: Marks) -> tuple[str, Spelling | None]:
        """The output without marks around chunks. The assistant's texts are not marked either, unless the template refuses them so."""
        try:
            return self._render(messages, marks), None
        except PromptError:
            return self._render(messages, marks, spelling=_inside), _inside

    def _spelt(self, messages: Sequence[Message], marks: Marks, rendered: str) -> str:
        """`rendered` with marks at control tokens that the assistant's messages spell out.

        If marks around such a text don't change the output, the template doesn't look for the text. It is then content, and is marked.
        If the template looks for it, as for `<think>`, the template decides whether it is shown.
        """
        spelt = Counter(
            (i, literal)
            for i, message in enumerate(messages)
            if message.role == "assistant"
            for _, literal in self.content.found(message.text)
        )
        if not spelt:
            return rendered
        expected = marks.without(rendered)

        def attempt(ways: Mapping[tuple[int, str], str]) -> str | None:
            try:
                made = self._render(
                    messages, marks, chunks=True, spelling=lambda i, literal: ways.get((i, literal), "")
                )
            except PromptError:
                return None
            return made if marks.without(made) == expected else None

        inside = dict.fromkeys(spelt, "inside")
        ways = dict.fromkeys(spelt, "around")
        if attempt(ways) is None and len(spelt) <= _MOST_SPELLINGS:
            ways = {place: "around" if attempt({place: "around"}) is not None else "" for place in spelt}
            inside = {
                place: "inside" if ways[place] and attempt({place: "inside"}) is not None else ways[place]
                for place in spelt
            }
        made = attempt(inside)
        made = attempt(ways) if made is None else made
        return self._render(messages, marks, chunks=True, spelling=_inside) if made is None else made

    # -- chunks ---------------------------------------------------------------------------------------------------

    def _looked_into(
        self,
        messages: Sequence[Message],
        marks: Marks,
        plain: str,
        found: set[tuple[int, int]],
        spelling: Spelling | None,
    ) -> set[tuple[int, int]]:
        """The recognised chunks whose marks change the template's output."""
        expected = marks.without(plain)
        loose = set()
        for i in {i for i, _ in found}:
            others = [m if n == i else _without(m, set(range(len(m.content or ())))) for n, m in enumerate(messages)]
            rendered = self._render(others, marks, chunks=True, spelling=spelling)
            if not _same_text(marks.without(rendered), expected):
                loose |= {(k, j) for k, j in found if k == i}
        return loose

    def _refuse_altered(self, messages: Sequence[Message], i: int, j: int) -> None:
        chunk = (messages[i].content or ())[j]
        raise PromptError(
            f"the tokenizer's chat template drops or alters the chunk {shown(chunk.text)} of message {i + 1} of "
            f"{len(messages)} (role {shown(messages[i].role)}), or repeats it; a chunk must come out once and unchanged: give the "
            f"message another role, or its text as Text. {_WAY_OUT}"
        )

    # -- contents that are left out -------------------------------------------------------------------------------

    def _check_dropped(self, messages: Sequence[Message], marks: Marks, plain: str) -> None:
        """Refuse a template that drops a message. For that, a number is put in place of its content, and must be in the output."""
        doubtful = {}
        for i, message in enumerate(messages):
            text = message.text.strip()
            if text and not message.fields.get("tool_calls") and (len(text) < _CERTAIN or text not in plain):
                doubtful[i] = f"{739146028517 + i}9"
        if not doubtful:
            return
        probe = [
            replace(message, content=(Text(doubtful[i]),)) if i in doubtful else message
            for i, message in enumerate(messages)
        ]
        try:
            rendered = self._render(probe, marks)
        except PromptError:
            return  # the template checks contents, so it doesn't drop them
        for i, number in doubtful.items():
            if number not in rendered:
                raise PromptError(
                    f"the tokenizer's chat template drops or alters the content of message {i + 1} of {len(messages)} "
                    f"(role {shown(messages[i].role)}): leave this message out, or give it another role. {_WAY_OUT}"
                )

    # -- rendering ------------------------------------------------------------------------------------------------

    def _render(
        self, messages: Sequence[Message], marks: Marks, *, chunks: bool = False, spelling: Spelling | None = None
    ) -> str:
        """The template's output for the conversation, with marks."""
        conversation = []
        for i, message in enumerate(messages):
            made = {"role": message.role, **marks.cut_all(message.fields)}
            if message.content is not None:
                text = self._written(message, i, marks, chunks, spelling)
                made["content"] = [{"type": "text", "text": text}] if self.typed else text
            conversation.append(made)
        arguments = {"add_generation_prompt": not self.arguments.get("continue_final_message"), **self.arguments}
        template = arguments.pop("chat_template", None)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation,
                    tools=None if self.tools is None else [marks.cut_all(tool) for tool in self.tools],
                    chat_template=template,
                    tokenize=False,
                    **{name: marks.cut_all(value) for name, value in arguments.items()},
                )
            )
        except Exception as error:  # a template is a program that may raise anything: any error counts as a refusal
            roles = ", ".join(message.role for message in messages)
            raise PromptError(
                f"the tokenizer's chat template refuses messages with the roles {roles}: {words_of(error)}. {_WAY_OUT}"
            ) from error

    def _written(self, message: Message, i: int, marks: Marks, chunks: bool, spelling: Spelling | None) -> str:
        own = message.role == "assistant"
        whole: list[str] = []
        text = ""

        def write(text: str) -> str:
            if own:
                return text if spelling is None else marks.around(text, lambda literal: spelling(i, literal))
            return marks.cut_content(text)

        for j, segment in enumerate(message.content or ()):
            if isinstance(segment, Chunk) and chunks:
                whole += [write(text), marks.chunk((i, j), marks.cut(segment.text))]
                text = ""
            elif isinstance(segment, TemplateText):
                whole += [write(text), segment.text]
                text = ""
            else:
                text += segment.text
        return "".join([*whole, write(text)])

    def _texts(self, messages: Sequence[Message]) -> Iterator[str]:
        """All texts that the template gets, and the template itself."""
        template = self.tokenizer.get_chat_template(self.arguments.get("chat_template"), self.tools)
        yield str(template)
        yield from _leaves([self.tools, self.arguments])
        for message in messages:
            yield message.text
            yield from _leaves(message.fields)


def _leaves(value: Any) -> Iterator[str]:
    """All strings inside nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def _inside(i: int, literal: str) -> str:
    return "inside"


def _found(segment: Segment) -> bool:
    return isinstance(segment, Chunk) and segment.found


def _without(message: Message, places: set[int]) -> Message:
    """The message with some of its segments as texts."""
    if not places or message.content is None:
        return message
    return replace(message, content=tuple(Text(s.text) if j in places else s for j, s in enumerate(message.content)))


def _same_text(one: str, other: str) -> bool:
    """Whether two outputs are the same except for white space. Marks at a chunk's ends keep the template from trimming it."""
    return one == other or "".join(one.split()) == "".join(other.split())
