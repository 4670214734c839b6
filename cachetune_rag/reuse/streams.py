"""The CUDA streams on which rows are loaded, the events by which they and the stream that computes wait for each other, and the memory between them."""

from __future__ import annotations

import torch

from cachetune_rag.reuse.staging import Staging


class Streams:
    """The streams and events beside the stream that computes, and the memory that rows are staged in. Made once, and used by one request after another."""

    def __init__(self, device: torch.device, layers: int):
        # A few programs copy single rows on it. They should not wait until a large kernel leaves a multiprocessor.
        self.copy = torch.cuda.Stream(device, priority=-1)
        # Placing rows is short, and the computation waits for it: it goes before all other work that is ready to run.
        self.place = torch.cuda.Stream(device, priority=-1)
        self.copied = [torch.cuda.Event() for _ in range(layers)]
        self.brought = torch.cuda.Event()
        self.prepared = torch.cuda.Event()
        self.narrowed = torch.cuda.Event()
        self.placed = [torch.cuda.Event() for _ in range(layers)]
        # Recorded on the stream that computes, before and after its wait for a layer.
        self.asked = [torch.cuda.Event(enable_timing=True) for _ in range(layers)]
        self.given = [torch.cuda.Event(enable_timing=True) for _ in range(layers)]
        self.staging = Staging(device, self.copy, self.place)
