"""What a client brings into a cluster, and what becomes of the cluster's waiting if it cannot."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import envship  # noqa: F401  # adds the methods to Client
from envship.environment import Environment
from envship.road import Road
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import ChunkMissing, EnvironmentMissing
from worker_bootstrap.store import Store

from .environments import environment_of, package_of

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of the cluster's only host."""
    return Store(tmp_path_factory.mktemp("seeding") / "host")


@pytest.fixture(scope="module")
def client(host: Store) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENVSHIP_STORE", str(host.layout.root))
        with (
            LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            yield client


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment in a store that the cluster does not see."""
    store = Store(tmp_path / "client")
    package = package_of(store, {"lib/data": os.urandom(1 << 20)}, chunk_bytes=100_000)
    return Environment(environment_of(store, [package]), store)


def lose(environment: Environment, digest: Digest) -> None:
    path, _ = next(iter(environment.store._candidates(digest)))
    path.unlink()


def test_a_chunk_that_the_client_lost_is_named_and_no_later_staging_waits_for_it(
    client: Client, host: Store, environment: Environment, tmp_path: Path
) -> None:
    """Hosts that were told to wait for it do not, and what has arrived is not sent again."""
    lost = environment.manifest.packages[0].chunks[3].digest
    data = environment.store.read_chunk(lost)
    lose(environment, lost)
    with pytest.raises(ChunkMissing) as caught:
        client.stage_environment(environment, progress=False)
    assert caught.value.digest == lost
    assert host.built(environment.id) is None

    other = Store(tmp_path / "other")
    package = package_of(other, {"lib/data": os.urandom(1 << 19)}, chunk_bytes=100_000)
    another = Environment(environment_of(other, [package]), other)
    client.stage_environment(another, progress=False)
    assert host.built(another.id) is not None

    environment.store.write_chunk(data)
    there = len(environment.chunks) - len(host.missing(environment.chunks))
    result = client.stage_environment(environment, progress=False)
    assert result.uploaded_chunks == len(environment.chunks) - there
    assert host.built(environment.id) is not None


def test_agents_that_cannot_be_reached_get_their_chunks_by_way_of_the_scheduler(
    client: Client, host: Store, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each attempt to connect had failed; a real firewall is in `test_spread_network`."""

    async def explore(road: Road, addresses: Collection[str]) -> None:
        road._reached.update(dict.fromkeys(addresses, False))

    monkeypatch.setattr(Road, "explore", explore)
    result = client.stage_environment(environment, progress=False)
    assert result.uploaded_chunks == len(environment.chunks)
    assert host.built(environment.id) is not None


def test_an_id_of_which_the_cluster_lacks_chunks_is_an_error_at_once(
    client: Client, host: Store, environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSHIP_STORE", str(tmp_path / "own"))
    host.write_manifest(environment.manifest)
    with pytest.raises(EnvironmentMissing):
        client.stage_environment(environment.id, progress=False)
