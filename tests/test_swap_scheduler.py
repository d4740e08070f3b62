"""A scheduler that is a process of its own moves as well: in place, at its address, with what users gave it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import dask
import dask.array
import pytest
import zstandard
from distributed import Client, NannyPlugin, SchedulerPlugin, WorkerPlugin

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, client_in_base, eventually, places, variant, workers_of
from .gates import gated

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler, a worker with a nanny and one without, on two hosts."""
    with Cluster(base_venv, lab / "scheduler", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("nanny", host="a")
        cluster.start_worker("bare", "--no-nanny", host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster in its base environment."""
    with client_in_base(cluster) as client:
        yield client


def scheduler_place(client: Client) -> tuple[str, int]:
    def look() -> tuple[str, int]:
        import os
        import sys

        return sys.prefix, os.getpid()

    prefix, pid = client.run_on_scheduler(look)
    return str(prefix), int(pid)


def test_packages_fail_before_and_work_afterwards(
    client: Client, cluster: Cluster, packed: Environment, onlyhere: ModuleType
) -> None:
    """`submit`, `delayed` and arrays, with a package that only the environment has: the scheduler unpickles graphs."""
    with pytest.raises(Exception, match=r"deserialization|onlyhere"):
        client.submit(onlyhere.f, 1).result(timeout=30)

    result = client.use_environment(packed)

    assert result.scheduler_swapped
    assert client.submit(onlyhere.f, 1).result(timeout=30) == 42
    assert client.compute(dask.delayed(onlyhere.f)(2)).result(timeout=30) == 43
    total = dask.array.ones((100, 100), chunks=(50, 50)).sum()
    assert client.compute(total).result(timeout=30) == 10_000
    prefixes = client.gather([client.submit(onlyhere.where, workers=[w], pure=False) for w in places(client)])
    assert all(prefix.endswith(packed.id[:16]) for prefix in prefixes)


def test_pid_and_address_stay(client: Client, cluster: Cluster, packed: Environment) -> None:
    address, pids = client.scheduler.address, {name: member.pid for name, member in cluster.members.items()}
    client.use_environment(packed)
    assert client.scheduler.address == address
    prefix, pid = scheduler_place(client)
    assert pid == pids["scheduler"]
    assert prefix.endswith(packed.id[:16])
    assert all(member.alive for member in cluster.members.values())
    assert client.environment_status().scheduler.environment_id == packed.id
    names = {info["name"] for info in workers_of(client).values()}
    assert names == {"nanny", "bare"}


@pytest.mark.heavy
def test_the_client_is_usable_when_the_call_returns(
    cluster: Cluster, packed: Environment, onlyhere: ModuleType, no_leaks: None
) -> None:
    """And leaves no connection to either scheduler, and no thread, once it is closed."""
    with cluster.client(workers=2) as client:
        client.use_environment(packed)
        assert client.status == "running"
        assert client.submit(onlyhere.f, 0, pure=False).result(timeout=10) == 41
        client.reset_environment()
        assert client.status == "running"
        assert client.submit(int, "7", pure=False).result(timeout=10) == 7


def test_plugins_of_users_are_still_there(
    base_venv: Path, tmp_path: Path, warm_stores: Path, packed: Environment, onlyhere: ModuleType
) -> None:
    """Also for a nanny and a worker that join the scheduler's successor."""

    def kept(dask_scheduler: object) -> int | None:
        return getattr(dask_scheduler.plugins.get("users-scheduler-plugin"), "kept", None)  # type: ignore[attr-defined]

    def mark(dask_worker: object) -> int | None:
        return getattr(dask_worker, "users_mark", None)

    def variable() -> str | None:
        return os.environ.get("USERS_MARK")

    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("early")
        cluster.start_worker("bare", "--no-nanny")
        with cluster.client(workers=2) as client:
            scheduler_plugin, worker_plugin, nanny_plugin = _plugins()
            client.register_plugin(scheduler_plugin, name="users-scheduler-plugin")
            client.register_plugin(worker_plugin, name="users-worker-plugin")
            client.register_plugin(nanny_plugin, name="users-nanny-plugin")
            client.use_environment(packed)
            cluster.start_worker("late")
            cluster.wait_for_workers(client, 3)
            workers = workers_of(client)
            with_nanny = [address for address, info in workers.items() if info["nanny"]]
            assert client.run_on_scheduler(kept) == 17
            assert list(client.run(mark).values()) == [23] * 3
            assert list(client.run(mark, workers=with_nanny, nanny=True).values()) == [29] * 2
            assert list(client.run(variable, workers=with_nanny).values()) == ["29"] * 2


def _plugins() -> tuple[SchedulerPlugin, WorkerPlugin, NannyPlugin]:
    # Made in here so that they are pickled by value, as those of a notebook are.
    class UsersSchedulerPlugin(SchedulerPlugin):
        def __init__(self) -> None:
            self.kept = 17

    class UsersWorkerPlugin(WorkerPlugin):
        def setup(self, worker: object) -> None:
            worker.users_mark = 23  # type: ignore[attr-defined]

    class UsersNannyPlugin(NannyPlugin):
        def setup(self, nanny: object) -> None:
            nanny.users_mark = 29  # type: ignore[attr-defined]
            nanny.env["USERS_MARK"] = "29"  # type: ignore[attr-defined]

    return UsersSchedulerPlugin(), UsersWorkerPlugin(), UsersNannyPlugin()


@pytest.mark.heavy
def test_datasets_and_variables_without_futures_survive(client: Client, packed: Environment) -> None:
    client.set_metadata("users", {"answer": 42})
    client.use_environment(packed)
    assert client.get_metadata("users") == {"answer": 42}


@pytest.mark.heavy
def test_another_client_reconnects(client: Client, cluster: Cluster, packed: Environment) -> None:
    with cluster.client() as other:
        client.use_environment(packed)
        eventually(lambda: other.status == "running", "the other client is back")
        assert other.submit(int, "5", pure=False).result(timeout=60) == 5


def test_the_scheduler_can_be_told_to_stay(client: Client, packed: Environment) -> None:
    before = scheduler_place(client)
    result = client.use_environment(packed, scheduler=False)
    assert not result.scheduler_swapped
    assert scheduler_place(client) == before
    assert all(place.prefix.endswith(packed.id[:16]) for place in places(client).values())


def test_an_asynchronous_client(client: Client, cluster: Cluster, packed: Environment, onlyhere: ModuleType) -> None:
    async def main() -> None:
        async with Client(cluster.address, asynchronous=True, set_as_default=False) as own:
            result = await own.use_environment(packed)
            assert result.scheduler_swapped
            assert await own.submit(onlyhere.f, 1, pure=False) == 42
            status = await own.environment_status()
            assert status.target_id == packed.id
            back = await own.reset_environment()
            assert back.scheduler_swapped and back.environment_id is None
            staged = await own.stage_environment(packed)
            assert staged.uploaded_bytes == 0
            assert (await own.environment_status()).target_id is None

    asyncio.run(main())


@pytest.mark.heavy
def test_restarts_and_deaths_afterwards_stay_in_the_environment(
    base_venv: Path, tmp_path: Path, warm_stores: Path, packed: Environment, onlyhere: ModuleType
) -> None:
    """Of two workers of one command, which have a nanny each."""
    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        several = cluster.start_worker("several", "--nworkers", "2")
        with cluster.client(workers=2) as client:
            client.use_environment(packed)
            moved = places(client)
            client.restart()
            restarted = places(client)
            address, victim = min(restarted.items())
            os.kill(victim.pid, signal.SIGKILL)
            eventually(lambda: address not in workers_of(client), "the killed one leaves")
            cluster.wait_for_workers(client, 2)
            back = places(client)
            for after in (moved, restarted, back):
                assert [Path(place.prefix).name for place in after.values()] == [packed.id[:16]] * 2
            assert {p.pid for p in moved.values()}.isdisjoint(p.pid for p in restarted.values())
            assert len({p.pid for p in restarted.values()} & {p.pid for p in back.values()}) == 1
            assert client.submit(onlyhere.f, 1).result(timeout=30) == 42
            assert several.alive


IDLE_S = 20.0


@pytest.mark.heavy
def test_a_scheduler_with_an_idle_timeout_lives_as_long_as_a_swap_and_ends_after_it(
    base_venv: Path, tmp_path: Path, warm_stores: Path, packed: Environment, onlyhere: ModuleType
) -> None:
    """Nobody has a task for it meanwhile. Its successor has the option as well, and takes nobody's swap for work."""
    gate = tmp_path / "open"
    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        scheduler = cluster.start_scheduler("--idle-timeout", f"{IDLE_S} s")
        cluster.start_worker("plain", "--no-nanny", "--death-timeout", "10", host="b")
        with cluster.client(workers=1) as client:
            client.stage_environment(packed)  # with it come the agents
            client.run(gated("envship_prepare", str(tmp_path)))
            swap = threading.Thread(target=client.use_environment, args=[packed])
            swap.start()
            began_s = time.monotonic()
            try:
                eventually(lambda: not scheduler.alive or time.monotonic() > began_s + 1.5 * IDLE_S, "it is time")
                assert scheduler.alive, scheduler.log
            finally:
                gate.touch()
                swap.join()
            assert scheduler_place(client)[0].endswith(packed.id[:16])
        eventually(lambda: not scheduler.alive, "nobody needs it any more")
        assert "being idle for" in scheduler.log


def test_an_encrypted_cluster(
    base_venv: Path, tmp_path: Path, warm_stores: Path, packed: Environment, onlyhere: ModuleType
) -> None:
    """TLS from end to end: the chunks, the scheduler's return, and the workers' return."""
    with Cluster(base_venv, tmp_path / "c", stores=tmp_path / "s", tls=True) as cluster:
        cluster.start_scheduler(host="a")
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", host="b")
        with cluster.client(workers=2) as client:
            assert client.scheduler.address.startswith("tls://")
            result = client.use_environment(packed)
            assert result.uploaded_chunks == len(packed.manifest.chunks)
            assert client.submit(onlyhere.f, 1).result(timeout=30) == 42
            assert scheduler_place(client)[1] == cluster.members["scheduler"].pid


@pytest.mark.heavy
def test_what_a_moved_scheduler_keeps_the_nannies_of_its_machine_can_read(
    base_venv: Path, tmp_path: Path, packed: Environment, client_store: Store, onlyhere: ModuleType
) -> None:
    """The environment has ``zstandard``, the base in which they stay does not, and all of them share one store."""
    folder = Path(zstandard.__file__).parent
    with_zstd = {f"{{site}}/zstandard/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
    first = variant(client_store, packed.manifest, with_zstd)
    second = variant(client_store, packed.manifest, {**with_zstd, "{site}/fresh.py": b"VALUE = 1\n" * 10_000})

    def decodes_zstd() -> bool:
        from worker_bootstrap import codec

        return "zstd" in codec.available()

    with Cluster(base_venv, tmp_path / "c") as cluster:
        cluster.start_scheduler(host="a")
        cluster.start_worker("w1", host="a")
        with cluster.client(workers=1) as client:
            client.use_environment(first)
            assert client.run_on_scheduler(decodes_zstd)
            client.use_environment(second)
            assert all(place.prefix.endswith(second[:16]) for place in places(client).values())
        assert not list(cluster.store("a").glob("chunks/*/*.zst"))
