"""What can be wrong with an environment, a host or a cluster: a clear error, and the cluster as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import dask
import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from envship.errors import NotAnEnvironment, SourceNotFound
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import (
    CommitFailed,
    EnvironmentMissing,
    EnvshipError,
    IncompatibleEnvironment,
    PrepareFailed,
)
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, client_of_unmoved, variant, workers_of

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS

NO_DISTRIBUTED = b"import sys\nsys.modules['distributed'] = None\n"
HANGS = b"import time\ntime.sleep(3600)\n"
ONLY_ON_B = b"import os, sys\nif os.environ['ENVSHIP_STORE'].endswith('/b'): sys.modules['distributed'] = None\n"
CRASHES_LATER = b"""
import os, sys, threading, time

def arm():
    while not hasattr(sys.modules.get("distributed.%(module)s"), "%(kind)s"):
        time.sleep(0.001)

    async def start_unsafe(self):
        %(how)s

    sys.modules["distributed.%(module)s"].%(kind)s.start_unsafe = start_unsafe

if os.environ["ENVSHIP_STORE"].endswith("%(where)s"):
    threading.Thread(target=arm, daemon=True).start()
"""
RAISES = b'raise RuntimeError("nothing ever starts in here")'
HANGS_LATER = b"time.sleep(3600)"
NO_WORKER = CRASHES_LATER % {b"module": b"worker", b"kind": b"Worker", b"where": b"", b"how": RAISES}
NO_WORKER_ON_B = CRASHES_LATER % {b"module": b"worker", b"kind": b"Worker", b"where": b"/b", b"how": RAISES}
NO_SCHEDULER = CRASHES_LATER % {b"module": b"scheduler", b"kind": b"Scheduler", b"where": b"", b"how": RAISES}
HUNG_WORKER = CRASHES_LATER % {b"module": b"worker", b"kind": b"Worker", b"where": b"", b"how": HANGS_LATER}
HUNG_SCHEDULER = CRASHES_LATER % {b"module": b"scheduler", b"kind": b"Scheduler", b"where": b"", b"how": HANGS_LATER}
"""Everything can be imported, and what is imported does not start."""


def at_start(code: bytes) -> dict[str, bytes]:
    """Files that make every interpreter of an environment run *code* first; ``sitecustomize`` may be the system's."""
    return {"{site}/sabotage.pth": b"import sabotage\n", "{site}/sabotage.py": code}


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler, a nanny and a worker without one, on two hosts."""
    with Cluster(base_venv, lab / "failures", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", "--no-nanny", host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster whose processes are the same, with their data, when the test is over."""
    with client_of_unmoved(cluster) as client:
        yield client


def test_no_such_environment(client: Client, tmp_path: Path) -> None:
    for source in ("no-environment-of-this-name", tmp_path / "nothing"):
        with pytest.raises(SourceNotFound) as not_found:
            client.use_environment(source)
        assert str(source) in str(not_found.value)
    with pytest.raises(EnvironmentMissing, match="f" * 64) as missing:
        client.use_environment("f" * 64)
    assert client.scheduler.address in missing.value.where


