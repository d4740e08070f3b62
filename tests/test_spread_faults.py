"""Peers that die, stall, crawl and lie, disks that fill up, clients that vanish: with real processes.

Every host is a worker with a store of its own. What a faulty peer does is put into its process in place of what it
would answer to those that ask it for chunks; all else is real.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dask
import pytest
from distributed import Client

import envship  # noqa: F401  # adds the methods to Client
from envship.environment import Environment
from worker_bootstrap.assignments import PARALLEL
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import PrepareFailed
from worker_bootstrap.mistrust import LIED, SILENT
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, eventually, workers_of
from .environments import environment_of, package_of
from .guard import marked
from .halves import halves

pytestmark = SWAP_MARKS
HOSTS = ("b", "c", "d")
"""The host of the scheduler, "a", comes on top."""


class Swarm(NamedTuple):
    """A cluster of `HOSTS`, its client, and where the client's chunks lie."""

    cluster: Cluster
    client: Client
    source: Store


@pytest.fixture(scope="module")
def swarm(base_venv: Path, lab: Path) -> Iterator[Swarm]:
    """One cluster for the tests of this module; each brings an environment of its own."""
    with Cluster(base_venv, lab / "swarm") as cluster:
        cluster.start_scheduler()
        for host in HOSTS:
            start(cluster, host)
        with cluster.client(workers=len(HOSTS)) as client:
            client.environment_status()
            yield Swarm(cluster, client, Store(lab / "swarm" / "client"))


def start(cluster: Cluster, host: str) -> None:
    cluster.start_worker(host, "--no-nanny", host=host)


def random_environment(store: Store, size_bytes: int = 3 << 20, chunk_bytes: int = 100_000) -> Environment:
    """An environment that nobody has seen before and that does not compress, in *store*."""
    package = package_of(store, {"lib/data": os.urandom(size_bytes)}, chunk_bytes=chunk_bytes)
    return Environment(environment_of(store, [package]), store)


def hold(swarm: Swarm, host: str, environment: Environment) -> None:
    """Let a host have all chunks of an environment, as if an earlier spread had brought them."""
    store = Store(swarm.cluster.store(host))
    for digest in environment.chunks:
        store.write_chunk(environment.store.read_chunk(digest), "raw")  # what machines without zstandard can read
    store.write_manifest(environment.manifest)


def address_of(client: Client, host: str) -> str:
    def look() -> list[str]:
        workers = workers_of(client)
        return [address for address, worker in workers.items() if worker["name"] == host]

    return eventually(look, f"worker {host}")[0]


def built(cluster: Cluster, host: str, environment_id: EnvironmentId) -> bool:
    """Whether a host has built an environment; its content was compared with the digests while it was written."""
    return Store(cluster.store(host)).built(environment_id) is not None


def assert_whole(cluster: Cluster, host: str) -> None:
    """A host that was killed has left nothing by halves but in ``tmp``, which the next one would clear up."""
    root = cluster.store(host)
    eventually(lambda: not marked(f"ENVSHIP_STORE={root}"), "what built for it ends, too")
    store = Store(root)
    assert list(halves(store)) == []
    shutil.rmtree(store.layout.tmp)


def on(client: Client, host: str, function: Callable[[Any], Any]) -> Any:
    """Run *function* in the process of a host; it is given the worker."""
    address = address_of(client, host)
    return client.run(function, workers=[address])[address]


