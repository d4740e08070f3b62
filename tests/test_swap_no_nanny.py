"""Workers without a nanny: re-executed in place, with the same PID and the same arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client

from .cluster import PRELOAD, SWAP_MARKS, Cluster, client_in_base, places, workers_of

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """Two workers without a nanny, one of which has much to remember."""
    with Cluster(base_venv, lab / "no-nanny", stores=warm_stores) as cluster:
        preload = cluster.folder / "preload.py"
        preload.write_text(PRELOAD)
        cluster.start_scheduler()
        cluster.start_worker("plain", "--no-nanny", host="a")
        cluster.start_worker(
            "told", "--no-nanny", "--nthreads", "3", "--resources", "GPU=2", "--memory-limit", "512MiB",
            "--lifetime", "1 hour", "--preload", str(preload), host="b",
            environ={"MY_VARIABLE": "with spaces and = signs"},
        )  # fmt: skip
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster in its base environment."""
    with client_in_base(cluster) as client:
        yield client


def test_the_process_stays_and_runs_in_the_environment(client: Client, cluster: Cluster, packed: Environment) -> None:
    result = client.use_environment(packed, scheduler=False)
    assert result.workers == 2
    after = places(client)
    assert {place.pid for place in after.values()} == {cluster.members["plain"].pid, cluster.members["told"].pid}
    assert all(place.prefix.endswith(packed.id[:16]) for place in after.values())
    assert {process.environment_id for process in client.environment_status().workers.values()} == {packed.id}


def test_arguments_and_variables_are_kept(client: Client, cluster: Cluster, packed: Environment) -> None:
    client.use_environment(packed, scheduler=False)
    workers = {info["name"]: info for info in workers_of(client).values()}
    assert set(workers) == {"plain", "told"}
    assert workers["told"]["nthreads"] == 3
    assert workers["told"]["resources"] == {"GPU": 2}
    assert workers["told"]["memory_limit"] == 512 << 20
    assert workers["told"]["local_directory"].startswith(str(cluster.scratch("told")))
    variables = [place.environ["MY_VARIABLE"] for place in places(client).values() if "MY_VARIABLE" in place.environ]
    assert variables == ["with spaces and = signs"]
    [preloaded] = cluster.scratch("told").rglob("preloaded")
    assert preloaded.read_text() == str(cluster.store("b") / "envs" / packed.id[:16])


@pytest.mark.heavy
def test_a_lifetime_goes_on_and_does_not_begin_anew(client: Client, cluster: Cluster, packed: Environment) -> None:
    """It counts from the start of the process, which is the job's; each swap gives its worker what is left."""

    def left(dask_worker: object) -> float:
        return dask_worker.lifetime or 0.0  # type: ignore[attr-defined,no-any-return]

    lefts = [max(client.run(left).values())]
    for target in (packed, None):
        if target is None:
            client.reset_environment()
        else:
            client.use_environment(target, scheduler=False)
        lefts.append(max(client.run(left).values()))
    assert lefts[0] <= 3600
    assert lefts == sorted(lefts, reverse=True)
    assert 3000 < lefts[2] < lefts[1] < lefts[0]


@pytest.mark.heavy
def test_tasks_run_in_the_environment_afterwards(client: Client, packed: Environment, onlyhere: ModuleType) -> None:
    """With a function that the scheduler need not import: it stays in the base environment here."""

    def compute(x: int) -> int:
        import onlyhere

        return int(onlyhere.f(x))

    futures = client.map(compute, range(4), pure=False)
    with pytest.raises(ModuleNotFoundError):
        client.gather(futures)
    client.use_environment(packed, scheduler=False)
    assert client.gather(client.map(compute, range(4), pure=False)) == [41, 42, 43, 44]


@pytest.mark.heavy
def test_there_and_back_with_the_same_process(client: Client, base_venv: Path, packed: Environment) -> None:
    pids = {place.pid for place in places(client).values()}
    for _ in range(2):
        client.use_environment(packed, scheduler=False)
        client.reset_environment()
    after = places(client)
    assert {place.pid for place in after.values()} == pids
    assert {place.prefix for place in after.values()} == {str(base_venv)}
