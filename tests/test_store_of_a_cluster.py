"""The store under a real cluster: what workers run from is not evicted, and what is damaged comes back from peers."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import dask
import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.evict import Freed, collect
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files

from .cluster import SWAP_MARKS, Cluster, eventually, places, workers_of
from .gates import gated

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = [*SWAP_MARKS, pytest.mark.heavy]


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path) -> Iterator[Cluster]:
    """A scheduler on a host, a worker with a nanny and one without on another, stores of their own for both."""
    with Cluster(base_venv, lab / "evict") as cluster:
        cluster.start_scheduler()
        cluster.start_worker("nanny", host="a")
        cluster.start_worker("plain", "--no-nanny", host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    with cluster.client(workers=2) as client, dask.config.set({"envship.keep-warm": 0}):
        yield client
        client.reset_environment()
        cluster.wait_for_workers(client, 2)


def evicted(store: Store) -> Freed:
    return collect(store, 0, grace_s=0)


def test_what_workers_run_from_stays_until_they_leave(client: Client, cluster: Cluster, packed: Environment) -> None:
    """Under a nanny, and across the exec of a worker without one and of the scheduler."""
    stores = [Store(cluster.store(host)) for host in "ab"]
    client.use_environment(packed)
    for store in stores:
        freed = evicted(store)
        assert freed.evicted == ()
        assert [(kept.environment_id, kept.reason) for kept in freed.kept] == [(packed.id, "a process runs from it")]
        assert list(damaged_files(store, packed.id)) == []
    assert {Path(place.prefix).name for place in places(client).values()} == {packed.id[:16]}
    client.reset_environment()
    cluster.wait_for_workers(client, 2)
    for store in stores:
        eventually(lambda store=store: evicted(store).evicted, "nobody runs from it any more")  # type: ignore[misc]
        assert store.built(EnvironmentId(packed.id)) is None
        assert list(store.layout.chunks.glob("*/*")) == []
    assert client.use_environment(packed).uploaded_chunks == len(packed.chunks)


@pytest.mark.parametrize("operation", ["envship_prepare", "envship_commit"])
def test_an_eviction_in_the_middle_of_a_swap_takes_nothing(
    client: Client, cluster: Cluster, packed: Environment, operation: str
) -> None:
    """Before a process of the environment has started, and, without a nanny, after what proved it has ended."""
    gate = cluster.folder / operation
    gate.mkdir()
    stores = [Store(cluster.store(host)) for host in "ab"]
    client.stage_environment(packed)  # with it come the agents
    workers = workers_of(client)
    nannies = [address for address, info in workers.items() if info["nanny"]]
    install = gated(operation, str(gate))
    client.run(install, workers=nannies, nanny=True)
    client.run(install, workers=[address for address in workers if address not in nannies])
    swap = threading.Thread(target=client.use_environment, args=[packed])
    swap.start()
    try:
        eventually(lambda: len(list(gate.iterdir())) == 2, "both agents wait")
        for store in stores:
            freed = evicted(store)
            assert freed.evicted == ()
            assert [each.reason for each in freed.kept] == ["a process runs from it"]
    finally:
        (gate / "open").touch()
        swap.join()
    assert {Path(place.prefix).name for place in places(client).values()} == {packed.id[:16]}
    client.reset_environment()
    cluster.wait_for_workers(client, 2)
    for store in stores:
        eventually(lambda store=store: evicted(store).evicted, "nobody runs from it any more")  # type: ignore[misc]


def test_a_damaged_environment_is_mended_when_it_is_used_with_chunks_of_a_peer(
    client: Client, cluster: Cluster, packed: Environment
) -> None:
    client.use_environment(packed, scheduler=False)
    client.reset_environment()
    cluster.wait_for_workers(client, 2)
    store = Store(cluster.store("b"))
    prefix = store.built(packed.id)
    assert prefix is not None
    victim = next(prefix.glob("lib/python*/site-packages/onlyhere.py"))
    victim.unlink()  # replaced: an edit in place is found where the quick look happens to look
    victim.write_text("raise ImportError('edited')")
    for path in store.layout.chunks.glob("*/*"):
        path.unlink()
    result = client.use_environment(packed, scheduler=False)
    assert result.uploaded_bytes == 0
    assert sound_prefix(store, packed.id) == prefix
    assert "edited" not in victim.read_text()
    assert list(damaged_files(store, packed.id)) == []


def remove(store: Path) -> None:
    """Renamed first: a process that is about to leave something there must not keep it."""
    aside = store.rename(store.with_name(f"{store.name}-{uuid.uuid4().hex}"))
    shutil.rmtree(aside, ignore_errors=True)


@pytest.mark.parametrize("where", ["in the base environment", "in what is removed"])
def test_a_store_that_somebody_removed_is_made_again(
    client: Client, cluster: Cluster, packed: Environment, where: str
) -> None:
    """As whoever needs room does, while agents live that have known it for long."""
    client.use_environment(packed)
    if where == "in the base environment":
        client.reset_environment()
        cluster.wait_for_workers(client, 2)
    hosts = {host: Store(cluster.store(host)).host_id for host in "ab"}
    for host in hosts:
        remove(cluster.store(host))
    client.reset_environment()
    cluster.wait_for_workers(client, 2)
    assert client.use_environment(packed).uploaded_chunks == len(packed.chunks)
    assert {Path(place.prefix).name for place in places(client).values()} == {packed.id[:16]}
    for host, host_id in hosts.items():
        store = Store(cluster.store(host))
        assert store.host_id == host_id
        assert list(damaged_files(store, packed.id)) == []
