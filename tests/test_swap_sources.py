"""Whatever names an environment moves a cluster there; versions that differ, and manifests that were damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import conda_pack
import dask
import dask.array
import pytest
import zstandard
from distributed import Client

import envship
import worker_bootstrap
from envship.cli.machines import bare_environ
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import IncompatibleEnvironment
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, Prefixes, client_in_base, places, variant
from .prefixes import copy_of, install

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS

FROM_A_PROCESS = """
import json, sys
import envship, onlyhere
from distributed import Client

with Client(sys.argv[1], set_as_default=False) as client:
    result = client.use_environment()
    print(json.dumps([result.environment_id, sys.prefix, client.submit(onlyhere.f, 1).result(timeout=30)]))
"""


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler, a worker with a nanny beside it, and one without on another host."""
    with Cluster(base_venv, lab / "sources", stores=warm_stores) as cluster:
        cluster.start_scheduler(host="a")
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", "--no-nanny", host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster in its base environment."""
    with client_in_base(cluster) as client:
        yield client


@pytest.fixture
def fresh(packed: Environment, client_store: Store, request: pytest.FixtureRequest) -> EnvironmentId:
    """The id of an environment that no host has heard of, in the client's store."""
    source = f"NAME = {request.node.name!r}\n"
    return variant(client_store, packed.manifest, {"{site}/fresh.py": source.encode()})


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of a user who has packed nothing, from now on."""
    store = Store(tmp_path / "store")
    monkeypatch.setenv("ENVSHIP_STORE", str(store.layout.root))
    return store


def moved(client: Client, environment_id: EnvironmentId, onlyhere: ModuleType) -> None:
    """Check that everybody runs in the environment, and that its package works there."""
    assert all(place.prefix.endswith(environment_id[:16]) for place in places(client).values())
    status = client.environment_status()
    assert {p.environment_id for p in (status.scheduler, *status.workers.values())} == {environment_id}
    assert client.submit(onlyhere.f, 1, pure=False).result(timeout=30) == 42


def in_fresh(client: Client) -> set[str]:
    """What the module of `fresh` says on each worker."""

    def name() -> str:
        import fresh

        return str(fresh.NAME)

    return set(client.run(name).values())


# -- sources


def test_what_only_the_environment_has_fails_before_and_works_afterwards(
    client: Client, packed: Environment, onlyhere: ModuleType
) -> None:
    """As a task, as a graph that the scheduler unpickles, and as an array: the base environment has no numpy."""
    works = {
        "submit": lambda: client.submit(onlyhere.f, 1, pure=False),
        "delayed": lambda: client.compute(dask.delayed(onlyhere.f, pure=False)(2)),
        "array": lambda: client.compute(dask.array.ones((100, 100), chunks=(50, 50)).sum()),
    }
    for work in works.values():
        with pytest.raises(Exception, match=r"deserialization|onlyhere|numpy"):
            work().result(timeout=30)
    client.use_environment(packed)
    assert {name: work().result(timeout=30) for name, work in works.items()} == {
        "submit": 42,
        "delayed": 43,
        "array": 10_000,
    }


@pytest.mark.heavy
def test_a_prefix(client: Client, prefixes: Prefixes, packed: Environment, onlyhere: ModuleType) -> None:
    assert client.use_environment(prefixes.mine).environment_id == packed.id
    moved(client, packed.id, onlyhere)


def test_a_bundle(
    client: Client,
    client_store: Store,
    empty_store: Store,
    fresh: EnvironmentId,
    onlyhere: ModuleType,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Of a user whose store is empty."""
    bundle = envship.Environment.open(fresh, client_store).save(tmp_path / "mine.envship")
    client.use_environment(bundle)
    moved(client, fresh, onlyhere)
    assert in_fresh(client) == {request.node.name}


@pytest.mark.heavy
def test_an_id_that_only_the_cluster_holds(
    client: Client, client_store: Store, empty_store: Store, fresh: EnvironmentId, onlyhere: ModuleType
) -> None:
    client.stage_environment(envship.Environment.open(fresh, client_store))
    assert client.use_environment(fresh).uploaded_bytes == 0
    moved(client, fresh, onlyhere)


