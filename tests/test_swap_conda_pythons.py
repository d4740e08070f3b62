"""A cluster that moves between conda environments of unlike Python minor versions, from a real channel."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.errors import IncompatibleEnvironment
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, workers_of
from .prefixes import CHANNEL, NEEDS_CHANNEL, conda_environments

pytestmark = [
    *SWAP_MARKS,
    pytest.mark.heavy,
    pytest.mark.timeout(600),
    NEEDS_CHANNEL,
]

MINORS = ("3.11", "3.13")


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("rattler")
    folder = tmp_path_factory.mktemp("pythons")
    made = {minor: folder / f"env-{minor}" for minor in MINORS}
    for minor, prefix in made.items():
        conda_environments(
            folder / minor, prefix, channel=CHANNEL, specs=(f"python {minor}.*", "distributed", "importlib-metadata")
        )
    return made


@pytest.fixture
def client(base_venv: Path, client_store: Store, tmp_path: Path) -> Iterator[Client]:
    """A client of a cluster with a scheduler of its own, a nanny, and a worker without one."""
    with Cluster(base_venv, tmp_path / "cluster") as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", "--no-nanny", host="b")
        with cluster.client(workers=2) as client:
            yield client


def pythons(client: Client) -> set[str]:
    """Minor versions that the workers run, by their own account and by what runs a task there."""
    status = {worker.python for worker in client.environment_status().workers.values()}
    addresses = list(workers_of(client))
    # A function by its name: byte code cannot be sent to another Python.
    tasks = [client.submit(platform.python_version, workers=[address], pure=False) for address in addresses]
    assert set(client.gather(tasks)) == status
    return {python.rpartition(".")[0] for python in status}


def test_it_moves_from_one_to_another_and_back(client: Client, environments: dict[str, Path]) -> None:
    own = ".".join(map(str, sys.version_info[:2]))
    other = next(prefix for minor, prefix in environments.items() if minor != own)
    assert pythons(client) == {own}
    with pytest.raises(IncompatibleEnvironment, match="ignore_versions"):
        client.use_environment(other)
    assert pythons(client) == {own}
    for minor in ("3.11", "3.13", "3.11"):
        result = client.use_environment(environments[minor], ignore_versions=True)
        assert result.scheduler_swapped
        assert pythons(client) == {minor}
        assert client.submit(sum, [1, 2], pure=False).result(timeout=60) == 3
    client.reset_environment()
    assert pythons(client) == {own}
