"""Sites of a real cluster: named by the client's patterns and by the machines themselves, and crossed once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import dask
import pytest
from distributed import Client

import envship  # noqa: F401  # adds the methods to Client
from envship.environment import Environment
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, eventually, workers_of
from .environments import environment_of, package_of

pytestmark = SWAP_MARKS
SITES = {"zurich": ("b", "c"), "bern": ("d", "e")}
"""The scheduler's host, "a", is named by nobody, and so is a site of its own."""
PATTERNS = {"zurich": ["b", "c"], "bern/rack-1": ["rack-one"]}
SIZE_BYTES = 8 << 20


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path) -> Iterator[Cluster]:
    with Cluster(base_venv, lab / "sites") as cluster:
        cluster.start_scheduler()
        for host in SITES["zurich"]:
            cluster.start_worker(host, "--no-nanny", host=host)
        cluster.start_worker("d", "--no-nanny", "--resources", "rack-one=1", host="d")
        cluster.start_worker("e", host="e", environ={"DASK_ENVSHIP__TOPOLOGY": "bern/rack-2"})
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.client(workers=4) as client:
        yield client


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    store = Store(tmp_path / "client")
    package = package_of(store, {"lib/data": os.urandom(SIZE_BYTES)}, chunk_bytes=100_000)
    return Environment(environment_of(store, [package]), store)


def brought_in(client: Client, ids: Sequence[str]) -> int:
    """Bytes that the hosts *ids* have received from anywhere else."""
    hosts = client.environment_status().hosts
    return sum(size for host_id in ids for source, size in hosts[host_id].received.items() if source not in ids)


def test_each_chunk_comes_into_a_site_once(cluster: Cluster, client: Client, environment: Environment) -> None:
    """By worker names, by a resource, and by a machine's own word."""
    ids = {site: [Store(cluster.store(host)).host_id for host in hosts] for site, hosts in SITES.items()}
    with dask.config.set({"envship.topology": PATTERNS}):
        result = client.stage_environment(environment)
    assert result.uploaded_chunks == len(environment.chunks)
    assert {site: brought_in(client, members) for site, members in ids.items()} == dict.fromkeys(
        SITES, result.uploaded_bytes
    )


@pytest.mark.heavy
def test_what_moves_is_seen_while_it_moves(cluster: Cluster, client: Client, environment: Environment) -> None:
    """The limit is the client's, and each host keeps it, in both directions."""
    with dask.config.set({"envship.rate-limit": "4 MB"}):
        staging = threading.Thread(target=client.stage_environment, args=[environment], daemon=True)
        staging.start()

        def moving() -> bool:
            return all(host.rate > 0 for host in client.environment_status().hosts.values())

        eventually(moving, "every host receives something")
        staging.join()

    def limits(dask_worker: object) -> list[float]:
        agent = dask_worker.plugins["envship-worker-agent"].agent  # type: ignore[attr-defined]
        return [agent.provision.sending.rate, agent.provision.receiving.rate]

    named = {worker["name"]: address for address, worker in workers_of(client).items()}
    without_nanny = [named[host] for host in ("b", "c", "d")]
    assert client.run(limits, workers=without_nanny) == {address: [4e6, 4e6] for address in without_nanny}
    hosts = client.environment_status().hosts.values()
    received_from_hosts = sum(sum(host.received.values()) - host.received.get("client", 0) for host in hosts)
    assert sum(host.served_bytes for host in hosts) == received_from_hosts > 0
