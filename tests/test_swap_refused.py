"""What is refused before anything is packed, uploaded or moved: the cluster goes on as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import dask
import pytest
from distributed import Client, LocalCluster

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.errors import IncompatibleEnvironment, NotSwappable, PrepareFailed, SettingInvalid
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster, Prefixes, client_of_unmoved, variant

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS

PRELOADED = "soon_gone.py"


@pytest.fixture
def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was packed first")

    monkeypatch.setattr("envship.journey.resolve", resolve)


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    """A scheduler, a nanny, and a worker without one that preloads a file."""
    (lab / PRELOADED).write_text("")
    with Cluster(base_venv, lab / "refused", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", "--no-nanny", "--preload", str(lab / PRELOADED), host="b")
        yield cluster


@pytest.fixture
def client(cluster: Cluster, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster whose processes, and data, are the same when the test is over."""
    with client_of_unmoved(cluster) as client:
        yield client


@pytest.mark.usefixtures("nothing_is_packed")
def test_threads_of_this_process_are_refused_before_anything_is_packed(prefixes: Prefixes) -> None:
    with (
        LocalCluster(processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(NotSwappable, match=r"threads of this process.*processes=True"),
    ):
        client.use_environment(str(prefixes.mine))


@pytest.mark.usefixtures("nothing_is_packed")
def test_a_scheduler_without_plugins_is_refused_before_anything_is_packed(
    base_venv: Path, tmp_path: Path, prefixes: Prefixes, onlyhere: ModuleType
) -> None:
    blocked = {"DASK_DISTRIBUTED__SCHEDULER__BLOCKED_HANDLERS": "['register_scheduler_plugin']"}
    with Cluster(base_venv, tmp_path / "c", environ=blocked) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1")
        with (
            client_of_unmoved(cluster, workers=1) as client,
            pytest.raises(NotSwappable, match="does not accept plugins"),
        ):
            client.use_environment(str(prefixes.mine))


@pytest.mark.usefixtures("nothing_is_packed")
@pytest.mark.parametrize("timeout", ["soon", "", 0, -1, float("inf"), float("nan"), [], "1e99h"])
def test_a_timeout_that_is_none_is_refused_before_anything_is_packed(
    client: Client, prefixes: Prefixes, timeout: Any
) -> None:
    with pytest.raises(ValueError, match=r"timeout=.*: expected a duration"):
        client.use_environment(str(prefixes.mine), timeout=timeout)
    with pytest.raises(ValueError, match=r"timeout=.*: expected a duration"):
        client.reset_environment(timeout=timeout)


@pytest.mark.usefixtures("nothing_is_packed")
def test_a_setting_that_means_nothing_is_refused_before_anything_is_packed(client: Client, prefixes: Prefixes) -> None:
    for setting in ("timeouts.commit", "rate-limit", "keep-warm", "link-mode"):
        with dask.config.set({f"envship.{setting}": "nonsense"}):
            for move in (client.use_environment, client.stage_environment):
                with pytest.raises(SettingInvalid, match=setting):
                    move(str(prefixes.mine))


def test_versions_are_compared_also_where_only_the_cluster_holds_the_environment(
    client: Client, packed: Environment, client_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = variant(client_store, packed.manifest, versions={"dask": "2000.1.0"})
    client.stage_environment(other, build=False)
    monkeypatch.setenv("ENVSHIP_STORE", str(tmp_path / "empty"))
    with pytest.raises(IncompatibleEnvironment, match=r"2000\.1\.0"):
        client.use_environment(other)


def test_a_worker_whose_preload_is_gone(client: Client, packed: Environment, lab: Path) -> None:
    """Found while everything still runs, although this worker's process is replaced and not started beside."""
    (lab / PRELOADED).unlink()
    with pytest.raises(PrepareFailed) as caught:
        client.use_environment(packed, scheduler=False)
    [cause] = caught.value.causes.values()
    assert f"{PRELOADED}' is to be preloaded, and this environment lacks it" in cause
