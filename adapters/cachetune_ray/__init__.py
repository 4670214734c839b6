"""Precompute on a Ray cluster: documents from Ray Data, an engine in every actor, and KV that goes to the store only.

    import ray
    from cachetune_ray import precompute

    precompute(ray.data.read_parquet("s3://bucket/corpus/"), "model", "s3://bucket/kv")

docs/scale.md says what happens where a worker dies, and how to size a cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachetune_ray.job import RaySummary, precompute
    from cachetune_ray.sources import read_corpus

__all__ = ["RaySummary", "precompute", "read_corpus"]

_FILES = {"precompute": "job", "RaySummary": "job", "read_corpus": "sources"}


def __getattr__(name: str) -> Any:
    """Load what is asked for: it needs Ray, whose import takes seconds."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import ray.data  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pyarrow", "pandas"):
            raise
        raise ModuleNotFoundError(
            f"cachetune_ray needs {error.name}, which isn't installed: pip install 'cachetune-rag[ray]'",
            name=error.name,
        ) from error
    from importlib import import_module

    return getattr(import_module(f"cachetune_ray.{_FILES[name]}"), name)
