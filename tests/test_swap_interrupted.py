"""Clients, workers and disks that fail, and workers that come, in the middle of a swap."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from envship import journey
from worker_bootstrap import verify
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import PrepareFailed, SchedulerLost
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, eventually, places, variant

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS

SLOW_ON_B = b"import os, time\nif os.environ['ENVSHIP_STORE'].endswith('/b'): time.sleep(4)\n"


@pytest.fixture
def cluster(base_venv: Path, tmp_path: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler, and two workers on two hosts."""
    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    with cluster.client(workers=2) as client:
        yield client


@pytest.fixture(scope="module")
def slow(packed: Environment, client_store: Store) -> EnvironmentId:
    """The packed environment, whose interpreter takes its time on the host b."""
    files = {"{site}/slow.pth": b"import slow\n", "{site}/slow.py": SLOW_ON_B}
    return variant(client_store, packed.manifest, files)


class Moving:
    """A call of ``use_environment`` in a thread of its own."""

    def __init__(self, client: Client, source: Any, **how: Any) -> None:
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(client, source, how))
        self._thread.start()

    def _run(self, client: Client, source: Any, how: dict[str, Any]) -> None:
        try:
            self.outcome = client.use_environment(source, **how)
        except BaseException as error:
            self.outcome = error

    def end(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def prefixes(client: Client) -> set[str]:
    return {Path(place.prefix).name for place in places(client).values()}


def standby_is_starting(cluster: Cluster, environment_id: EnvironmentId) -> bool:
    """Whether an interpreter of the environment has been started on the host b."""
    prefix = str(cluster.store("b") / "envs" / environment_id[:16])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if prefix in (folder / "cmdline").read_bytes().decode(errors="replace"):
                return True
        except OSError:
            continue
    return False


@pytest.mark.heavy
def test_swaps_of_two_clients_take_turns(
    client: Client, cluster: Cluster, packed: Environment, slow: EnvironmentId
) -> None:
    """Also when the scheduler is replaced between the two."""
    with cluster.client() as other:
        first = Moving(client, slow)
        eventually(lambda: standby_is_starting(cluster, slow), "the first swap is under way")
        second = Moving(other, packed)
        assert first.end().environment_id == slow
        result = second.end()
        assert (result.previous_id, result.environment_id) == (slow, packed.id)
        assert prefixes(other) == {packed.id[:16]}


@pytest.mark.heavy
def test_a_worker_that_dies_while_the_swap_is_prepared_holds_nobody_up(
    client: Client, cluster: Cluster, slow: EnvironmentId
) -> None:
    moving = Moving(client, slow)
    eventually(lambda: standby_is_starting(cluster, slow), "the swap is under way")
    cluster.members["w2"].process.send_signal(signal.SIGKILL)
    assert moving.end().environment_id == slow
    assert prefixes(client) == {slow[:16]}


@pytest.mark.heavy
@pytest.mark.parametrize("options", [(), ("--no-nanny",)], ids=["nanny", "no-nanny"])
def test_a_worker_that_joins_while_the_swap_is_prepared_ends_up_in_the_environment(
    client: Client, cluster: Cluster, slow: EnvironmentId, options: tuple[str, ...]
) -> None:
    """The scheduler is replaced under it; its tasks run in the environment only."""
    moving = Moving(client, slow)
    eventually(lambda: standby_is_starting(cluster, slow), "the swap is under way")
    cluster.start_worker("w3", *options, host="a")
    assert moving.end().environment_id == slow
    cluster.wait_for_workers(client, 3)
    assert prefixes(client) == {slow[:16]}


def test_a_client_that_is_killed_leaves_a_cluster_that_works(
    client: Client, cluster: Cluster, packed: Environment, slow: EnvironmentId, client_store: Store
) -> None:
    """The swap that it began goes on without it, and the next one finds everything in order."""
    call = "import sys, envship, distributed; distributed.Client(sys.argv[1]).use_environment(sys.argv[2])"
    environ = {**os.environ, "ENVSHIP_STORE": str(client_store.layout.root)}
    killed = subprocess.Popen([sys.executable, "-W", "ignore", "-c", call, cluster.address, slow], env=environ)
    eventually(lambda: standby_is_starting(cluster, slow), "the swap is under way")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    client.use_environment(packed)
    assert prefixes(client) == {packed.id[:16]}


@pytest.mark.heavy
@pytest.mark.parametrize("scheduler", [False, None], ids=["stays", "moves"])
@pytest.mark.parametrize("again", [False, True], ids=["gone", "started-again"])
def test_a_scheduler_that_is_killed_ends_the_call_and_the_stores_stay_sound(
    client: Client,
    cluster: Cluster,
    slow: EnvironmentId,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: bool | None,
    again: bool,
) -> None:
    """With it the cluster is gone, as without a swap; what had arrived in the stores is whole, and the next one's.

    Also where somebody starts another one at the same address: it knows nothing of the swap.
    """
    monkeypatch.setattr(journey, "LOSS_TIMEOUT_S", 5.0)
    moving = Moving(client, slow, scheduler=scheduler)
    eventually(lambda: standby_is_starting(cluster, slow), "the swap is under way")
    killed = cluster.members.pop("scheduler").process
    killed.kill()
    killed.wait()
    if again:
        (cluster.folder / "scheduler.json").unlink()
        cluster.start_scheduler("--port", cluster.address.rpartition(":")[2])
    # Whoever asks first hears of it: in the middle of a question, or when nobody, or another one, answers.
    with pytest.raises(SchedulerLost, match=re.escape(cluster.address)):
        moving.end()
    client.close(timeout=1)
    store = Store(cluster.store("b"))
    prefix = materialise(store, slow)
    assert list(verify.damaged_files(store, slow, prefix)) == []
    assert list(verify.damaged_chunks(store, store.read_manifest(slow))) == []


@pytest.mark.heavy
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own, so root")
def test_a_full_disk_is_named_and_nothing_is_touched(
    client: Client, cluster: Cluster, packed: Environment, tmp_path: Path
) -> None:
    """And once there is room, the same call works."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], check=True)
    try:
        cluster.start_worker("w3", environ={"ENVSHIP_STORE": str(disk / "store")})
        cluster.wait_for_workers(client, 3)
        before = places(client)
        with pytest.raises(PrepareFailed, match="room"):
            client.use_environment(packed)
        assert places(client) == before
        subprocess.run(["mount", "-o", "remount,size=2g", disk], check=True)
        client.use_environment(packed)
        assert prefixes(client) == {packed.id[:16]}
        cluster.stop()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
