"""LangChain: KV reuse for retrieved documents.

`ChatCacheTune` is a chat model, `create_cachetune_chain` replaces `create_stuff_documents_chain`, and with `CacheTuneIndex`,
`langchain_core.indexing.index` updates the KV store together with the documents.
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
