"""Which chunks a server has in memory, as a sketch that a router reads (`cachetune_ray`).

`--worker-extension-cls cachetune_vllm.sketches.SketchingWorker --middleware cachetune_vllm.sketches.SketchEndpoint`. The path answers whoever may ask the
server; a sketch has no text, but tells who has a text whether it is among the chunks in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PATH = "/cachetune/sketch"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class SketchingWorker:
    """What vLLM adds to the class of its workers."""

    def cachetune_sketch(self) -> bytes | None:
        """A sketch of the chunks in this worker's memory; None where it reuses none."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from cachetune_vllm.connector import CacheTuneConnector

        connector = get_kv_transfer_group()
        if not isinstance(connector, CacheTuneConnector):
            return None
        if connector.engines is None:
            return None
        from cachetune_ray.sketch import Sketch, samples_of

        return Sketch.of(samples_of(connector.engines.store.texts_in_memory())).to_bytes()


class SketchEndpoint:
    """ASGI middleware around vLLM's API server that answers `PATH`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the path, and pass all others on."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        told = await scope["app"].state.engine_client.collective_rpc("cachetune_sketch")
        sketch = told[0] if told else None  # workers that share a model have the same chunks
        await send({"type": "http.response.start", "status": 204 if sketch is None else 200, "headers": []})
        await send({"type": "http.response.body", "body": sketch or b""})
