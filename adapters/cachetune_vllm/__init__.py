"""Reuse of stored chunks inside a vLLM server: a KV connector that a stock `vllm serve` loads by its name.

    vllm serve M --kv-transfer-config '{"kv_connector": "CacheTuneConnector", "kv_connector_module_path": "cachetune_vllm",
        "kv_role": "kv_both", "kv_connector_extra_config": {"store": "kv"}}'

docs/vllm.md says what is reused and what not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachetune_vllm.connector import CacheTuneConnector

__all__ = ["CacheTuneConnector"]


def __getattr__(name: str) -> Any:
    """Load the connector when it is asked for: it needs vLLM, which settings and messages don't."""
    if name != "CacheTuneConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ModuleNotFoundError(
            "cachetune_vllm runs inside vLLM, which isn't installed: pip install 'cachetune-rag[vllm]'", name="vllm"
        ) from error
    from cachetune_vllm.connector import CacheTuneConnector

    return CacheTuneConnector
