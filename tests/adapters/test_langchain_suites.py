"""LangChain's own test suites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
from engines import EngineMaker
from langchain_core.documents import Document
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.vectorstores import VectorStore
from langchain_faiss import FaissStore
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.integration_tests.indexer import AsyncDocumentIndexTestSuite, DocumentIndexerTestSuite
from langchain_tests.unit_tests import ChatModelUnitTests

from cachetune_rag import CacheTune
from langchain_cachetune import CacheTuneIndex, ChatCacheTune, chunk_block

PASSAGE = (
    "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler. It is 41 metres tall and can be seen from "
    "the harbour of Tessin, from which a ferry leaves every morning at nine."
)


class TestChatModelUnits(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _engine(self) -> None:
        type(self).engine = CacheTune(tiny.llama(layers=1), tiny.tokenizer(), None)

    @property
    def chat_model_class(self) -> type[ChatCacheTune]:
        return ChatCacheTune

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "model": "tiny-llama", "store": None}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        env = {"CACHETUNE_MODEL": "some/model", "CACHETUNE_STORE": "kv-store"}
        return env, {}, {"model": "some/model", "store": "kv-store"}

    @pytest.mark.xfail(strict=True, reason='"all" lets langchain-core load only the classes of its own list')
    def test_serdes(self, model: Any, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)

    def test_saved_and_loaded_when_allowed(self, model: Any) -> None:
        loaded = load(dumpd(model), valid_namespaces=["langchain_cachetune"], allowed_objects=[ChatCacheTune])
        assert loaded.asdict() == model.asdict()
        assert "engine" not in dumpd(model)["kwargs"]


@pytest.mark.real_model
class TestChatModelIntegration(ChatModelIntegrationTests):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _engine(cls, smollm2: tuple[Any, Any]) -> Iterator[None]:
        with CacheTune(*smollm2, None) as cls.engine:
            yield

    @property
    def chat_model_class(self) -> type[ChatCacheTune]:
        return ChatCacheTune

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "max_tokens": 24}

    @property
    def has_tool_calling(self) -> bool:
        return False  # a model of 135M parameters calls none; below, one that does as it is told

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        return {
            "invoke": ["cache_read_input", "cache_creation_input"],
            "stream": ["cache_read_input", "cache_creation_input"],
        }

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        """A chunk seen for the first time is computed and stored."""
        model = ChatCacheTune(engine=self.engine, max_tokens=4)
        text = f"{'Streamed' if stream else 'Invoked'}. {PASSAGE}"
        message = HumanMessage([chunk_block(text), {"type": "text", "text": "\n\nWho built the lighthouse?"}])
        return _run(model, message, stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """A stored chunk is found in the text and reused."""
        self.engine.precompute(PASSAGE)
        return _run(
            ChatCacheTune(engine=self.engine, max_tokens=4), HumanMessage(f"{PASSAGE}\n\nWho built it?"), stream
        )


def _run(model: ChatCacheTune, message: HumanMessage, stream: bool) -> Any:
    if not stream:
        return model.invoke([message])
    full: Any = None
    for chunk in model.stream([message]):
        full = chunk if full is None else full + chunk
    return full


@pytest.fixture
def store(embed: Callable[[list[str]], Any]) -> VectorStore:
    return FaissStore(embed)


class TestIndex(DocumentIndexerTestSuite):
    @pytest.fixture
    def index(self, engine: CacheTune, store: VectorStore) -> CacheTuneIndex:
        return CacheTuneIndex(engine=engine, vectorstore=store)


class TestAsyncIndex(AsyncDocumentIndexTestSuite):
    @pytest.fixture
    async def index(self, engine: CacheTune, store: VectorStore) -> CacheTuneIndex:
        return CacheTuneIndex(engine=engine, vectorstore=store)


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, engines: EngineMaker, store: VectorStore, documents: dict[str, str]) -> None:
        type(self).engine, type(self).store = engines(), store
        index = CacheTuneIndex(engine=self.engine, vectorstore=store)
        index.upsert([Document(id=name, page_content=text[:200]) for name, text in documents.items()])

    @property
    def retriever_constructor(self) -> type[CacheTuneIndex]:
        return CacheTuneIndex

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "vectorstore": self.store}

    @property
    def retriever_query_example(self) -> str:
        return "What does the nonlocal statement do?"
