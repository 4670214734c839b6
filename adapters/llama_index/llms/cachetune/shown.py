"""Nodes as prompts show them: a header of metadata, which is plain text, and the body, which is the chunk.

The header differs from prompt to prompt: a citation engine, an evaluator or an agent's tool shows none, and a transformation may
add to it after the KV was computed. The body is the same everywhere, so the body is what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from cachetune_rag import Chunk, PromptError, Text
from cachetune_rag.text.prompts.prompt import Segment
from cachetune_store import changes_so_far
from cachetune_store.printing import shown

_WORDS = re.compile(r"\w+")
_RUN, _SAMPLES = 6, 12
_WRAPPED = 0.75
"""A text of which other chunks make up at least this share is taken for these chunks with something around them."""


def document_of(node: BaseNode) -> str:
    """The id of the document that a node's KV belongs to: its source document's, or the node's own where it has none."""
    return node.ref_doc_id or node.node_id


def body(node: BaseNode) -> str:
    """A node's text without its header, and without the white space around it, which most prompts strip."""
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
    if start < 0:  # a node that shows its text otherwise, or another one
        shown = text.strip()
        start = text.find(shown)
    if not shown:
        return [Text(text)]
    before, after = text[:start], text[start + len(shown) :]
    parts: list[Segment] = [Text(before), Chunk(shown, node.ref_doc_id), Text(after)]
    return [part for part in parts if part.text]


def chunks_of(retrieved: Iterable[object]) -> list[Chunk]:
    """The bodies of nodes as chunks of their source documents, each once; a str, or a node without a source, is of none.

    Raises:
        PromptError: an item is neither.
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
    """Those of the chunks that a prompt of these texts shows, as they are or altered (quoted, escaped, cut).

    What was retrieved and isn't shown here (the nodes of another step of a refinement, say) can't be found here.
    """
    whole = "\n".join(texts)
    words: str | None = None
    shown = []
    for chunk in chunks:
        if chunk.text in whole:
            shown.append(chunk)
            continue
        if words is None:
            words = _plain(whole)
        if _echoes(chunk.text, words):
            shown.append(chunk)
    return _once(shown)


def _once(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks without those that say the same again.

    A framework may wrap a node's text ("Source 1: ...") or show what surrounds it. What consists of other chunks for the most part
    gives way to these: they are the texts that are shown elsewhere as well. Of the rest, what stands within another is part of it.
    """
    whole = [chunk for chunk in chunks if _covered(chunk, chunks) < _WRAPPED * len(chunk.text)]
    return [chunk for chunk in whole if not any(chunk is not other and chunk.text in other.text for other in whole)]


def _covered(chunk: Chunk, others: Iterable[Chunk]) -> int:
    """Characters of a chunk that are those of others within it."""
    return sum(len(other.text) for other in others if other is not chunk and other.text in chunk.text)


def _echoes(text: str, words: str) -> bool:
    """Whether at least a quarter of some runs of words of a text occur among `words`."""
    own = _plain(text).split()
    if len(own) < _RUN:
        return False
    places = sorted({i * (len(own) - _RUN) // (_SAMPLES - 1) for i in range(_SAMPLES)})
    found = sum(f" {' '.join(own[place : place + _RUN])} " in words for place in places)
    return 4 * found >= len(places)


def _plain(text: str) -> str:
    return f" {' '.join(_WORDS.findall(text.lower()))} "