def test_not_an_environment(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotAnEnvironment, match=str(tmp_path)):
        client.use_environment(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"without": "distributed"}, "distributed"),
        ({"without": "dask"}, "dask"),
        ({"platform": "osx-arm64"}, "platform"),
        ({"python": "3.8.1"}, r"3\.8"),
        ({"versions": {"distributed": "2000.1.0"}}, "2000.1.0"),
        ({"versions": {"dask": "2000.1.0"}}, "2000.1.0"),
    ],
    ids=["no distributed", "no dask", "platform", "python", "distributed", "dask"],
)
def test_an_environment_that_does_not_fit(
    client: Client, packed: Environment, client_store: Store, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(IncompatibleEnvironment, match=named):
        client.use_environment(variant(client_store, packed.manifest, **change))


def test_versions_can_be_overridden_but_not_what_is_missing(
    client: Client, packed: Environment, client_store: Store
) -> None:
    with pytest.raises(EnvshipError, match="distributed"):
        client.use_environment(variant(client_store, packed.manifest, without="distributed"), ignore_versions=True)
    with pytest.raises(EnvshipError, match="platform"):
        client.use_environment(variant(client_store, packed.manifest, platform="osx-arm64"), ignore_versions=True)


def test_an_environment_that_cannot_import_distributed(
    client: Client, cluster: Cluster, packed: Environment, client_store: Store
) -> None:
    broken = variant(client_store, packed.manifest, at_start(NO_DISTRIBUTED))
    with pytest.raises(PrepareFailed) as caught:
        client.use_environment(broken)
    assert len(caught.value.causes) == 2, "both hosts"
    for host in "ab":
        [cause] = [cause for cause in caught.value.causes.values() if str(cluster.store(host)) in cause]
        assert "import of distributed halted" in cause
    assert "as it was" in str(caught.value)


def test_an_environment_that_fails_on_one_host_only(
    client: Client, cluster: Cluster, packed: Environment, client_store: Store
) -> None:
    broken = variant(client_store, packed.manifest, at_start(ONLY_ON_B))
    with pytest.raises(PrepareFailed) as caught:
        client.use_environment(broken)
    assert str(cluster.store("b")) in str(caught.value)
    assert str(cluster.store("a")) not in str(caught.value)


def test_an_environment_that_hangs_while_it_starts(client: Client, packed: Environment, client_store: Store) -> None:
    hanging = variant(client_store, packed.manifest, at_start(HANGS))
    with dask.config.set({"envship.timeouts.start": "3s"}), pytest.raises(PrepareFailed) as caught:
        client.use_environment(hanging)
    assert len(caught.value.causes) == 2, "both hosts"
    assert all("it was not ready after 3 s" in cause for cause in caught.value.causes.values())


def test_a_chunk_that_is_damaged_on_the_users_machine(client: Client, packed: Environment, client_store: Store) -> None:
    content = os.urandom(200_000)
    made = variant(client_store, packed.manifest, {"{site}/data.bin": content})
    manifest = client_store.read_manifest(made)
    [chunk] = [
        chunk for chunk in manifest.chunks if chunk not in packed.manifest.chunks and _is(client_store, chunk, content)
    ]
    _damage(client_store, chunk)
    with pytest.raises(EnvshipError, match=chunk):
        client.use_environment(made)
    # Packing it again would bring the chunk back; here, this does.
    assert client_store.write_chunk(content) == chunk
    client.stage_environment(made)


CRASHED = "nothing ever starts in here"
NO_START = "the worker does not start; see its log"
KILLED = "has not registered after 6 s, and was killed"
NO_ARRIVAL = "it does not start in environment"


@pytest.mark.parametrize(
    ("sabotage", "workers", "scheduler", "timeout", "named"),
    [
        pytest.param(NO_WORKER, {"nanny": "a"}, False, "30s", CRASHED, id="nanny"),
        pytest.param(*(NO_WORKER, {"bare": "a"}, False, "30s", NO_START), marks=pytest.mark.heavy, id="no-nanny"),
        pytest.param(
            *(NO_SCHEDULER, {"nanny": "a", "bare": "a"}, None, "30s", NO_ARRIVAL),
            marks=pytest.mark.heavy,
            id="scheduler",
        ),
        pytest.param(
            *(
                NO_WORKER_ON_B,
                {"nanny": "a", "bare": "a", "bad-nanny": "b"},
                None,
                "30s",
                CRASHED,
            ),
            marks=pytest.mark.heavy,
            id="one of several",
        ),
        pytest.param(*(HUNG_WORKER, {"nanny": "a"}, False, "10s", KILLED), marks=pytest.mark.heavy, id="hung: nanny"),
        pytest.param(
            *(HUNG_WORKER, {"bare": "a"}, False, "10s", NO_START), marks=pytest.mark.heavy, id="hung: no-nanny"
        ),
        pytest.param(
            *(HUNG_SCHEDULER, {"nanny": "a", "bare": "a"}, None, "10s", NO_ARRIVAL),
            marks=pytest.mark.heavy,
            id="hung: scheduler",
        ),
        pytest.param(
            *(HUNG_WORKER, {"nanny": "a"}, None, "10s", KILLED), marks=pytest.mark.heavy, id="hung: nanny, all move"
        ),
        pytest.param(
            *(HUNG_WORKER, {"bare": "a"}, None, "10s", NO_START), marks=pytest.mark.heavy, id="hung: no-nanny, all move"
        ),
    ],
)
def test_what_does_not_start_after_the_swap_began_brings_the_old_environment_back(
    base_venv: Path,
    tmp_path: Path,
    warm_stores: Path,
    packed: Environment,
    client_store: Store,
    onlyhere: ModuleType,
    sabotage: bytes,
    workers: dict[str, str],
    scheduler: bool | None,
    timeout: str,
    named: str,
) -> None:
    """From the base environment, and from another one; the processes are the same, and work."""
    sabotaged = variant(client_store, packed.manifest, at_start(sabotage))

    def where() -> tuple[str, int]:
        return sys.prefix, os.getpid()

    def imports() -> Any:
        import importlib

        return importlib.import_module("onlyhere").f(1)

    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        for name, host in workers.items():
            cluster.start_worker(name, *(["--no-nanny"] if name == "bare" else []), host=host)
        with cluster.client(workers=len(workers)) as client:
            for previous in (str(base_venv), packed.id[:16]):
                before = client.run_on_scheduler(where)
                with pytest.raises(CommitFailed, match=named) as caught:
                    client.use_environment(sabotaged, scheduler=scheduler, timeout=timeout)
                assert "moved back" in str(caught.value)
                assert "not all of it" not in str(caught.value)
                assert client.run_on_scheduler(where) == before
                assert all(member.alive and " leaves: " not in member.log for member in cluster.members.values())
                names = {a: info["name"] for a, info in workers_of(client).items()}
                assert sorted(names.values()) == sorted(workers)
                for address, name in names.items():
                    prefix, pid = client.submit(where, workers=[address], pure=False).result(timeout=30)
                    assert prefix.endswith(previous)
                    assert (pid == cluster.members[name].pid) is (name == "bare")
                client.use_environment(packed, scheduler=scheduler)
                assert client.submit(imports, pure=False).result(timeout=30) == onlyhere.f(1)


@pytest.mark.heavy
def test_a_chunk_damaged_on_a_host_is_never_used(
    base_venv: Path,
    tmp_path: Path,
    warm_stores: Path,
    packed: Environment,
    client_store: Store,
    onlyhere: ModuleType,
) -> None:
    """A second host fetches from the first, finds the damage, and gets the chunk from the client, in the same call."""
    content = os.urandom(200_000)
    made = variant(client_store, packed.manifest, {"{site}/data.bin": content})

    def read() -> bytes:
        import pathlib

        [path] = pathlib.Path(sys.prefix).glob("lib/python*/site-packages/data.bin")
        return path.read_bytes()

    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler(host="a")
        cluster.start_worker("w1", host="a")
        with cluster.client(workers=1) as client:
            client.stage_environment(made)
            first = Store(cluster.store("a"))
            [package] = [p for p in client_store.read_manifest(made).packages if p.name == "variant"]
            [chunk] = [c.digest for c in package.chunks if _is(first, c.digest, content)]
            _damage(first, chunk)
            cluster.start_worker("w2", host="b")
            cluster.wait_for_workers(client, 2)
            result = client.use_environment(made, scheduler=False)
            assert result.uploaded_chunks == 1, "nobody else has it"
            assert set(client.run(read).values()) == {content}


def test_errors_reach_asynchronous_clients_and_pickle(client: Client, tmp_path: Path) -> None:
    import asyncio
    import pickle

    async def main() -> None:
        async with Client(client.scheduler.address, asynchronous=True, set_as_default=False) as own:
            with pytest.raises(NotAnEnvironment) as caught:
                await own.use_environment(tmp_path)
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    asyncio.run(main())


def _is(store: Store, digest: Digest, content: bytes) -> bool:
    return store.read_chunk(digest) == content


def _damage(store: Store, digest: Digest) -> None:
    [path] = store.layout.chunks.glob(f"*/{digest}.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