def misbehaving(kind: str, gate: str = "") -> Callable[[Any], None]:
    """What makes a worker answer wrongly when it is asked for chunks; ``right`` undoes it.

    ``gated`` answers rightly once there is a file at *gate*.
    """

    # Made in here so that it is pickled by value: the cluster cannot import the tests.
    def install(dask_worker: Any) -> None:
        import asyncio
        import os
        import struct
        import time

        from distributed.protocol import Serialized

        handlers = dask_worker.handlers
        right = dask_worker.__dict__.setdefault("envship_right", handlers["envship_get_chunks"])
        dask_worker.envship_asked = 0
        if kind == "right":
            handlers["envship_get_chunks"] = right
            return

        def wait() -> None:
            while not os.path.exists(gate):
                time.sleep(0.01)

        def frame(data: bytes) -> Any:
            return Serialized({"serializer": "envship"}, [data])

        async def get_chunks(comm: Any, digests: Any = (), accept: Any = ()) -> Any:
            dask_worker.envship_asked += 1
            if kind == "dies":
                os._exit(1)
            if kind == "stalls":
                await asyncio.get_running_loop().create_future()
            if kind == "endless":
                comm.stream.write(struct.pack("Q", 1 << 50))
                while True:
                    await comm.stream.write(bytes(1 << 16))
            if kind == "gated":
                await asyncio.to_thread(wait)
            reply = await right(comm, digests=digests, accept=accept)
            rows = [(digest, codec, bytes(payload.frames[0])) for digest, codec, payload in reply["chunks"]]
            if kind == "slow":  # 100 times slower than the 10 ms that this takes on loopback
                await asyncio.sleep(1.0 * len(rows))
            if kind == "wrong":
                rows = [(digest, codec, payload[:-1] + bytes([payload[-1] ^ 1])) for digest, codec, payload in rows]
            if kind == "short":
                rows = [(digest, codec, payload[: len(payload) // 2]) for digest, codec, payload in rows]
            if kind == "unasked":
                rows.append(("c" * 64, "raw", b"nobody asked for this"))
            return {"status": "OK", "chunks": [(digest, codec, frame(payload)) for digest, codec, payload in rows]}

        handlers["envship_get_chunks"] = get_chunks

    return install


def waiting(gate: str = "") -> Callable[[Any], None]:
    """What makes a host begin to fetch and build only when there is a file at *gate*; without a gate, undoes it."""

    def install(dask_worker: Any) -> None:
        import asyncio
        import os
        import time

        handlers = dask_worker.handlers
        right = dask_worker.__dict__.setdefault("envship_provide_right", handlers["envship_provide"])
        if not gate:
            handlers["envship_provide"] = right
            return
        dask_worker.envship_waits = 0

        def wait() -> None:
            while not os.path.exists(gate):
                time.sleep(0.01)

        async def provide(**what: Any) -> Any:
            dask_worker.envship_waits += 1
            await asyncio.to_thread(wait)
            return await right(**what)

        handlers["envship_provide"] = provide

    return install


def waits(client: Client, host: str) -> int:
    """How often a host that was made to wait has been told to get an environment."""

    def look(dask_worker: Any) -> int:
        return int(dask_worker.envship_waits)

    return int(on(client, host, look))


def asked(client: Client, host: str) -> int:
    """How often a host that misbehaves was asked for chunks."""

    def look(dask_worker: Any) -> int:
        return int(dask_worker.envship_asked)

    return int(on(client, host, look))


def events(client: Client, stage: str) -> list[dict[str, Any]]:
    return [event for _, event in client.get_events("envship") if event["stage"] == stage]


def log_of(swarm: Swarm) -> str:
    return "".join(member.log for member in swarm.cluster.members.values())


# -- peers


@pytest.mark.parametrize(
    "kind",
    [
        *("wrong", "short", "endless", "unasked", "stalls", "slow"),
    ],
)
def test_a_peer_that_misbehaves_is_left_out_and_named(swarm: Swarm, kind: str) -> None:
    """Everybody gets everything from the other holder all the same."""
    environment = random_environment(swarm.source, size_bytes=16 << 20, chunk_bytes=1 << 20)
    # One that nobody has blamed for anything yet, or nobody would ask it.
    peer = f"bad-{kind}"
    start(swarm.cluster, peer)
    swarm.cluster.wait_for_workers(swarm.client, len(HOSTS) + 1)
    hold(swarm, peer, environment)
    hold(swarm, "c", environment)
    bad, bad_id = address_of(swarm.client, peer), Store(swarm.cluster.store(peer)).host_id
    on(swarm.client, peer, misbehaving(kind))
    try:
        result = swarm.client.stage_environment(environment.id)
        assert result.uploaded_bytes == 0
        assert all(built(swarm.cluster, host, environment.id) for host in ("a", *HOSTS))
        # Several batches from two sources, the less busy one first: it was asked, by each receiver for as many batches
        # as it fetches at once before it knows better.
        assert 1 <= asked(swarm.client, peer) <= PARALLEL * len(HOSTS)
        faults = [event for event in events(swarm.client, "failed batch") if event["source"] == bad]
        assert faults
        assert {event["fault"] for event in faults} == {SILENT if kind in ("stalls", "slow") else LIED}
        log = swarm.cluster.members["scheduler"].log
        assert any(bad in line and event["fault"] in line for event in faults for line in log.splitlines())
        hosts = swarm.client.environment_status().hosts.values()
        assert any(bad_id in host.left_out for host in hosts)
    finally:
        process = swarm.cluster.members.pop(peer).process
        process.kill()
        process.wait()
        swarm.cluster.wait_for_workers(swarm.client, len(HOSTS))


def test_a_host_whose_chunks_a_power_cut_took_in_part_is_healed_by_the_others(swarm: Swarm) -> None:
    """In one call, however many there are: their names are there, so nobody has fetched them."""
    environment = random_environment(swarm.source)
    hold(swarm, "c", environment)
    start(swarm.cluster, "cut")
    try:
        swarm.cluster.wait_for_workers(swarm.client, len(HOSTS) + 1)
        hold(swarm, "cut", environment)
        store = Store(swarm.cluster.store("cut"))
        for digest in list(environment.chunks)[::2]:
            path, _ = next(iter(store._candidates(digest)))
            path.write_bytes(b"\0" * path.stat().st_size)
        result = swarm.client.stage_environment(environment.id)
        assert result.uploaded_bytes == 0
        assert all(built(swarm.cluster, host, environment.id) for host in ("cut", *HOSTS))
        assert [digest for digest in environment.chunks if digest_of(store.read_chunk(digest)) != digest] == []
    finally:
        process = swarm.cluster.members.pop("cut").process
        process.kill()
        process.wait()
        swarm.cluster.wait_for_workers(swarm.client, len(HOSTS))


def test_a_peer_that_dies_in_the_middle_costs_a_retry(swarm: Swarm) -> None:
    environment = random_environment(swarm.source)
    start(swarm.cluster, "mortal")
    swarm.cluster.wait_for_workers(swarm.client, len(HOSTS) + 1)
    hold(swarm, "mortal", environment)
    on(swarm.client, "mortal", misbehaving("dies"))
    member = swarm.cluster.members["mortal"]
    # It is the only holder but for the client, which is asked for what has got lost with it.
    result = swarm.client.stage_environment(environment)
    assert all(built(swarm.cluster, host, environment.id) for host in ("a", *HOSTS))
    assert result.uploaded_bytes > 0
    assert member.process.wait(20) == 1
    del swarm.cluster.members["mortal"]
    assert_whole(swarm.cluster, "mortal")


# -- clients

CLIENT = """
import sys
from distributed import Client
import envship
with Client(sys.argv[1]) as client:
    client.stage_environment(sys.argv[2], progress=False)
"""


def client_process(swarm: Swarm, environment: Environment) -> subprocess.Popen[bytes]:
    """Another client, which stages *environment* from the same store as this one."""
    variables = {**os.environ, "ENVSHIP_STORE": str(swarm.source.layout.root)}
    command = [sys.executable, "-W", "ignore", "-c", CLIENT, swarm.cluster.address, environment.id]
    return subprocess.Popen(command, env=variables)


def test_a_client_that_vanishes_after_one_full_copy_is_not_missed(swarm: Swarm, tmp_path: Path) -> None:
    environment = random_environment(swarm.source)
    gate = tmp_path / "gate"
    for host in HOSTS:
        on(swarm.client, host, waiting(str(gate)))
    stores = [Store(swarm.cluster.store(host)) for host in ("a", *HOSTS)]
    client = client_process(swarm, environment)
    try:

        def one_full_copy() -> bool:
            return all(any(store.has_chunk(digest) for store in stores) for digest in environment.chunks)

        eventually(one_full_copy, "every chunk is on some host")
        eventually(lambda: all(waits(swarm.client, host) for host in HOSTS), "the staging is under way")
        client.kill()
        client.wait()
        assert not any(built(swarm.cluster, host, environment.id) for host in HOSTS)
        gate.touch()
        eventually(lambda: all(store.built(environment.id) for store in stores), "all hosts have built it")
    finally:
        client.kill()
        client.wait()
        for host in HOSTS:
            on(swarm.client, host, waiting())


def holding_uploads(gate: str, after: int) -> Callable[[Any], None]:
    """What makes a worker take *after* chunks that are uploaded, and then no more until there is a file at *gate*."""

    def install(dask_worker: Any) -> None:
        import asyncio
        import os
        import time

        right = dask_worker.handlers["envship_put_chunks"]
        taken = 0

        def wait() -> None:
            while not os.path.exists(gate):
                time.sleep(0.01)

        async def put_chunks(comm: Any, chunks: Any = ()) -> Any:
            nonlocal taken
            taken += len(chunks)
            if taken > after:
                await asyncio.to_thread(wait)
            return await right(comm, chunks=chunks)

        dask_worker.handlers["envship_put_chunks"] = put_chunks

    return install


def test_a_client_that_vanishes_before_one_full_copy_ends_the_staging_clearly(swarm: Swarm, tmp_path: Path) -> None:
    """Nothing half-built is left, and the next client brings only what has not arrived."""
    environment = random_environment(swarm.source, 24 << 20, 1 << 20)
    gate = tmp_path / "gate"
    for host in HOSTS[1:]:
        on(swarm.client, host, holding_uploads(str(gate), after=0))
    stores = [Store(swarm.cluster.store(host)) for host in ("a", *HOSTS)]
    client = client_process(swarm, environment)
    try:
        eventually(
            lambda: any(not store.missing([digest]) for store in stores for digest in environment.chunks),
            "something has arrived",
        )
    finally:
        client.kill()
        client.wait()

    def ended() -> list[dict[str, Any]]:
        return [event for event in events(swarm.client, "failed") if event["environment_id"] == environment.id]

    (event,) = eventually(ended, "the staging ends")[:1]
    assert "on no host any more" in str(event["causes"])
    gate.touch()
    for store in stores:
        assert store.built(environment.id) is None
        eventually(lambda store=store: not list(store.layout.tmp.glob("build-*")), "what was begun is removed")
    there = {digest for store in stores for digest in environment.chunks if store.has_chunk(digest)}
    result = swarm.client.stage_environment(environment)
    assert 0 < result.uploaded_chunks <= len(environment.chunks) - len(there)
    assert all(store.built(environment.id) for store in stores)


def test_two_clients_bring_one_environment_once(swarm: Swarm) -> None:
    environment = random_environment(swarm.source, 8 << 20)
    results = both(swarm, environment, environment)
    assert sum(result.uploaded_chunks for result in results) == len(environment.chunks)
    assert all(built(swarm.cluster, host, environment.id) for host in ("a", *HOSTS))


def test_two_environments_spread_at_once(swarm: Swarm) -> None:
    one, other = random_environment(swarm.source, 8 << 20), random_environment(swarm.source, 8 << 20)
    results = both(swarm, one, other)
    assert [result.uploaded_chunks for result in results] == [len(one.chunks), len(other.chunks)]
    for environment in (one, other):
        assert all(built(swarm.cluster, host, environment.id) for host in ("a", *HOSTS))


def both(swarm: Swarm, one: Environment, other: Environment) -> list[Any]:
    """Stage two environments, each from a client of its own, at the same time."""
    results: dict[int, Any] = {}

    def stage(number: int, environment: Environment) -> None:
        with swarm.cluster.client() as client:
            results[number] = client.stage_environment(environment, progress=False)

    threads = [threading.Thread(target=stage, args=pair) for pair in enumerate((one, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in sorted(results)]


# -- hosts


def test_a_host_that_joins_in_the_middle_disturbs_nobody(swarm: Swarm, tmp_path: Path) -> None:
    environment = random_environment(swarm.source)
    gate = tmp_path / "gate"
    on(swarm.client, "b", waiting(str(gate)))
    staging = threading.Thread(target=swarm.client.stage_environment, args=[environment])
    staging.start()
    try:
        eventually(lambda: waits(swarm.client, "b"), "the staging is under way")
        start(swarm.cluster, "late")
        swarm.cluster.wait_for_workers(swarm.client, len(HOSTS) + 1)
    finally:
        gate.touch()
        staging.join()
        on(swarm.client, "b", waiting())
    assert all(built(swarm.cluster, host, environment.id) for host in ("a", *HOSTS))
    assert swarm.client.stage_environment(environment.id).hosts == len(HOSTS) + 2
    assert built(swarm.cluster, "late", environment.id)
    late = swarm.cluster.members.pop("late")
    late.process.send_signal(signal.SIGTERM)
    late.process.wait(20)
    swarm.cluster.wait_for_workers(swarm.client, len(HOSTS))


@pytest.mark.skipif(os.getuid() != 0, reason="needs to mount a small file system")
def test_a_host_with_a_full_disk_is_named_and_the_others_have_all(swarm: Swarm, tmp_path: Path) -> None:
    """With room again, the same call works out, and fetches only what had not arrived."""
    disk = swarm.cluster.store("small")
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        start(swarm.cluster, "small")
        swarm.cluster.wait_for_workers(swarm.client, len(HOSTS) + 1)
        environment = random_environment(swarm.source, 8 << 20)
        hold(swarm, "b", environment)
        with pytest.raises(PrepareFailed) as caught:
            swarm.client.stage_environment(environment.id)
        (cause,) = caught.value.causes.values()
        assert str(disk) in cause
        assert all(built(swarm.cluster, host, environment.id) for host in ("a", *HOSTS))
        assert Store(disk).built(environment.id) is None
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        swarm.client.stage_environment(environment.id)
        assert built(swarm.cluster, "small", environment.id)
    finally:
        member = swarm.cluster.members.pop("small")
        member.process.send_signal(signal.SIGTERM)
        member.process.wait(20)
        subprocess.run(["umount", "--lazy", disk], check=True)
    swarm.cluster.wait_for_workers(swarm.client, len(HOSTS))


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_a_third_of_the_hosts_die_and_the_others_have_all(base_venv: Path, tmp_path: Path, seed: int) -> None:
    """Any three of nine, one after the other, at moments spread over the exchange."""
    chance = random.Random(seed)
    hosts = [f"h{number}" for number in range(9)]
    victims = chance.sample(hosts, 3)
    survivors = [host for host in hosts if host not in victims]
    with Cluster(base_venv, tmp_path / "cluster") as cluster:
        cluster.start_scheduler()
        for host in hosts:
            start(cluster, host)
        with cluster.client(workers=len(hosts)) as client:
            client.environment_status()
            environment = random_environment(Store(tmp_path / "client"), 16 << 20)
            results: list[Any] = []

            def stage() -> None:
                results.append(client.stage_environment(environment))

            def held() -> int:
                lacking = [len(Store(cluster.store(host)).missing(environment.chunks)) for host in survivors]
                return len(environment.chunks) * len(survivors) - sum(lacking)

            # Slow enough for all three to die while chunks still travel.
            with dask.config.set({"envship.rate-limit": "3 MB"}):
                staging = threading.Thread(target=stage)
                staging.start()
                shares = sorted(chance.uniform(0.05, 0.8) for _ in victims)
                for victim, share in zip(victims, shares, strict=True):
                    some = share * len(environment.chunks) * len(survivors)
                    eventually(lambda some=some: held() >= some, "chunks spread")  # type: ignore[misc]
                    process = cluster.members.pop(victim).process
                    process.kill()
                    process.wait()
                    assert held() < len(environment.chunks) * len(survivors), "all was over before the last one died"
                staging.join()
            for victim in victims:
                assert_whole(cluster, victim)
            assert results
            assert all(built(cluster, host, environment.id) for host in ("a", *survivors))
