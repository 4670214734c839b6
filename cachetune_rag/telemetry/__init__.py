"""Watching an engine: observers, Prometheus metrics, OpenTelemetry spans. Nothing here sees a text."""

from cachetune_rag.telemetry.observer import Observers, RequestObserver

__all__ = ["Observers", "RequestObserver"]
