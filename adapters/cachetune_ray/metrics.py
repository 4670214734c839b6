"""Metrics of all replicas together, for Prometheus: each sample says which replica it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["CONTENT_TYPE_LATEST", "LABEL", "merged"]

LABEL = "replica"


def merged(told: Mapping[str, str]) -> bytes:
    """What several servers answer at `/metrics`, as one answer.

    Args:
        told: by replica, its answer in Prometheus' text format.
    """
    return generate_latest(_All(told))


class _All:
    """Collects as a registry does."""

    def __init__(self, told: Mapping[str, str]):
        self._told = told

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._told.items():
            for family in text_string_to_metric_families(text):
                all_of_it = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    all_of_it.add_sample(sample.name, {**sample.labels, LABEL: replica}, sample.value, sample.timestamp)
        yield from families.values()
