"""Marks in what a chat template is given, by which its output shows where every chunk and every forged control token went.

A template is a program: it may trim a content, cut a part out of it, quote it, or look into it and choose. What it makes of a
conversation is known only by running it. Marks are characters that no text of the conversation has. They stand around chunks, and
inside whatever is spelt like a control token, and come out of the template where these come out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.chat_messages import Message
from cachetune_rag.text.prompts.segments import Chunk, Passage, PromptPiece, TemplateText, Text
from cachetune_rag.text.tokenizer import ContentTokenizer

_PRIVATE = (range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE))
"""Private-use characters: neither letters nor white space, without case, and in almost no text."""

_ANY = re.compile("[\U000f0000-\U0010ffff]")

ChunkPlace = tuple[int, int]
"""Message and segment that a chunk is."""


class Marks:
    """Marks for one conversation.

    Args:
        content: knows what is spelt like a control token.
        texts: all that goes into the template, and the template: marks are characters that don't occur in it.
    """

    def __init__(self, content: ContentTokenizer, texts: Iterator[str]):
        self._content = content
        used: set[str] = set()
        for text in texts:
            used.update(character for character in set(text) if character >= "\U000f0000")
        self._free = (chr(code) for codes in _PRIVATE for code in codes if chr(code) not in used)
        self._cut, self._left, self._right = next(self._free), next(self._free), next(self._free)
        self._spelt: dict[str, list[tuple[int, str]]] = {}
        self._chunks: dict[str, ChunkPlace] = {}
        self._places: dict[ChunkPlace, str] = {}

    # -- putting them in ------------------------------------------------------------------------------------------

    def cut(self, text: str) -> str:
        """`text` with a mark inside everything that is spelt like a control token."""
        places = self._content.cuts(text)
        return self._cut.join(text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True))

    def cut_content(self, text: str) -> str:
        """The same, with marks also at the ends where the text could become a control token with its neighbours."""
        start, end = self._content.loose_ends(text)
        return (self._cut if start else "") + self.cut(text) + (self._cut if end else "")

    def cut_all(self, value: Any) -> Any:
        """`value`, of dicts, lists and plain values, with every text in it cut."""
        if isinstance(value, str):
            return self.cut(value)
        if isinstance(value, Mapping):
            return {self.cut_all(key): self.cut_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.cut_all(item) for item in value]
        return value

    def around(self, text: str, spelling: Callable[[str], str]) -> str:
        """`text` with what is spelt like control tokens marked as `spelling` says: "inside", "around" or "" for not at all."""
        done, pieces = 0, []
        if text not in self._spelt:
            self._spelt[text] = self._content.found(text)
        for start, literal in self._spelt[text]:
            if start < done:
                continue
            how = spelling(literal)
            marked = {"around": f"{self._left}{literal}{self._right}", "inside": self.cut(literal)}.get(how, literal)
            pieces += [text[done:start], marked]
            done = start + len(literal)
        return "".join([*pieces, text[done:]])

    def chunk(self, place: ChunkPlace, text: str) -> str:
        """A chunk's text between two marks of its own.

        Raises:
            PromptError: there are more chunks than marks.
        """
        mark = self._places.get(place)
        if mark is None:
            mark = next(self._free, None)
            if mark is None:
                raise PromptError(f"a conversation of more than {len(self._places)} chunks: leave some out.")
            self._places[place], self._chunks[mark] = mark, place
        return f"{mark}{text}{mark}"

    # -- reading them out -----------------------------------------------------------------------------------------

    def without(self, rendered: str) -> str:
        """What the template's output would be without marks."""
        marks = {self._cut, self._left, self._right, *self._chunks}
        return _ANY.sub(lambda match: "" if match.group() in marks else match.group(), rendered)

    def altered(self, rendered: str, messages: Sequence[Message]) -> list[ChunkPlace]:
        """Chunks that didn't come out once and as they are."""
        found = self._found(rendered)
        wrong = []
        for mark, (i, j) in self._chunks.items():
            places = found.get(mark, [])
            content = messages[i].content
            chunk = content[j] if content is not None else None
            if not isinstance(chunk, Chunk):
                continue  # it is marked no more
            if len(places) != 2 or rendered[places[0] + 1 : places[1]].replace(self._cut, "") != chunk.text:
                wrong.append((i, j))
        return wrong

    def pieces(self, rendered: str, messages: Sequence[Message]) -> list[PromptPiece]:
        """What a prompt is tokenised from; no chunk is `altered`."""
        found = self._found(rendered)
        order = [(i, j) for i, m in enumerate(messages) for j, s in enumerate(m.content or ()) if isinstance(s, Chunk)]
        numbers = {place: number for number, place in enumerate(order)}
        pieces: list[PromptPiece] = []
        done = 0
        for mark, (start, end) in sorted(found.items(), key=lambda item: item[1]):
            i, j = self._chunks[mark]
            chunk = (messages[i].content or ())[j]
            assert isinstance(chunk, Chunk)
            pieces += self._texts(rendered[done:start])
            pieces.append(Passage(numbers[i, j], chunk))
            done = end + 1
        return [*pieces, *self._texts(rendered[done:])]

    def _found(self, rendered: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        if self._chunks:
            for match in _ANY.finditer(rendered):
                if match.group() in self._chunks:
                    found.setdefault(match.group(), []).append(match.start())
        return found

    def _texts(self, rendered: str) -> Iterator[PromptPiece]:
        """Output between chunks: cut at the marks, so that no control token is read across one."""
        sides = self._left + self._right
        for i, piece in enumerate(re.split(f"{self._left}([^{sides}]+){self._right}", rendered)):
            if i % 2 and self._content.is_control(piece):
                yield Text(piece)
            else:
                yield from (TemplateText(text) for text in re.split(f"[{self._cut}{sides}]", piece) if text)
