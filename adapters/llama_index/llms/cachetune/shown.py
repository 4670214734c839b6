"""Nodes as prompts show them: a header of metadata, which is plain text, and the body, which is the chunk.

The header differs between prompts: a citation engine, an evaluator or an agent's tool shows none, and a transformation may add to it after
the KV was computed. The body is the same in all of them, so the body is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from cachetune_rag import Chunk, PromptError, Text
from cachetune_rag.text.prompts.prompt import Segment
from cachetune_store import changes_so_far
from cachetune_store.printing import shown

_WORDS = re.compile(r"\w+")
_RUN, _SAMPLES = 6, 12
_WRAPPED = 0.75
"""If a chunk makes up at least this share of a text, the text is taken for that chunk with something around it."""


def document_of(node: BaseNode) -> str:
    """The id of the document that a node's KV belongs to: that of its source document, or the node's own if it has none."""
    return node.ref_doc_id or node.node_id


def body(node: BaseNode) -> str:
    """A node's text without its header, stripped, as most prompts show it."""
    return node.get_content(metadata_mode=MetadataMode.NONE).strip()


def with_body_apart(text: str, node: BaseNode | None) -> list[Segment]:
    """A node's text as a prompt shows it, with its body as a chunk of its document.

    Args:
        text: what the prompt shows of the node.
        node: the node; None if it isn't known. Then, and if it has no source document, all is plain text, in which stored chunks
            are found: what is stored has to belong to a document that can be deleted.
    """
    if node is None or node.ref_doc_id is None:
        return [Text(text)]
    shown = body(node)
    start = text.rfind(shown) if shown else -1
    if start < 0:  # the prompt shows the node's text in another form
        shown = text.strip()
        start = text.find(shown)
    if not shown:
        return [Text(text)]
    before, after = text[:start], text[start + len(shown) :]
    parts: list[Segment] = [Text(before), Chunk(shown, node.ref_doc_id), Text(after)]
    return [part for part in parts if part.text]


def chunks_of(retrieved: Iterable[object]) -> list[Chunk]:
    """The bodies of nodes as chunks of their source documents, each once. A str, or a node without a source, has no document.

    Raises:
        PromptError: an item is neither a node nor a str.
    """
    chunks: dict[str, Chunk] = {}
    now = changes_so_far()  # a document that is deleted later isn't stored again, however long its nodes are kept
    for item in retrieved:
        node = item.node if isinstance(item, NodeWithScore) else item
        if isinstance(node, Chunk):
            chunk = node
        elif isinstance(node, BaseNode):
            chunk = Chunk(body(node), node.ref_doc_id, since=now)
        elif isinstance(node, str):
            chunk = Chunk(node.strip())
        else:
            raise PromptError(f"retrieved holds {shown(item)}, a {type(item).__name__}: use nodes, or strings.")
        if chunk.text:
            chunks.setdefault(chunk.text, chunk)
    return list(chunks.values())


def standing_in(texts: Sequence[str], chunks: Iterable[Chunk]) -> list[Chunk]:
    """The chunks that a prompt of these texts shows, unchanged or altered (quoted, escaped, cut).

    What is counted is what is shown: each text that stands in the prompt as a passage of its own counts once, whole, also where it
    has sentences in common with others, as the windows around neighbouring sentences have. A chunk that stands only inside
    another one (the sentence in its window) is part of that one and does not count again. What was retrieved and isn't shown here
    (the nodes of another step of a refinement, say) can't be found here and does not count.
    """
    whole, known = "\n".join(texts), list(chunks)
    words = ""
    standing, altered = [], []
    for chunk in known:
        if chunk.text in whole:
            standing.append(chunk)
            continue
        words = words or _plain(whole)
        if _echoes(chunk.text, words):
            altered.append(chunk)
    counted = _unwrapped(_outermost(whole, standing), standing)
    # The place of an altered text isn't known. If it is part of another text, it counts as part of that.
    others = [
        chunk
        for chunk in altered
        if not any(chunk is not other and chunk.text in other.text for other in [*counted, *altered])
        and _covered(chunk.text, counted) < _WRAPPED * len(chunk.text)
    ]
    others = _unwrapped(others, altered)
    counted = [chunk for chunk in counted if not any(chunk.text in other.text for other in others)]
    return [chunk for chunk in known if any(chunk is one for one in [*counted, *others])]


def _outermost(text: str, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that occur in a text outside of other chunks, in the order of their places."""
    places = [(start, start + len(chunk.text), chunk) for chunk in chunks for start in _starts(text, chunk.text)]
    found: dict[str, Chunk] = {}
    reached = 0
    for _, end, chunk in sorted(places, key=lambda place: (place[0], -place[1])):
        if end > reached:
            found.setdefault(chunk.text, chunk)
            reached = end
    return list(found.values())


def _starts(text: str, part: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start
        start = text.find(part, start + len(part))


def _unwrapped(shown: Sequence[Chunk], chunks: Sequence[Chunk]) -> list[Chunk]:
    """What is shown, each wrapped text ("Source 1: ...") replaced by the chunk that it was made of.

    A framework that wraps a node's text reports the wrapped one as a node, too. It is the text without the wrapping that other prompts
    show as well, and that is stored. So a shown chunk gives way to one that makes up most of it, unless that one counts already for
    another place where it is shown: of two windows, one may well make up most of the other.
    """
    taken: dict[str, Chunk] = {}
    # The shortest come first, so that a chunk that is shown alone is taken before a longer text can be replaced by it.
    for outer in sorted(shown, key=lambda chunk: len(chunk.text)):
        inner = [
            chunk
            for chunk in chunks
            if _WRAPPED * len(outer.text) <= len(chunk.text) <= len(outer.text)
            and chunk.text not in taken
            and chunk.text in outer.text
        ]
        chosen = min(inner, key=lambda chunk: len(chunk.text))
        taken[chosen.text] = chosen
    return list(taken.values())


def _covered(text: str, chunks: Iterable[Chunk]) -> int:
    """How many characters of a text are in chunks inside it. A character in several chunks counts once."""
    places = sorted((start, start + len(chunk.text)) for chunk in chunks for start in _starts(text, chunk.text))
    covered = reached = 0
    for start, end in places:
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _echoes(text: str, words: str) -> bool:
    """Whether at least a quarter of some runs of words of a text occur in `words`."""
    own = _plain(text).split()
    if len(own) < _RUN:
        return False
    places = sorted({i * (len(own) - _RUN) // (_SAMPLES - 1) for i in range(_SAMPLES)})
    found = sum(f" {' '.join(own[place : place + _RUN])} " in words for place in places)
    return 4 * found >= len(places)


def _plain(text: str) -> str:
    return f" {' '.join(_WORDS.findall(text.lower()))} "
