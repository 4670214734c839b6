"""A `cachetune serve` process: started, waited for with a word on how far it is, and ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

SAY_EVERY = 10.0
"""Seconds between two lines while the server starts."""
LEAVE = 20.0
"""Seconds that the server has to end by itself."""
ENVIRONMENT = {
    # The model is on this machine: no hub is asked, and nothing is reported.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # For vLLM on a CPU: GiB of its cache, and no cores of its own, since the clients run on the same ones.
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What the server's environment has where the user has not said otherwise."""


class ServerError(Exception):
    """The server did not start. The message says what its log ends with."""


class Server:
    """A server process on a free port of this machine.

    Args:
        words: what `cachetune serve` is given, without --host and --port.
        log: file for what the server prints.
        say: called with a line on how far the start is, every ten seconds.
        environment: the process's; by default this one's, and `ENVIRONMENT`.
        patience: seconds in which the server has to start.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        say: Callable[[str], None] = lambda _line: None,
        environment: Mapping[str, str] | None = None,
        patience: float = float("inf"),
    ):
        self.log, self._say, self._patience = log, say, patience
        self._environment = ENVIRONMENT | os.environ if environment is None else environment
        self.port = _free_port()
        self.words = ["serve", *words, "--host", "127.0.0.1", "--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """Start the process, and wait until it answers.

        Raises:
            ServerError: it ended instead, or does not answer in time.
        """
        with self.log.open("ab") as log:
            # In a session of its own: Ctrl-C reaches this program alone, which then ends the server and its workers together.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cachetune_rag", *self.words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait(self._process)
        except BaseException:
            self.end()
            raise

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server and everything that it started, by this signal first."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal(process.pid, how)
        try:
            process.wait(LEAVE)
        except subprocess.TimeoutExpired:
            self._say(f"the server did not end within {LEAVE:.0f} s, and is killed")
        finally:
            _signal(process.pid, signal.SIGKILL)  # what is left of its processes; mostly none
            process.wait()

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's values, of those with this label (`kind="reused"`, say)."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return value_of(answer.read().decode(), name, label)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        started = spoke = time.monotonic()
        while True:
            if process.poll() is not None:
                raise ServerError(
                    f"the server ended with status {process.returncode}. Its log ends with:\n{self.tail(25)}"
                )
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            now = time.monotonic()
            if now - started > self._patience:
                raise ServerError(
                    f"the server does not answer after {self._patience:.0f} s. Its log ends with:\n{self.tail(25)}"
                )
            if now - spoke >= SAY_EVERY:
                spoke = now
                self._say(f"  {now - started:3.0f} s: {self.tail(1)[:110]}")

    def tail(self, lines: int) -> str:
        """The last lines that the server printed."""
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(said[-lines:]) or "(nothing yet)"


def value_of(metrics: str, name: str, label: str = "") -> float:
    """The sum of a metric's values in what a server's /metrics say, of those with this label."""
    lines = (line for line in metrics.splitlines() if line.startswith(f"{name}{{") and label in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def _signal(group: int, number: signal.Signals) -> None:
    """Send a signal to all processes of a group; there may be none left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
