"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from envship.environment import Environment
from envship.pack import pack
from worker_bootstrap.store import Store

from .cluster import base_venv, client_store, lab, onlyhere, packed, prefixes, warm_stores
from .guard import RUN, start_guard
from .leaks import no_leaks
from .prefixes import conda_environments, onlyhere_wheel, small_venv

__all__ = ["base_venv", "client_store", "lab", "no_leaks", "onlyhere", "packed", "prefixes", "warm_stores"]


def pytest_configure(config: pytest.Config) -> None:
    """End on SIGTERM as on Ctrl-C: by way of the fixtures, which end the clusters that they started.

    The folder of the run is named before pytest-xdist starts its processes, which inherit the name and share the venvs
    there. What a run leaves that is killed, the guard removes.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if RUN not in os.environ:
        folder = tempfile.mkdtemp(prefix="envship-tests-")  # short, because shebangs are
        config.add_cleanup(start_guard(folder).communicate)
        os.environ[RUN] = folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store for the session: packing into it a second time is quick."""
    return Store(tmp_path_factory.mktemp("shared") / "store")


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with nothing but ``onlyhere``. Not to be changed: copy, or make one with `prefixes.small_venv`."""
    folder = tmp_path_factory.mktemp("venv")
    return small_venv(folder / "env", [onlyhere_wheel(folder)])


@pytest.fixture(scope="session")
def conda_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same conda packages at two prefixes, of unlike length. Not to be changed."""
    pytest.importorskip("rattler")
    pytest.importorskip("rattler_build")
    folder = tmp_path_factory.mktemp("conda")
    pair = folder / "env", folder / "at" / "a-longer-path" / "environment"
    conda_environments(folder, *pair)
    return pair


@pytest.fixture(scope="session")
def conda_environment(conda_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The first of the pair, packed into a store where nothing is ever built: build it in a store that reads this."""
    return pack(conda_pair[0], store=Store(tmp_path_factory.mktemp("conda-chunks") / "store"))
