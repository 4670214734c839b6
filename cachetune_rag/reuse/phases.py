"""Measures how long a forward with reuse loaded rows, computed, and was being queued."""

from __future__ import annotations

import time

import torch

from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.device_loader import DeviceLoader
from cachetune_rag.reuse.layer_loader import LayerLoader


class ForwardPhases:
    """Measures one forward, from the moment this object is made until the device is done after `finish`.

    With the CUDA kernels, CUDA events measure it: each costs the device a microsecond, and the host waits for none. Elsewhere the host's
    clock does.

    Attributes:
        end: recorded on the device by `finish`, behind the whole forward; None where the host's clock measures.
    """

    def __init__(self, adapter: ModelAdapter, loader: LayerLoader):
        self._adapter, self._loader = adapter, loader
        self._started, self._loaded = time.perf_counter(), loader.seconds
        self.end: torch.cuda.Event | None = None

    def finish(self) -> None:
        """The whole forward is queued."""
        if isinstance(self._loader, DeviceLoader):
            self.end = torch.cuda.Event(enable_timing=True)
            self.end.record()

    def timings(self, ended: float) -> dict[str, float]:
        """Seconds by phase (see `Report.timings`), once the device is done.

        Args:
            ended: when the host knew that the device was done, by `time.perf_counter`.
        """
        took, loader = ended - self._started, self._loader
        began = None if self._adapter.device_forward is None else self._adapter.device_forward.began
        if not isinstance(loader, DeviceLoader) or self.end is None or began is None:
            load = loader.seconds - self._loaded
            return {"load": load, "compute": took - load}
        load, busy = loader.waited(), began.elapsed_time(self.end) / 1e3
        return {"load": load, "compute": busy - load, "launch": took - busy}
