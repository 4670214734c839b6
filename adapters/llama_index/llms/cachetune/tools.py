"""Tools: `CacheTuneLLM` as a model that calls functions, where its chat template shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from cachetune_rag import CacheTuneError
from cachetune_store.printing import shown

NO_TOOLS = (
    "this model's chat template shows no tools, so it can't be asked to call them: use ReActAgent, which describes tools in the "
    "prompt's text; structured_predict, which describes the schema there; a fixed retrieval step (a query engine); or a model "
    "whose chat template takes tools."
)


class ToolCalling(FunctionCallingLLM):
    """The methods that the framework requires of a model that calls functions."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat`."""
        if tools and not self.metadata.is_function_calling_model:
            raise NotImplementedError(NO_TOOLS)
        messages = list(chat_history or [])
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        kwargs.pop("tool_choice", None)  # a local model can't be forced to call a tool
        return {"messages": messages, "tools": [t.metadata.to_openai_tool() for t in tools] or None, **kwargs}

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        """Keep only the first call, unless several are allowed."""
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not allow_parallel_tool_calls and len(calls) > 1:
            message = response.message
            message.blocks = [b for b in message.blocks if not isinstance(b, ToolCallBlock) or b is calls[0]]
            message.additional_kwargs["tool_calls"] = message.additional_kwargs["tool_calls"][:1]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tools that an answer calls.

        Raises:
            CacheTuneError: it calls none, and `error_on_no_tool_call` is True.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            raise CacheTuneError(
                f"the model's answer calls no tool: {shown(response.message.content, 200)}. Ask again, or use a larger model."
            )
        return [
            ToolSelection(
                tool_id=block.tool_call_id or "",
                tool_name=block.tool_name,
                tool_kwargs=block.tool_kwargs if isinstance(block.tool_kwargs, dict) else {},
            )
            for block in calls
        ]
