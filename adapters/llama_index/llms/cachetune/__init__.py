"""LlamaIndex: KV reuse for retrieved nodes.

`CacheTuneLLM` is a drop-in LLM, `CacheTuneSynthesizer` hands nodes over one by one, `KVPrecompute` fills the store while
documents are ingested.
"""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "llama_index.llms.cachetune needs llama-index-core: pip install 'cachetune-rag[llama-index]'"
    ) from error

from llama_index.llms.cachetune.blocks import ChunkBlock
from llama_index.llms.cachetune.llm import CacheTuneLLM
from llama_index.llms.cachetune.precompute import KVPrecompute
from llama_index.llms.cachetune.synthesizer import CacheTuneSynthesizer

__all__ = ["CacheTuneLLM", "CacheTuneSynthesizer", "ChunkBlock", "KVPrecompute"]
