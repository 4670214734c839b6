"""Where the connector's log lines go."""

from __future__ import annotations

import logging


def logger(module: str) -> logging.Logger:
    """A module's logger, below vLLM's own: so vLLM shows its lines among its own, in their form and from the level that it is set to."""
    return logging.getLogger(f"vllm.{module}")
