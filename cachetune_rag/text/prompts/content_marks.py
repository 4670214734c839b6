"""Marks in the input of a chat template, which show where its output has each chunk and each text that looks like a control token.

A template is a program. It may trim a content, remove a part of it, quote it, or choose by it. So only running it shows what it makes of a
conversation. Marks are characters that occur in no text of the conversation. They stand around chunks, and inside text that is spelt like a
control token, and the output has them in the same places.
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
"""Private-use characters. They are no letters and no white space, have no case, and occur in almost no text."""

_ANY = re.compile("[\U000f0000-\U0010ffff]")

ChunkPlace = tuple[int, int]
"""The numbers of a chunk's message and segment."""


class Marks:
    """Marks for one conversation.

    Args:
        content: finds text that is spelt like a control token.
        texts: all texts that the template gets, and the template itself. Marks are characters that don't occur in them.
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
        """`text` with a mark inside each part that is spelt like a control token."""
        places = self._content.cuts(text)
        return self._cut.join(text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True))

    def cut_content(self, text: str) -> str:
        """As `cut`, with a mark also at an end that could become a control token together with the text beside it."""
        start, end = self._content.loose_ends(text)
        return (self._cut if start else "") + self.cut(text) + (self._cut if end else "")

    def cut_all(self, value: Any) -> Any:
        """`value` with `cut` applied to every string in it, also in nested dicts and lists."""
        if isinstance(value, str):
            return self.cut(value)
        if isinstance(value, Mapping):
            return {self.cut_all(key): self.cut_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.cut_all(item) for item in value]
        return value

    def around(self, text: str, spelling: Callable[[str], str]) -> str:
        """`text` with each part that is spelt like a control token marked as `spelling` says: "inside", "around", or "" for no mark."""
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
        """A chunk's text between two marks that only this chunk has.

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
        """The template's output with all marks removed."""
        marks = {self._cut, self._left, self._right, *self._chunks}
        return _ANY.sub(lambda match: "" if match.group() in marks else match.group(), rendered)

    def altered(self, rendered: str, messages: Sequence[Message]) -> list[ChunkPlace]:
        """Chunks that the output doesn't have exactly once and unchanged."""
        found = self._found(rendered)
        wrong = []
        for mark, (i, j) in self._chunks.items():
            places = found.get(mark, [])
            content = messages[i].content
            chunk = content[j] if content is not None else None
            if not isinstance(chunk, Chunk):
                continue  # it is no longer treated as a chunk
            if len(places) != 2 or rendered[places[0] + 1 : places[1]].replace(self._cut, "") != chunk.text:
                wrong.append((i, j))
        return wrong

    def pieces(self, rendered: str, messages: Sequence[Message]) -> list[PromptPiece]:
        """The pieces from which the prompt is tokenised. Call it only if no chunk is `altered`."""
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
        """The output between chunks, cut at the marks, so that no control token is read across a mark."""
        sides = self._left + self._right
        for i, piece in enumerate(re.split(f"{self._left}([^{sides}]+){self._right}", rendered)):
            if i % 2 and self._content.is_control(piece):
                yield Text(piece)
            else:
                yield from (TemplateText(text) for text in re.split(f"[{self._cut}{sides}]", piece) if text)
