"""The nodes that an existing index, docstore, vector store or retriever holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.indices.base import BaseIndex
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore import BaseDocumentStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from cachetune_rag import ConfigError
from cachetune_store.printing import shown

_log = logging.getLogger(__name__)

Source = BaseIndex[Any] | BaseDocumentStore | BasePydanticVectorStore | BaseRetriever | Sequence[BaseNode]


def nodes_of(source: Source, queries: Sequence[str] = ()) -> list[BaseNode]:
    """The nodes of a source. If there are none, a warning is logged.

    Args:
        source: an index, a docstore, a vector store that can list its nodes, a retriever, or nodes.
        queries: questions for the retriever.

    Raises:
        ConfigError: the source can't say what it holds.
    """
    if isinstance(source, str | bytes):
        raise ConfigError(
            f"source is {shown(source)}: give an index, a docstore, a vector store, a retriever or nodes."
        )
    if isinstance(source, BaseRetriever):
        if not queries:
            raise ConfigError("a retriever doesn't list what it holds: give queries=, the questions to retrieve for.")
        found = {item.node.node_id: item.node for query in queries for item in source.retrieve(query)}
        return list(found.values())
    if isinstance(source, BaseIndex):
        nodes = list(source.docstore.docs.values())
        if not nodes and isinstance(store := getattr(source, "vector_store", None), BasePydanticVectorStore):
            nodes = _listed(store)  # if the vector store keeps the texts, the docstore is empty
    elif isinstance(source, BaseDocumentStore):
        nodes = list(source.docs.values())
    elif isinstance(source, BasePydanticVectorStore):
        nodes = _listed(source)
    elif isinstance(source, Sequence) and all(isinstance(node, BaseNode) for node in source):
        nodes = list(source)
    else:
        raise ConfigError(
            f"source is a {type(source).__name__}: give an index, a docstore, a vector store, a retriever or nodes."
        )
    if not nodes:
        _log.warning(
            "%s holds no nodes, so nothing was computed: an index on a vector store that keeps the texts has an empty docstore; "
            "give the index or its vector store",
            type(source).__name__,
        )
    return nodes


def _listed(store: BasePydanticVectorStore) -> list[BaseNode]:
    try:
        return list(store.get_nodes())
    except (NotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{type(store).__name__} doesn't list its nodes ({error}): give a retriever with queries=, or the nodes. Answers "
            "learn what they retrieve by themselves, too (CacheTuneLLM's learn_retrieved)."
        ) from error
