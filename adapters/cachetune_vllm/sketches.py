"""What a server tells of the chunks in its memory, and takes into it, for a router and other replicas (`cachetune_ray`).

`--worker-extension-cls cachetune_vllm.sketches.SketchingWorker --middleware cachetune_vllm.sketches.SketchEndpoint`. The paths answer whoever may ask the
server. A sketch has no text, but tells who has a text whether it is among the chunks in memory; keys tell less than that.

| path | |
| --- | --- |
| GET /cachetune/sketch | a sketch of the texts of the chunks in memory |
| GET /cachetune/memory | their keys, a line each, the one used last first |
| POST /cachetune/memory | keys of chunks that are to be read into memory, as far as there is free room |
| GET /cachetune/warming | what has come of that: `{"running": false, "chunks": 12, "bytes": 1234}` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

BELOW = "/cachetune/"
PATH, MEMORY, WARMING = f"{BELOW}sketch", f"{BELOW}memory", f"{BELOW}warming"
MOST_KEYS = 4096
"""Keys that are told, and that are taken."""
_KEY = re.compile(r"[0-9a-f]{64}")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class SketchingWorker:
    """What vLLM adds to the class of its workers."""

    def cachetune_sketch(self) -> bytes | None:
        """A sketch of the chunks in this worker's memory; None where it reuses none."""
        engines = self._engines()
        if engines is None:
            return None
        from cachetune_ray.sketch import Sketch, samples_of

        return Sketch.of(samples_of(engines.store.texts_in_memory())).to_bytes()

    def cachetune_memory(self) -> list[str]:
        """Keys of the chunks in this worker's memory, the one used last first."""
        engines = self._engines()
        return [] if engines is None else [key.digest for key in engines.store.keys_in_memory()[:MOST_KEYS]]

    def cachetune_warm(self, keys: list[str]) -> None:
        """Begin to read chunks into memory. A request that needs one of them doesn't wait."""
        engines = self._engines()
        if engines is not None:
            engines.warm(keys)

    def cachetune_warming(self) -> tuple[bool, int, int]:
        """Whether chunks are being read into memory, how many were, and their bytes."""
        engines = self._engines()
        return (False, 0, 0) if engines is None else engines.warmed()

    def _engines(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from cachetune_vllm.connector import CacheTuneConnector

        connector = get_kv_transfer_group()
        return connector.engines if isinstance(connector, CacheTuneConnector) else None


class SketchEndpoint:
    """ASGI middleware around vLLM's API server that answers these paths."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the paths, and pass all others on."""
        asked = (scope["method"], scope["path"]) if scope["type"] == "http" else None
        if asked not in _ANSWERS:
            await self._app(scope, receive, send)
            return
        status, body = await _ANSWERS[asked](scope["app"].state.engine_client, receive)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


# Workers that share a model have the same chunks in memory, so the first one's answer is that of all.


async def _sketch(client: Any, receive: Receive) -> tuple[int, bytes]:
    told = await client.collective_rpc("cachetune_sketch")
    sketch = told[0] if told else None
    return (204, b"") if sketch is None else (200, sketch)


async def _memory(client: Any, receive: Receive) -> tuple[int, bytes]:
    told = await client.collective_rpc("cachetune_memory")
    return 200, "\n".join(told[0] if told else []).encode()


async def _warm(client: Any, receive: Receive) -> tuple[int, bytes]:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_KEYS * 65:
            return 413, f"at most {MOST_KEYS} keys are taken\n".encode()
        if not message.get("more_body"):
            break
    keys = body.decode("ascii", "replace").split()
    wrong = next((key for key in keys if not _KEY.fullmatch(key)), None)
    if wrong is not None:
        return 400, f"{wrong[:80]!r} is no key of a chunk: 64 hexadecimal digits\n".encode()
    await client.collective_rpc("cachetune_warm", args=(keys,))
    return 202, b""


async def _warming(client: Any, receive: Receive) -> tuple[int, bytes]:
    told = await client.collective_rpc("cachetune_warming")
    running, chunks, size = told[0] if told else (False, 0, 0)
    return 200, json.dumps({"running": running, "chunks": chunks, "bytes": size}).encode()


_ANSWERS: dict[tuple[str, str] | None, Callable[[Any, Receive], Awaitable[tuple[int, bytes]]]] = {
    ("GET", PATH): _sketch,
    ("GET", MEMORY): _memory,
    ("POST", MEMORY): _warm,
    ("GET", WARMING): _warming,
}
