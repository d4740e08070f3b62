"""Counters for Dask's Prometheus endpoint: what moved between hosts, and how swaps ended.

They stand among Dask's own at ``/metrics`` of the scheduler's dashboard, where ``prometheus_client`` is installed;
otherwise there is nothing here to see. The figures are those of `worker_bootstrap.ledger`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask

from worker_bootstrap.ledger import CLIENT, SHARED, Ledger
from worker_bootstrap.swap_queue import SwapQueue

_KINDS = {CLIENT: "client", SHARED: "shared_file"}


class _Collector:
    """Looked at by ``prometheus_client`` whenever somebody asks; one for the process, as it registers names once."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.queue: SwapQueue | None = None
        self.registered = False

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        received = CounterMetricFamily(
            _name("received_bytes"), "Bytes of chunks that a host received, by where from", labels=["host", "source"]
        )
        served = CounterMetricFamily(
            _name("served_bytes"), "Bytes of chunks that a host gave to others", labels=["host"]
        )
        failures = CounterMetricFamily(
            _name("failed_batches"), "Batches that a host asked for and did not get", labels=["host"]
        )
        rate = GaugeMetricFamily(_name("receive_rate"), "Bytes a second that a host receives now", labels=["host"])
        for host_id, account in sorted(self.ledger.hosts.items() if self.ledger else ()):
            # Sources by kind: a counter for each pair of hosts would be a million for a thousand hosts.
            kinds: dict[str, int] = {}
            for source, size_bytes in account.received.items():
                kind = _KINDS.get(source, "peer")
                kinds[kind] = kinds.get(kind, 0) + size_bytes
            for kind, size_bytes in kinds.items():
                received.add_metric([host_id, kind], size_bytes)
            served.add_metric([host_id], account.served_bytes)
            failures.add_metric([host_id], sum(account.failures.values()))
            rate.add_metric([host_id], self.ledger.rate(host_id) if self.ledger else 0.0)
        yield from (received, served, failures, rate)
        swaps = CounterMetricFamily(_name("swaps"), "Swaps and stagings that ended", labels=["kind", "outcome"])
        for (kind, outcome), count in sorted(self.queue.outcomes.items() if self.queue else ()):
            swaps.add_metric([kind, outcome], count)
        yield swaps


_COLLECTOR = _Collector()


def publish(ledger: Ledger, queue: SwapQueue) -> None:
    """Show these from now on, instead of those of an earlier scheduler in this process. Idempotent."""
    _COLLECTOR.ledger, _COLLECTOR.queue = ledger, queue
    if _COLLECTOR.registered:
        return
    try:
        import prometheus_client
    except ImportError:
        return
    prometheus_client.REGISTRY.register(_COLLECTOR)
    _COLLECTOR.registered = True


def _name(what: str) -> str:
    return f"{dask.config.get('distributed.dashboard.prometheus.namespace', default='dask')}_envship_{what}"
