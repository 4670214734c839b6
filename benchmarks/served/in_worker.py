"""What vLLM adds to its worker for the phases that look into it (`worker_extension_cls`)."""

from __future__ import annotations

from served.choosing import Watched
from served.host_steps import HostSteps
from served.on_disk import OnDisk
from served.timeline import Traced

IN_WORKER = "served.in_worker.InWorker"
"""Its name, as vLLM wants it."""


class InWorker(HostSteps, Traced, OnDisk, Watched):
    """Notes steps of the host, traces what runs on the GPU, has chunks read from disk, and watches the thread that puts prompts together."""
