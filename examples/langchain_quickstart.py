"""A LangChain chain whose retrieved documents are read from stored KV. `make demo` fetches the model it needs."""

import pydoc_data.topics
import tempfile

from embeddings import for_langchain
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from smollm2 import model_path

from cachetune_rag import CacheTune, Splitter
from langchain_cachetune import CacheTuneIndex, ChatCacheTune, create_cachetune_chain

TOPICS = ["nonlocal", "global", "del", "pass", "break"]


def main() -> None:
    with tempfile.TemporaryDirectory() as store, CacheTune.from_pretrained(model_path(), store) as engine:
        split = Splitter(lambda text: len(engine.prompts.encode(text)), 256).split
        passages = [(name, text) for name in TOPICS for text in split(pydoc_data.topics.topics[name])]
        documents = [Document(page_content=text, metadata={"source": name}) for name, text in passages]
        retriever = CacheTuneIndex(engine=engine, vectorstore=InMemoryVectorStore(for_langchain()), k=4)
        records = InMemoryRecordManager("quickstart")
        records.create_schema()
        print(index(documents, records, retriever, cleanup="full", source_id_key="source", key_encoder="sha256"))
        model = ChatCacheTune(engine=engine, max_tokens=32)
        chain = RunnablePassthrough.assign(context=lambda inputs: retriever.invoke(inputs["input"])).pipe(
            create_cachetune_chain(model)
        )
        for piece in chain.stream({"input": "What does the nonlocal statement do?"}):
            print(piece, end="", flush=True)
        print(f"\n{model.last_report}")


if __name__ == "__main__":
    main()
