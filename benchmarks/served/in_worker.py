"""What vLLM adds to its worker for the phases that look into it (`worker_extension_cls`)."""

from __future__ import annotations

from served.host_steps import HostSteps
from served.timeline import Traced


class InWorker(HostSteps, Traced):
    """Notes steps of the host, and traces what runs on the GPU."""
