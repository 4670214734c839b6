"""Lets the scheduler's process rest while it waits for a worker that computes on the same cores.

Where a worker is a process of its own, vLLM's scheduler asks for the end of each step again and again for up to a second before it rests
until it is told. While a prompt is put together and nothing else is computed, steps are shorter than that, so it never rests. On a CPU
it asks on the worker's own cores: it took as much of them as the worker's threads did. vLLM has no option for this.
"""

from __future__ import annotations

import gc
import os

from cachetune_vllm.logs import logger

ASKS_FOR = 0.001
"""Seconds for which the scheduler's process asks for the end of a step before it rests."""

_log = logger(__name__)


def rest_between_steps(worker: int | None) -> None:
    """Make this process rest while it waits for a worker. To be called when vLLM has made its channels to the workers.

    Args:
        worker: number of the worker's process, if it computes on the cores of this one; None if it doesn't.
    """
    if worker is None or worker == os.getpid():
        return
    try:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    except ImportError:
        _log.info(
            "this vLLM waits for its worker in another way than those that were tested: its scheduler may take cores"
        )
        return
    # A connector isn't told of these channels, but they are few among this process's objects.
    for each in gc.get_objects():
        if type(each) is SpinCondition and each.is_reader:
            each.busy_loop_s = ASKS_FOR
