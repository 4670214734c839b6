"""A `cachetune serve` process for tests, and what they ask it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 600
"""A machine with much else to do takes minutes to start vLLM."""
QUESTION = "What is it?"


@dataclass
class Server:
    """A server process on a free port.

    Attributes:
        model, store: folders.
        log: file with what the server printed.
        options: of `cachetune serve`, beside those that all tests' servers have.
    """

    model: Path
    store: Path
    log: Path
    options: Sequence[str] = ()
    port: int = field(default_factory=lambda: free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["serve", str(self.model), "--store", str(self.store), "--host", "127.0.0.1", "--port", str(self.port)]
        options = ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # for `forget`
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cachetune_rag", *words, *options, *self.options],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.end(signal.SIGKILL)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send the signal to the server and all that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            self.process.wait(60)
            self.process = None

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's values, of those with this label."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line)

    def forget(self) -> None:
        """Empty vLLM's prefix cache: what it computed for an earlier request is used as it is by later ones that begin alike."""
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST"), timeout=30
        ).close()

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
