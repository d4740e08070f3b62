"""`LocalCluster`: nannies and scheduler live in the user's process, which is left alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

import envship  # noqa: F401  adds the methods to the client
from worker_bootstrap.errors import NotSwappable

from .cluster import SWAP_MARKS, eventually, places, workers_of

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS


@pytest.fixture
def local(tmp_path: Path, onlyhere: ModuleType) -> Iterator[Client]:
    """A local cluster of two workers; afterwards no child of this process is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    scratch = str(tmp_path)
    with (
        dask.config.set({"temporary-directory": scratch}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            local_directory=scratch,
            host="127.0.0.1",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client

    def left() -> set[int]:
        return {c.pid for c in psutil.Process().children(recursive=True) if c.pid not in before and not _is_dasks(c)}

    eventually(lambda: not left(), "every child has ended", timeout_s=20)


def test_workers_move_and_the_users_process_does_not(local: Client, packed: Environment, onlyhere: ModuleType) -> None:
    me = (os.getpid(), sys.prefix, sys.executable)
    result = local.use_environment(packed)
    assert not result.scheduler_swapped
    assert result.workers == 2
    assert (os.getpid(), sys.prefix, sys.executable) == me
    assert local.run_on_scheduler(os.getpid) == os.getpid()
    assert all(place.prefix.endswith(packed.id[:16]) for place in places(local).values())
    assert local.submit(onlyhere.f, 1).result(timeout=30) == 42


@pytest.mark.heavy
def test_restart_and_reset(local: Client, packed: Environment) -> None:
    local.use_environment(packed)
    local.restart()
    assert all(place.prefix.endswith(packed.id[:16]) for place in places(local).values())
    local.reset_environment()
    assert {place.prefix for place in places(local).values()} == {sys.prefix}


@pytest.mark.heavy
def test_workers_that_are_added_later_are_in_the_environment(local: Client, packed: Environment) -> None:
    local.use_environment(packed)
    local.cluster.scale(3)
    eventually(lambda: len(workers_of(local)) == 3, "the third worker")
    assert all(place.prefix.endswith(packed.id[:16]) for place in places(local).values())


def test_threads_of_the_users_process_cannot_move(packed: Environment, onlyhere: ModuleType) -> None:
    with (
        LocalCluster(processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        with pytest.raises(NotSwappable, match="process"):
            client.use_environment(packed)
        assert client.submit(int, "3").result(timeout=10) == 3


def _is_dasks(process: psutil.Process) -> bool:
    """Whether a process is the helper that `multiprocessing` keeps. One that ended and was not waited for is not."""
    with contextlib.suppress(psutil.Error):
        return "resource_tracker" in " ".join(process.cmdline())
    return False
