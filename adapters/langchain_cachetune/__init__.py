"""LangChain: KV reuse for retrieved documents.

`ChatCacheTune` is a drop-in chat model, `create_cachetune_chain` takes the place of `create_stuff_documents_chain`, and
`CacheTuneIndex` lets `langchain_core.indexing.index` keep the KV store in step with the documents.
"""

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError("langchain_cachetune needs langchain-core: pip install 'cachetune-rag[langchain]'") from error

from langchain_cachetune.chain import create_cachetune_chain
from langchain_cachetune.chat_model import ChatCacheTune
from langchain_cachetune.document_index import CacheTuneIndex
from langchain_cachetune.messages import chunk_block
from langchain_cachetune.runs import collect_reports

__all__ = ["CacheTuneIndex", "ChatCacheTune", "chunk_block", "collect_reports", "create_cachetune_chain"]
