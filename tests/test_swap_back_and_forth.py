"""What a notebook does all day: there, back, elsewhere, back again; idle and under load; other Pythons."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import IncompatibleEnvironment
from worker_bootstrap.store import Store

from .cluster import DASK_VERSIONS, ONLYHERE, SWAP_MARKS, Cluster, client_in_base, eventually, places, variant
from .interpreters import makes_venvs, other_minors

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS

OTHERS = {minor: python for minor, python in other_minors().items() if minor >= 10 and makes_venvs(python)}
"""Interpreters that the client's version of Dask runs on."""
RESERVE = 2
"""Connections that a pool of Dask's may have in reserve, or not, to each peer; what many turns leave behind is more."""


class InUse(NamedTuple):
    """What a process holds."""

    descriptors: int
    children: int


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler that allows no failure of a task, and two workers on two hosts."""
    strict = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with Cluster(base_venv, lab / "back-and-forth", stores=warm_stores, environ=strict) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster in its base environment."""
    with client_in_base(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def other(packed: Environment, client_store: Store) -> EnvironmentId:
    """The packed environment with one module more."""
    return variant(client_store, packed.manifest, {"{site}/another.py": b"VALUE = 7\n"})


@pytest.mark.heavy
@pytest.mark.parametrize("turns", [2, 5])
def test_there_and_back_many_times(
    client: Client,
    cluster: Cluster,
    base_venv: Path,
    packed: Environment,
    other: EnvironmentId,
    onlyhere: ModuleType,
    turns: int,
) -> None:
    """A → B → A → base, again and again, with the scheduler; after the first turn nothing is uploaded, nor grows."""

    def value() -> int:
        import another

        return int(another.VALUE)

    in_use: list[dict[str, InUse]] = []
    for turn in range(turns):
        for target in (packed.id, other, packed.id, None):
            result = client.reset_environment() if target is None else client.use_environment(target)
            assert result.environment_id == target
            ends = str(base_venv) if target is None else target[:16]
            assert all(place.prefix.endswith(ends) for place in places(client).values())
            if target is not None:
                assert client.submit(onlyhere.f, 1, pure=False).result(timeout=30) == 42
            if target == other:
                assert client.submit(value, pure=False).result(timeout=30) == 7
            assert turn == 0 or result.uploaded_bytes == 0
        eventually(lambda: _warm(client) == {(packed.id,)}, "each host keeps what it left last")
        in_use.append(_in_use(cluster))

    peers = {"scheduler": 2}  # the nannies; what else a process talks to is the scheduler alone

    def no_more() -> bool:
        now = _in_use(cluster)
        return all(
            now[name].descriptors <= before.descriptors + RESERVE * peers.get(name, 1)
            and now[name].children <= before.children
            for name, before in in_use[0].items()
        )

    eventually(no_more, f"no process has more descriptors and children than after the first turn: {in_use}")


def _warm(client: Client) -> set[tuple[str, ...]]:
    """What the hosts that have nannies keep warm."""
    return {host.warm for host in client.environment_status().hosts.values() if host.built}


def _in_use(cluster: Cluster) -> dict[str, InUse]:
    """Of each process that stays: client, scheduler, nannies."""
    stay = {"client": os.getpid(), **{name: member.pid for name, member in cluster.members.items()}}
    processes = {name: psutil.Process(pid) for name, pid in stay.items()}
    return {name: InUse(process.num_fds(), len(process.children())) for name, process in processes.items()}


@pytest.mark.heavy
def test_a_small_change_uploads_about_what_changed(client: Client, packed: Environment, client_store: Store) -> None:
    client.stage_environment(packed)
    changed = variant(client_store, packed.manifest, {"{site}/fresh.py": os.urandom(1000).hex().encode()})
    result = client.stage_environment(changed)
    assert result.uploaded_chunks == 2, "the file and its listing"
    assert result.uploaded_bytes < 5000


def test_tasks_survive_swaps_under_load(
    client: Client, packed: Environment, other: EnvironmentId, cluster: Cluster
) -> None:
    """Even where Dask allows no task to lose its worker: a swap is not a task's fault."""

    def work(number: int) -> tuple[int, str]:
        import time

        time.sleep(0.05)
        return number, sys.prefix

    futures = client.map(work, range(150), pure=False)
    for target in (packed.id, other, packed.id):
        client.use_environment(target, scheduler=False)
    results = client.gather(futures)
    assert [number for number, _ in results] == list(range(150))


@pytest.mark.heavy
def test_environments_left_behind_stay_warm(client: Client, packed: Environment, other: EnvironmentId) -> None:
    client.use_environment(packed, scheduler=False)
    client.use_environment(other, scheduler=False)

    def warm() -> bool:
        hosts = client.environment_status().hosts.values()
        return all(host.warm == (packed.id,) for host in hosts if host.built)

    eventually(warm, "each host keeps what it left last, and nothing else")
    before = {place.pid for place in places(client).values()}
    client.use_environment(packed, scheduler=False)
    assert before.isdisjoint(place.pid for place in places(client).values())


@pytest.mark.heavy
@pytest.mark.skipif(not OTHERS, reason="no other Python that Dask's packages are made for is here")
@pytest.mark.parametrize("minor", OTHERS)
def test_between_python_versions(
    client: Client, cluster: Cluster, client_store: Store, tmp_path: Path, onlyhere: ModuleType, minor: int
) -> None:
    """Refused, because functions pickled by another Python kill workers; possible for who says so."""
    from envship.pack import pack

    prefix = tmp_path / "other"
    subprocess.run([OTHERS[minor], "-m", "venv", str(prefix)], check=True)
    subprocess.run([str(prefix / "bin" / "pip"), "install", "-q", *DASK_VERSIONS], check=True)
    [site] = prefix.glob("lib/python*/site-packages")
    (site / "onlyhere.py").write_text(ONLYHERE)
    environment = pack(prefix, store=client_store)
    with pytest.raises(IncompatibleEnvironment, match="python"):
        client.use_environment(environment)
    client.use_environment(environment, ignore_versions=True)
    assert client.submit(onlyhere.where, pure=False).result(timeout=60).endswith(environment.id[:16])
    versions = {process.python.rsplit(".", 1)[0] for process in client.environment_status().workers.values()}
    assert versions == {f"3.{minor}"}
