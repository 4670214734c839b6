"""LlamaIndex's agents from the question to the answer: the tool is called, and what it returned is found in the next prompt."""

from __future__ import annotations

import copy
import json
from typing import Any

import tiny
from engines import EngineMaker
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.tools import FunctionTool
from scripted import Scripted

from llama_index.llms.cachetune import CacheTuneLLM, KVPrecompute

TEXT = "The lighthouse of Varnholm was built in 1874 by the engineer Ida Kessler, and it has 214 steps of grey stone."
TOOLS = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n<tools>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def look_up(engines: EngineMaker, tokenizer: Any) -> tuple[CacheTuneLLM, FunctionTool, Any]:
    engine = engines(tokenizer=tokenizer)
    index = VectorStoreIndex.from_documents(
        [Document(text=TEXT, doc_id="d", metadata={"file_path": "/d.txt"})],
        transformations=[KVPrecompute(engine)],
        embed_model=MockEmbedding(4),
    )

    def look_up(topic: str) -> str:
        """What is known of a topic."""
        return "\n\n".join(item.node.get_content() for item in index.as_retriever().retrieve(topic))

    return CacheTuneLLM(engine, max_new_tokens=200), FunctionTool.from_defaults(look_up), engine


async def test_a_function_agent(engines: EngineMaker) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = TOOLS
    llm, tool, engine = look_up(engines, tokenizer)
    call = f"<tool_call>{json.dumps({'name': 'look_up', 'arguments': {'topic': 'steps'}})}</tool_call>"
    told = Scripted(lambda prompt: "It has 214 steps." if TEXT in prompt else call)
    llm.generate_kwargs["logits_processor"] = [told]
    answer = await FunctionAgent(tools=[tool], llm=llm, system_prompt="Look things up.").run("How many steps?")
    assert str(answer) == "It has 214 steps."
    first, second = told.prompts
    assert '"name": "look_up"' in first
    assert f"<|im_start|>tool\n{TEXT}<|im_end|>" in second
    assert engine.stats().reused + engine.stats().recomputed == len(TEXT)


async def test_a_react_agent(engines: EngineMaker) -> None:
    llm, tool, engine = look_up(engines, tiny.tokenizer())
    step = 'Thought: I need to look it up.\nAction: look_up\nAction Input: {"topic": "steps"}\n'
    last = "Thought: I can answer without using any more tools.\nAnswer: It has 214 steps."
    told = Scripted(lambda prompt: last if TEXT in prompt else step)
    llm.generate_kwargs["logits_processor"] = [told]
    answer = await ReActAgent(tools=[tool], llm=llm).run("How many steps?")
    assert str(answer) == "It has 214 steps."
    assert len(told.prompts) == 2
    assert engine.stats().reused + engine.stats().recomputed == len(TEXT)
