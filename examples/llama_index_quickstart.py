"""A LlamaIndex pipeline whose retrieved nodes are read from stored KV. `make demo` fetches the model it needs."""

import pydoc_data.topics
import tempfile

from embeddings import for_llama_index
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from smollm2 import model_path

from cachetune_rag import CacheTune
from llama_index.llms.cachetune import CacheTuneLLM, CacheTuneSynthesizer, KVPrecompute

QUESTION = "What does the nonlocal statement do?"


def main() -> None:
    topics = ("nonlocal", "global", "del", "pass", "break")
    documents = [Document(text=pydoc_data.topics.topics[name], doc_id=name) for name in topics]
    with tempfile.TemporaryDirectory() as store, CacheTune.from_pretrained(model_path(), store) as engine:
        llm = CacheTuneLLM(engine, max_new_tokens=32)
        index = VectorStoreIndex.from_documents(
            documents,
            transformations=[SentenceSplitter(chunk_size=256), KVPrecompute(engine)],
            embed_model=for_llama_index(),
        )

        # With the default synthesizer, the engine finds the nodes in the prompt.
        print(index.as_query_engine(llm=llm, similarity_top_k=4).query(QUESTION))
        print(llm.last_report)
        # With ours, the nodes are handed over one by one. This one streams.
        synthesizer = CacheTuneSynthesizer(llm, streaming=True)
        query_engine = index.as_query_engine(response_synthesizer=synthesizer, llm=llm, similarity_top_k=4)
        query_engine.query(QUESTION).print_response_stream()
        print(f"\n{llm.last_report}")


if __name__ == "__main__":
    main()
