"""Counters at ``/metrics`` of the scheduler, and the event log of what a spread went through."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import envship  # noqa: F401  # adds the methods to Client
from envship.environment import Environment
from worker_bootstrap.ledger import Ledger
from worker_bootstrap.metrics import _Collector
from worker_bootstrap.store import Store

from .environments import environment_of, package_of

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def test_what_hosts_gave_and_did_not_get_is_counted_by_host() -> None:
    """Sources by their kind: a counter for each pair of hosts would be a million for a thousand hosts."""
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    collector = _Collector()
    collector.ledger = Ledger(lambda: 0.0)
    for source, size_bytes in (("a", 100), ("b", 50), ("client", 7), ("shared file", 3)):
        collector.ledger.moved("c", source, size_bytes)
    collector.ledger.failed("c", "a", "it was silent", blame=True)
    registry.register(collector)

    def value(what: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"dask_envship_{what}", labels)

    kinds = ("peer", "client", "shared_file")
    assert [value("received_bytes_total", host="c", source=kind) for kind in kinds] == [150, 7, 3]
    assert [value("served_bytes_total", host=host) for host in ("a", "b", "c")] == [100, 50, 0]
    assert [value("failed_batches_total", host=host) for host in ("a", "b", "c")] == [0, 0, 1]
    assert value("receive_rate", host="c") == 160


def test_a_staging_leaves_counters_and_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler and its workers share this machine's store; the client brings from another one."""
    pytest.importorskip("prometheus_client")
    monkeypatch.setenv("ENVSHIP_STORE", str(tmp_path / "host"))
    store = Store(tmp_path / "client")
    package = package_of(store, {"lib/data": os.urandom(1 << 20)}, chunk_bytes=100_000)
    environment = Environment(environment_of(store, [package]), store)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        result = client.stage_environment(environment, progress=False)
        stages = [event["stage"] for _, event in client.get_events("envship")]
        port = cluster.scheduler.http_server.port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    host_id = Store(tmp_path / "host").host_id
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("dask_envship_"))
    labels = f'{{host="{host_id}",source="client"}}'
    assert float(values[f"dask_envship_received_bytes_total{labels}"]) == result.uploaded_bytes > 0
    assert float(values['dask_envship_swaps_total{kind="staging",outcome="done"}']) == 1
    assert [stage for stage in stages if not stage.startswith("host")] == ["offer", "prepare", "done"]
    assert stages.count("host ready") == 1
