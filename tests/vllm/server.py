"""A `cachetune serve` process for tests, and what they ask it."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import server_process
from server_process import value_of

__all__ = ["Server", "asked", "settings", "text_of", "value_of"]

START_SECONDS = 600
"""A machine with much else to do takes minutes to start vLLM."""
QUESTION = "What is it?"


class Server(server_process.Server):
    """A server process on a free port.

    Args:
        model, store: folders.
        log: file for what the server prints.
        options: of `cachetune serve`, beside those that all tests' servers have.
    """

    def __init__(self, model: Path, store: Path, log: Path, options: Sequence[str] = ()):
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # for `forget`
        environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "600"  # for `connections`
        # What is measured must not decide what a test sees: tokens alone do.
        options = ["--least-reused", "256", *options]
        words = [str(model), "--store", str(store), "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
        super().__init__([*words, *options], log, environment=environment, patience=START_SECONDS)
        self.model, self.store = model, store

    def forget(self) -> None:
        """Empty vLLM's prefix cache: what it computed for an earlier request is used as it is by later ones that begin alike."""
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST"), timeout=30
        ).close()

    def connections(self) -> list[http.client.HTTPConnection]:
        """A connection to each of its API servers, which share the port."""
        named = {int(pid) for pid in re.findall(r"\(ApiServer_\d+ pid=(\d+)\)", self.log.read_text())}
        pids = set(filter(psutil.pid_exists, named))  # without those of an earlier start
        found: dict[int, http.client.HTTPConnection] = {}
        until = time.monotonic() + START_SECONDS
        while len(found) < len(pids):
            assert time.monotonic() < until, f"of the API servers {pids}, only {set(found)} answer"
            # Several at once: one process alone may take all that come one after another.
            some = [http.client.HTTPConnection("127.0.0.1", self.port, timeout=120) for _ in range(8)]
            for each in some:
                each.request("GET", "/health")
            for each in some:
                each.getresponse().read()
            for each in some:
                port = each.sock.getsockname()[1]
                pid = next(pid for pid in pids if port in _peers(pid))
                if found.setdefault(pid, each) is not each:
                    each.close()
        return list(found.values())

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def text_of(chunks: list[str], query: str = QUESTION) -> str:
    return "Answer from these.\n\n" + "\n\n".join(chunks) + f"\n\nQuestion: {query}"


def asked(server: Server, content: str, **more: Any) -> dict[str, Any]:
    body = {
        "model": str(server.model),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    }
    return body | {"ignore_eos": True} | more


def settings(**given: Any) -> dict[str, Any]:
    return {"cachetune": given}


def _peers(pid: int) -> set[int]:
    """The ports from which clients have connected to a process."""
    connected = psutil.Process(pid).net_connections("tcp")
    return {each.raddr.port for each in connected if each.status == psutil.CONN_ESTABLISHED}
