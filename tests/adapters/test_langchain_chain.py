"""The chain passes a caller's config on, in every way of calling it; on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document

from cachetune_rag import CacheTune
from langchain_cachetune import create_cachetune_chain

DOCUMENTS = [Document(page_content="The lighthouse was built in 1871."), Document(page_content="It has 214 steps.")]
INPUTS = {"context": DOCUMENTS, "input": "How many steps?"}


class Recorder(BaseCallbackHandler):
    """Collects what a callback handler gets."""

    def __init__(self) -> None:
        self.tags: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.tokens: list[str] = []
        self.reports: list[dict[str, Any]] = []

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, tags: Any = None, metadata: Any = None, **kwargs: Any
    ) -> None:
        self.tags, self.metadata = list(tags or ()), dict(metadata or {})

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.reports.append(response.generations[0][0].message.response_metadata["report"])


@pytest.mark.parametrize("way", ["invoke", "batch", "stream", "ainvoke", "abatch", "astream"])
async def test_config_and_callbacks_reach_the_model(engine: CacheTune, way: str) -> None:
    chain = create_cachetune_chain(engine, max_tokens=6, ratio=1.0)
    expected = chain.invoke(INPUTS)
    engine.flush()
    seen = Recorder()
    config: Any = {"callbacks": [seen], "tags": ["mine"], "metadata": {"request": 7}}
    if way == "invoke":
        got = chain.invoke(INPUTS, config)
    elif way == "batch":
        got = chain.batch([INPUTS], config)[0]
    elif way == "stream":
        got = "".join(chain.stream(INPUTS, config))
    elif way == "ainvoke":
        got = await chain.ainvoke(INPUTS, config)
    elif way == "abatch":
        got = (await chain.abatch([INPUTS], config))[0]
    else:
        got = "".join([piece async for piece in chain.astream(INPUTS, config)])
    assert got == expected
    assert "mine" in seen.tags
    assert seen.metadata["request"] == 7
    assert len(seen.reports) == 1
    assert seen.reports[0]["missed"] == 0
    if "stream" in way:
        assert "".join(seen.tokens) == got
