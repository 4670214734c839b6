"""A vLLM server beside a replica's actor: `vllm serve` as it is, on a free port of this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from cachetune_rag.errors import CacheTuneError
from cachetune_vllm.serve import module_and_words

_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_STOP_SECONDS = 20.0


class ServerGoneError(CacheTuneError):
    """The vLLM server of a replica has ended, or doesn't answer."""


class ServerProcess:
    """The process.

    Args:
        words: a line of `vllm serve`, from `cachetune_vllm.serve.command_line`.
    """

    def __init__(self, words: Sequence[str]):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port: int = taken.getsockname()[1]
        module, *arguments = module_and_words(words)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--host", "127.0.0.1", "--port", str(self.port)],
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise an error if it has ended.

        Raises:
            ServerGoneError: with its exit status.
        """
        status = self._process.poll()
        if status is not None:
            raise ServerGoneError(
                f"the vLLM server of this replica has ended with status {status}: its output is in the log of the replica's process."
            )

    def stop(self) -> None:
        """End it and its own processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            until = time.monotonic() + _STOP_SECONDS
            while self._process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)


def _die_with_parent() -> None:
    """Runs in the new process: it is to end where the actor is killed and can end nothing any more."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
