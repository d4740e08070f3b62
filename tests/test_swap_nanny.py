"""Workers under a nanny: the worker moves, the nanny stays, and everything it was told stays, too."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from distributed import Client
from distributed.diagnostics.plugin import Environ

import envship  # noqa: F401  adds the methods to the client
from envship.journey import Journey
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import IncompatibleEnvironment
from worker_bootstrap.store import Store

from .cluster import PRELOAD, SWAP_MARKS, Cluster, client_in_base, eventually, places, variant, workers_of

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler that stays, and two workers on two hosts."""
    with Cluster(base_venv, lab / "nanny", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", host="b", environ={"MY_VARIABLE": "mine"})
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster in its base environment."""
    with client_in_base(cluster) as client:
        yield client


def moved(client: Client, environment: Environment) -> None:
    """Check that every worker runs in *environment*, by what it says itself and by what the status says."""
    for address, place in places(client).items():
        assert place.prefix.endswith(environment.id[:16]), address
    for process in client.environment_status().workers.values():
        assert process.environment_id == environment.id


def test_the_workers_move_and_their_nannies_stay(client: Client, cluster: Cluster, packed: Environment) -> None:
    before = places(client)
    result = client.use_environment(packed, scheduler=False)
    after = places(client)
    moved(client, packed)
    assert result.environment_id == packed.id
    assert result.previous_id is None
    assert result.workers == 2
    assert result.hosts == 2
    assert not result.scheduler_swapped
    assert {place.pid for place in after.values()}.isdisjoint(place.pid for place in before.values())
    assert all(member.alive for member in cluster.members.values())
    for name, host in (("w1", "a"), ("w2", "b")):
        [prefix] = [p.prefix for p in after.values() if p.environ["ENVSHIP_STORE"] == str(cluster.store(host))]
        assert Path(prefix).is_relative_to(cluster.store(host)), name


def test_the_second_time_nothing_moves(client: Client, packed: Environment) -> None:
    client.use_environment(packed, scheduler=False)
    before = places(client)
    result = client.use_environment(packed, scheduler=False)
    assert not result.changed
    assert result.uploaded_bytes == 0
    assert {address: place.pid for address, place in places(client).items()} == {
        address: place.pid for address, place in before.items()
    }


def test_an_environment_can_be_named_by_its_id(client: Client, packed: Environment) -> None:
    client.use_environment(packed.id, scheduler=False)
    moved(client, packed)


def test_a_restart_by_the_client_stays_in_the_environment(client: Client, packed: Environment) -> None:
    client.use_environment(packed, scheduler=False)
    before = {place.pid for place in places(client).values()}
    client.restart()
    moved(client, packed)
    assert before.isdisjoint(place.pid for place in places(client).values())


def test_a_worker_that_is_killed_comes_back_in_the_environment(
    client: Client, cluster: Cluster, packed: Environment
) -> None:
    client.use_environment(packed, scheduler=False)
    address, victim = min(places(client).items())
    os.kill(victim.pid, signal.SIGKILL)
    eventually(lambda: address not in workers_of(client), "the killed worker leaves")
    cluster.wait_for_workers(client, 2)
    moved(client, packed)


def children_in(cluster: Cluster, environment_id: EnvironmentId) -> set[int]:
    """Processes of the nannies, workers or not, that run in an environment."""
    found = set()
    for name in ("w1", "w2"):
        for child in psutil.Process(cluster.members[name].pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("ENVSHIP_ENVIRONMENT") == environment_id:
                    found.add(child.pid)
    return found


@pytest.fixture
def staged(client: Client, client_store: Store, packed: Environment) -> EnvironmentId:
    """An environment that is built on both hosts, and where nobody has been."""
    made = variant(client_store, packed.manifest, {"{site}/expected.txt": os.urandom(8)})
    client.stage_environment(made)
    return made


@pytest.mark.heavy
def test_hosts_start_what_they_are_told_to_expect_and_move_into_just_that(
    client: Client, cluster: Cluster, staged: EnvironmentId
) -> None:
    client.sync(client.scheduler.envship_expect, environment_id=staged, start_timeout_s=60.0)
    eventually(lambda: len(children_in(cluster, staged)) == 2, "both hosts start one")
    started = children_in(cluster, staged)
    client.use_environment(staged, scheduler=False)
    assert {place.pid for place in places(client).values()} == started


@pytest.mark.heavy
def test_while_the_client_looks_what_has_changed_hosts_start_what_it_was_last_time(
    client: Client, staged: EnvironmentId, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recorded(monkeypatch)
    client.use_environment(staged, scheduler=False)
    assert asked.index(("envship_expect", staged)) < asked.index(("envship_use", staged))


@pytest.mark.heavy
def test_what_was_expected_ends_when_it_is_not_to_be_used(
    client: Client, cluster: Cluster, staged: EnvironmentId, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.sync(client.scheduler.envship_expect, environment_id=staged, start_timeout_s=60.0)
    eventually(lambda: len(children_in(cluster, staged)) == 2, "both hosts start one")
    asked = recorded(monkeypatch)
    monkeypatch.setattr("envship.client.platform.python_version", lambda: "3.0.0")
    with pytest.raises(IncompatibleEnvironment):
        client.use_environment(staged, scheduler=False)
    assert asked[-1] == ("envship_expect", None)
    eventually(lambda: not children_in(cluster, staged), "nobody waits for it any more")
    monkeypatch.undo()
    client.use_environment(staged, scheduler=False)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What clients of this process ask coordinators for from now on, and of which environment."""
    asked: list[tuple[str, Any]] = []
    ask = Journey.ask

    async def noted(journey: Journey, operation: str, **arguments: Any) -> Any:
        if "environment_id" in arguments:
            asked.append((operation, arguments["environment_id"]))
        return await ask(journey, operation, **arguments)

    monkeypatch.setattr(Journey, "ask", noted)
    return asked


def a_file(store: Store, environment: Environment) -> Path:
    prefix = store.built(environment.id)
    assert prefix is not None
    return next(prefix.rglob("onlyhere.py"))


def the_manifest(store: Store, environment: Environment) -> Path:
    return store.layout.manifest(environment.id)


@pytest.mark.heavy
@pytest.mark.parametrize("victim", [a_file, the_manifest])
def test_what_was_damaged_under_a_worker_is_mended_before_it_starts_again(
    client: Client, cluster: Cluster, packed: Environment, victim: Callable[[Store, Environment], Path]
) -> None:
    """From what the host has, or from the other hosts."""
    client.use_environment(packed, scheduler=False)
    store = Store(cluster.store("b"))
    path = victim(store, packed)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(b"damaged")
    address, place = next((a, p) for a, p in places(client).items() if p.prefix.startswith(str(cluster.store("b"))))
    os.kill(place.pid, signal.SIGKILL)
    eventually(lambda: address not in workers_of(client), "the killed worker leaves")
    cluster.wait_for_workers(client, 2)
    moved(client, packed)
    assert path.read_bytes() == whole


def test_tasks_go_on_while_an_environment_is_staged(client: Client, packed: Environment) -> None:
    def slow() -> int:
        import os
        import time

        time.sleep(1)
        return os.getpid()

    before = {place.pid for place in places(client).values()}
    future = client.submit(slow, pure=False)
    staged = client.stage_environment(packed)
    assert staged.environment_id == packed.id
    assert future.result() in before
    assert {place.pid for place in places(client).values()} == before


def test_variables_are_those_of_the_environment_and_of_the_user(
    client: Client, base_venv: Path, packed: Environment
) -> None:
    client.use_environment(packed, scheduler=False)
    for place in places(client).values():
        folders = place.environ["PATH"].split(":")
        assert folders[0] == f"{place.prefix}/bin"
        assert str(base_venv / "bin") not in folders
    assert [p.environ["MY_VARIABLE"] for p in places(client).values() if "MY_VARIABLE" in p.environ] == ["mine"]


def left(client: Client, environment: Environment) -> None:
    """Go to *environment* and back, and wait until each nanny has parked a standby of it."""
    client.use_environment(environment, scheduler=False)
    client.reset_environment()
    hosts = [host_id for host_id, host in client.environment_status().hosts.items() if environment.id in host.built]

    def parked() -> bool:
        now = client.environment_status().hosts
        return all(now[host_id].warm == (environment.id,) for host_id in hosts)

    eventually(parked, "each nanny has parked a standby")


@pytest.mark.heavy
def test_variables_set_after_an_environment_was_left_hold_when_it_is_back(client: Client, packed: Environment) -> None:
    """A standby that was parked before knows nothing of them."""
    left(client, packed)
    client.register_plugin(Environ({"SET_LATER": "yes"}), name="environ")
    client.use_environment(packed, scheduler=False)
    assert [place.environ.get("SET_LATER") for place in places(client).values()] == ["yes", "yes"]
    client.unregister_worker_plugin("environ", nanny=True)


def test_the_way_back_takes_the_parked_process(client: Client, packed: Environment) -> None:
    left(client, packed)
    nannies = [psutil.Process(place.pid).parent() for place in places(client).values()]
    there = {child.pid for nanny in nannies for child in nanny.children()}
    client.use_environment(packed, scheduler=False)
    assert {place.pid for place in places(client).values()} <= there


def test_the_status_says_who_runs_what(client: Client, cluster: Cluster, packed: Environment) -> None:
    client.use_environment(packed, scheduler=False)
    status = client.environment_status()
    assert status.target_id == packed.id
    assert {process.pid for process in status.workers.values()} == {p.pid for p in places(client).values()}
    assert status.scheduler.environment_id is None
    assert status.scheduler.pid == cluster.members["scheduler"].pid
    assert {Path(host.store) for host in status.hosts.values()} == {cluster.store("a"), cluster.store("b")}


def test_a_reset_brings_the_base_environment_back(client: Client, base_venv: Path, packed: Environment) -> None:
    client.use_environment(packed, scheduler=False)
    result = client.reset_environment()
    assert result.environment_id is None
    assert {place.prefix for place in places(client).values()} == {str(base_venv)}


@pytest.mark.parametrize("scheduler", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_what_a_worker_was_told_is_carried_on(
    base_venv: Path, tmp_path: Path, warm_stores: Path, packed: Environment, onlyhere: ModuleType, scheduler: bool
) -> None:
    """Names, threads, resources, memory limit, local directory, preload, --nworkers, --lifetime; also by a restart."""
    preload = tmp_path / "preload.py"
    preload.write_text(PRELOAD)
    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        one = cluster.start_worker(
            "told", "--nthreads", "3", "--resources", "GPU=2,MEM=5", "--memory-limit", "512MiB",
            "--preload", str(preload),
        )  # fmt: skip
        several = cluster.start_worker("several", "--nworkers", "2", "--nthreads", "1", "--lifetime", "1 hour")
        with cluster.client(workers=3) as client:
            before = _told(client)
            result = client.use_environment(packed, scheduler=scheduler)
            assert result.workers == 3
            assert result.hosts == 1
            moved(client, packed)
            after = _told(client)
            assert after == before
            [told] = after["told"]
            assert told["nthreads"] == 3
            assert told["resources"] == {"GPU": 2, "MEM": 5}
            assert told["memory_limit"] == 512 << 20
            assert told["scratch"] == str(cluster.scratch("told"))
            written = [path.read_text() for path in cluster.scratch("told").rglob("preloaded")]
            assert written == [next(p.prefix for p in places(client).values())]
            client.restart()
            moved(client, packed)
            assert _told(client) == before
        assert one.alive
        assert several.alive


def _told(client: Client) -> dict[Any, list[dict[str, Any]]]:
    """What the scheduler knows of its workers, by name (empty: none was given), without what must differ."""
    told: dict[Any, list[dict[str, Any]]] = {}
    for address, info in workers_of(client).items():
        known = {name: info[name] for name in ("nthreads", "resources", "memory_limit")}
        scratch = info["local_directory"].split("/dask-scratch-space")[0]
        told.setdefault("" if info["name"] == address else info["name"], []).append({**known, "scratch": scratch})
    return told


def test_results_in_memory_are_computed_again(client: Client, packed: Environment, onlyhere: ModuleType) -> None:
    """A future that was done on an old worker is not lost: its task runs again in the environment."""

    def prefix() -> str:
        import sys

        return sys.prefix

    future = client.submit(prefix, pure=False)
    future.result()
    client.use_environment(packed, scheduler=False)
    assert future.result(timeout=30).endswith(packed.id[:16])


@pytest.mark.heavy
def test_scattered_data_is_lost_and_said_to_be(client: Client, packed: Environment, onlyhere: ModuleType) -> None:
    """There is no task that could make it again: whoever wants it hears so at once, and scatters it anew."""
    future = client.scatter({"a": 1}, hash=False)
    client.use_environment(packed, scheduler=False)
    with pytest.raises(CancelledError):
        client.submit(len, future).result(timeout=30)
    assert client.submit(len, client.scatter({"a": 1}, hash=False)).result(timeout=30) == 1


@pytest.mark.heavy
def test_a_task_that_runs_is_started_again(client: Client, packed: Environment) -> None:
    """And its worker does not make the swap wait for it."""

    def slow(seconds: float) -> str:
        import sys
        import time

        if "/envs/" not in sys.prefix:
            time.sleep(seconds)
        return sys.prefix

    futures = [client.submit(slow, 60, pure=False) for _ in range(2)]
    eventually(lambda: all(client.processing().values()), "both workers are busy")
    started = time.monotonic()
    client.use_environment(packed, scheduler=False)
    assert time.monotonic() - started < 30
    assert all(prefix.endswith(packed.id[:16]) for prefix in client.gather(futures))