def test_nothing_means_the_environment_of_the_process(
    client: Client,
    cluster: Cluster,
    prefixes: Prefixes,
    packed: Environment,
    client_store: Store,
    onlyhere: ModuleType,
    tmp_path: Path,
) -> None:
    """A user's script, in the environment's own interpreter, which needs envship and what that needs besides."""
    for module in (envship, worker_bootstrap, conda_pack, zstandard):
        package = Path(str(module.__file__)).parent
        (tmp_path / package.name).symlink_to(package)
    done = subprocess.run(
        [prefixes.mine / "bin" / "python", "-c", FROM_A_PROCESS, cluster.address],
        env={**bare_environ(), "ENVSHIP_STORE": str(client_store.layout.root), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [packed.id, str(prefixes.mine), 42]
    moved(client, packed.id, onlyhere)


def test_the_name_of_a_conda_environment(
    client: Client,
    conda_pair: tuple[Path, Path],
    prefixes: Prefixes,
    lab: Path,
    onlyhere: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    named = copy_of(conda_pair[0], tmp_path / "envs" / "analysis")
    monkeypatch.setenv("CONDA_ENVS_PATH", str(named.parent))
    # As pip would have installed it there; the scripts, which name their prefix, are missed.
    [theirs], [ours] = (prefix.glob("lib/python3*/site-packages") for prefix in (prefixes.base, named))
    shutil.copytree(theirs, ours, dirs_exist_ok=True, ignore=shutil.ignore_patterns("pip", "pip-*", "setuptools*"))
    install(named, str(lab / "wheels" / "onlyhere-1.0-py3-none-any.whl"))
    result = client.use_environment("analysis", options=envship.PackOptions(ignore_missing=True))
    assert result.environment_id is not None
    moved(client, result.environment_id, onlyhere)


# -- versions


@pytest.mark.heavy
def test_another_dask_is_refused_unless_that_is_overridden(
    client: Client, packed: Environment, client_store: Store, onlyhere: ModuleType
) -> None:
    other = variant(client_store, packed.manifest, versions={"dask": "2000.1.0"})
    with pytest.raises(IncompatibleEnvironment, match=r"2000\.1\.0"):
        client.use_environment(other)
    assert client.environment_status().target_id is None
    client.use_environment(other, ignore_versions=True)
    moved(client, other, onlyhere)


# -- manifests


def damage(cluster: Cluster, environment_id: EnvironmentId, hosts: str, data: bytes) -> None:
    for host in hosts:
        manifest = Store(cluster.store(host)).layout.manifest(environment_id)
        assert manifest.exists()
        manifest.write_bytes(data)


@pytest.mark.heavy
@pytest.mark.parametrize("build", [True, False], ids=["built", "fetched"])
def test_a_damaged_manifest_is_sent_again(
    client: Client,
    cluster: Cluster,
    packed: Environment,
    fresh: EnvironmentId,
    build: bool,
    request: pytest.FixtureRequest,
) -> None:
    """And never used, whether it is rubbish or that of another environment."""
    client.stage_environment(fresh, build=build)
    damage(cluster, fresh, "a", packed.manifest.to_bytes())
    damage(cluster, fresh, "b", b"{rubbish")
    assert client.use_environment(fresh).environment_id == fresh
    assert in_fresh(client) == {request.node.name}
    for host in "ab":
        assert Store(cluster.store(host)).read_manifest(fresh).id == fresh


@pytest.mark.heavy
@pytest.mark.parametrize("hosts", ["a", "b"], ids=["the scheduler's", "a worker's"])
def test_a_damaged_manifest_is_sent_again_by_those_who_have_it(
    client: Client, cluster: Cluster, fresh: EnvironmentId, hosts: str, empty_store: Store, client_store: Store
) -> None:
    """Where the user has only the id."""
    client.stage_environment(envship.Environment.open(fresh, client_store))
    damage(cluster, fresh, hosts, b"{rubbish")
    assert client.use_environment(fresh).environment_id == fresh
    assert all(place.prefix.endswith(fresh[:16]) for place in places(client).values())


def test_a_manifest_that_is_damaged_everywhere_is_missing(
    client: Client, cluster: Cluster, base_venv: Path, fresh: EnvironmentId, empty_store: Store, client_store: Store
) -> None:
    client.stage_environment(envship.Environment.open(fresh, client_store))
    damage(cluster, fresh, "ab", b"{rubbish")
    with pytest.raises(envship.EnvshipError, match=fresh):
        client.use_environment(fresh)
    assert {place.prefix for place in places(client).values()} == {str(base_venv)}


def test_the_status_passes_a_damaged_manifest_over(
    client: Client, cluster: Cluster, packed: Environment, fresh: EnvironmentId, client_store: Store
) -> None:
    for environment_id in (packed.id, fresh):
        client.stage_environment(envship.Environment.open(environment_id, client_store), build=False)
    damage(cluster, fresh, "ab", b"{rubbish")
    known = client.environment_status().environments
    assert packed.id in known
    assert fresh not in known
