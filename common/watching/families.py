"""Prometheus metrics, made one value after the other: a family a name, whose labels are those of its first value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


class Families:
    """Collects values by name. A value that is None, or no number, is left out."""

    def __init__(self) -> None:
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def gauge(self, name: str, help: str, value: Any, /, **labels: str) -> None:
        """A value that goes up and down."""
        self._add(GaugeMetricFamily, name, help, value, labels)

    def counter(self, name: str, help: str, value: Any, /, **labels: str) -> None:
        """A value that only grows; its name in the output ends with "_total"."""
        self._add(CounterMetricFamily, name, help, value, labels)

    def _add(self, kind: _Kind, name: str, help: str, value: Any, labels: Mapping[str, str]) -> None:
        if isinstance(value, int | float):
            if name not in self._families:
                self._families[name] = kind(name, help, labels=list(labels))
            self._families[name].add_metric(list(labels.values()), float(value))

    def all(self) -> Iterable[Metric]:
        """The families, in the order in which they came."""
        return list(self._families.values())
