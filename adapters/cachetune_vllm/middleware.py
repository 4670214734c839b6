"""Answers requests whose reuse settings can't be used with status 400, before vLLM sees them.

`vllm serve ... --middleware cachetune_vllm.middleware.CheckRequests`; `cachetune serve` adds that by itself. Without it, such a
request is answered without reuse, and its response says why.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cachetune_vllm.settings import REQUEST_KEY, RequestSettings, RequestSettingsError, ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class CheckRequests:
    """ASGI middleware around vLLM's API server."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._app = app
        self._settings: ServerSettings | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless its settings can't be used."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        error = self._error(scope, b"".join(message.get("body", b"") for message in messages))
        if error is not None:
            await _refuse(send, error)
            return
        waiting = iter(messages)

        async def replayed() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, replayed, send)

    def _error(self, scope: Scope, body: bytes) -> str | None:
        """What is wrong with a request's settings; None if nothing is, or it has none."""
        if REQUEST_KEY.encode() not in body:
            return None
        try:
            params = json.loads(body).get("kv_transfer_params") or {}
            given = params.get(REQUEST_KEY)
        except (ValueError, AttributeError, RecursionError):
            return None  # vLLM says what is wrong with it
        if given is None:
            return None
        if self._settings is None:
            self._settings = _settings_of(scope)
        try:
            RequestSettings.of(given, self._settings)
        except RequestSettingsError as error:
            return str(error)
        return None


def _settings_of(scope: Scope) -> ServerSettings:
    """The server's own settings: what a request may name depends on them."""
    transfer = scope["app"].state.args.kv_transfer_config
    extra = (
        transfer.get("kv_connector_extra_config") if isinstance(transfer, dict) else transfer.kv_connector_extra_config
    )
    return ServerSettings.of(extra or {})


async def _refuse(send: Send, message: str) -> None:
    """Answer with an error as OpenAI's API has them."""
    said = {
        "error": {
            "message": message,
            "type": "BadRequestError",
            "param": f"kv_transfer_params.{REQUEST_KEY}",
            "code": 400,
        }
    }
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
