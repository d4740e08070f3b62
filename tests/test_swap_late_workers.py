"""Workers that join after the swap: in the environment before their first task, or gone, and the log says why."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from distributed import Client, WorkerPlugin

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, eventually, places, workers_of

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS

DEATH_TIMEOUT_S = 3
ARRIVAL_S = 10


@pytest.fixture
def cluster(base_venv: Path, tmp_path: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler and one worker, on a host where the environment is built already."""
    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("early")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType, packed: Environment) -> Iterator[Client]:
    """A client that has moved the workers into the environment."""
    with cluster.client(workers=1) as client:
        client.use_environment(packed, scheduler=False)
        yield client


def addresses(client: Client, name: str) -> list[str]:
    workers = workers_of(client)
    return [address for address, info in workers.items() if info["name"] == name]


def test_no_task_of_a_late_worker_runs_outside(client: Client, cluster: Cluster, packed: Environment) -> None:
    """Tasks that only the late worker can run are there before it is, so they start as soon as it may."""

    def prefix(number: int) -> str:
        import sys

        return sys.prefix

    futures = {name: client.map(prefix, range(20), resources={name: 0.01}, pure=False) for name in ("nanny", "bare")}
    cluster.start_worker("nanny", "--resources", "nanny=1")
    cluster.start_worker("bare", "--no-nanny", "--resources", "bare=1")
    for name, waiting in futures.items():
        prefixes = client.gather(waiting)
        assert all(prefix.endswith(packed.id[:16]) for prefix in prefixes), name
    assert places(client)[addresses(client, "bare")[0]].pid == cluster.members["bare"].pid


@pytest.mark.heavy
@pytest.mark.parametrize("options", [(), ("--no-nanny",)], ids=["nanny", "no-nanny"])
def test_an_environment_that_takes_long_to_arrive_holds_up_nobody(
    client: Client, cluster: Cluster, packed: Environment, options: tuple[str, ...], tmp_path: Path
) -> None:
    """Not ``register_plugin``, not other tasks; and ``--death-timeout`` does not count the waiting.

    The late host limits the rate at which it receives, so that the chunks are ten seconds on their way.
    """
    late = Store(tmp_path / "late")
    chunks = set(packed.manifest.chunks)
    there = [path for path in cluster.store("a").glob("chunks/*/*") if path.name.partition(".")[0] in chunks]
    assert len(there) == len(chunks)
    member = cluster.start_worker(
        "late",
        "--death-timeout",
        str(DEATH_TIMEOUT_S),
        "--resources",
        "late=1",
        *options,
        environ={
            "ENVSHIP_STORE": str(late.layout.root),
            "DASK_ENVSHIP__RATE_LIMIT": str(sum(path.stat().st_size for path in there) // ARRIVAL_S),
        },
    )
    waiting = client.submit(_prefix(), resources={"late": 1}, pure=False)
    eventually(lambda: list(late.layout.manifests.iterdir()), "the late worker has heard of the environment")
    started = time.monotonic()
    client.register_plugin(_plugin(), name="meanwhile")
    assert client.submit(_prefix(), workers=["early"], pure=False).result(timeout=30).endswith(packed.id[:16])
    assert late.missing(packed.manifest.chunks), "it is still on its way"
    assert not waiting.done()
    eventually(lambda: not late.missing(packed.manifest.chunks), "all chunks are there")
    assert time.monotonic() - started > 2 * DEATH_TIMEOUT_S, "or the worker's patience was not tried"
    assert member.alive, member.log
    assert waiting.result(timeout=90).endswith(packed.id[:16])
    assert Path(waiting.result()).is_relative_to(late.layout.root)
    assert client.run(_has_mark(), workers=addresses(client, "late")) == {addresses(client, "late")[0]: True}


@pytest.mark.heavy
@pytest.mark.parametrize(("options", "who"), [((), "nanny"), (("--no-nanny",), "worker")], ids=["nanny", "no-nanny"])
def test_a_worker_that_cannot_have_the_environment_leaves_and_says_why(
    client: Client, cluster: Cluster, packed: Environment, options: tuple[str, ...], who: str, tmp_path: Path
) -> None:
    store = tmp_path / "not a folder"
    store.write_text("")
    member = cluster.start_worker(
        "unlucky", "--resources", "unlucky=1", *options, environ={"ENVSHIP_STORE": str(store)}
    )
    waiting = client.submit(_prefix(), resources={"unlucky": 1}, pure=False)
    eventually(lambda: not member.alive, "the worker leaves")
    [line] = [line for line in member.log.splitlines() if " leaves: " in line]
    assert re.search(rf"{who} tcp://\S+ leaves: ", line)
    assert packed.id in line
    assert str(store) in line, "why"
    assert not addresses(client, "unlucky")
    assert not waiting.done()


def test_adaptive_workers_on_a_fresh_host_run_in_the_environment(
    client: Client, cluster: Cluster, packed: Environment, tmp_path: Path
) -> None:
    """Several at once, which share a store: it is fetched and built once."""
    fresh = str(tmp_path / "fresh")
    for number in range(2):
        cluster.start_worker(f"fresh-{number}", "--resources", f"fresh-{number}=1", environ={"ENVSHIP_STORE": fresh})
    prefixes = [client.submit(_prefix(), resources={f"fresh-{number}": 1}, pure=False) for number in range(2)]
    assert {Path(prefix).parent.parent for prefix in client.gather(prefixes)} == {Path(fresh)}


def _prefix():  # type: ignore[no-untyped-def]
    def prefix() -> str:
        import sys

        return sys.prefix

    return prefix


def _has_mark():  # type: ignore[no-untyped-def]
    def has_mark(dask_worker: object) -> bool:
        return getattr(dask_worker, "mark", 0) == 7

    return has_mark


def _plugin() -> WorkerPlugin:
    class Marking(WorkerPlugin):  # type: ignore[misc]
        def setup(self, worker: object) -> None:
            worker.mark = 7  # type: ignore[attr-defined]

    return Marking()
