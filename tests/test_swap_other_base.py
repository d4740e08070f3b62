"""A cluster whose own Python is not the client's: what is on the machines matters only until it moves.

Dask's version may differ as far as Dask's own client connects, so the oldest Python is tried with a client of its time.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from envship.cli.machines import bare_environ, make_venv

from .cluster import DASK_VERSIONS, SWAP_MARKS, Cluster
from .interpreters import OLDEST_MINOR, makes_venvs, other_minors

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = [*SWAP_MARKS, pytest.mark.heavy]

CHECKOUT = Path(__file__).resolve().parent.parent
USABLE = {minor: python for minor, python in other_minors().items() if makes_venvs(python)}
NEAR = next((python for minor, python in USABLE.items() if minor > OLDEST_MINOR), None)
PROGRAM = """
import sys
from distributed import Client
import envship

def pythons(client):
    # Functions cannot be sent to another Python.
    return "+".join(sorted({worker.python for worker in client.environment_status().workers.values()}))

with Client(sys.argv[1]) as client:
    client.wait_for_workers(2)
    before = pythons(client)
    result = client.use_environment(progress=False)
    after = pythons(client)
    answer = client.submit(sum, [1, 2]).result(timeout=60)
    client.reset_environment(progress=False)
    print(before, after, answer, pythons(client), result.scheduler_swapped)
"""


def pythons(client: Client) -> set[str]:
    """Versions that the workers run. Functions, which could say so themselves, cannot be sent to another Python."""
    return {worker.python for worker in client.environment_status().workers.values()}


def venv_of(python: str, prefix: Path, *requirements: str) -> Path:
    subprocess.run([python, "-m", "venv", prefix], check=True)
    subprocess.run([prefix / "bin" / "python", "-m", "pip", "install", "-q", *requirements], check=True)
    return prefix


@pytest.fixture(scope="module")
def client(lab: Path, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster that runs another Python, with a nanny and without."""
    assert NEAR is not None
    with Cluster(venv_of(NEAR, lab / "near-base", *DASK_VERSIONS), lab / "near") as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", "--no-nanny", host="b")
        with cluster.client(workers=2) as client:
            yield client


@pytest.mark.skipif(NEAR is None, reason="no other Python that Dask's packages are made for is here")
def test_a_cluster_of_another_python_moves_and_comes_back(
    client: Client, packed: Environment, onlyhere: ModuleType
) -> None:
    before = pythons(client)
    assert before.isdisjoint({packed.python})
    assert client.use_environment(packed).scheduler_swapped
    assert client.submit(onlyhere.f, 1, pure=False).result(timeout=60) == 42
    assert pythons(client) == {packed.python}
    assert client.submit(platform.python_version, pure=False).result(timeout=60) == packed.python
    client.reset_environment()
    assert pythons(client) == before


@pytest.mark.skipif(OLDEST_MINOR not in USABLE, reason="no Python 3.9 here")
def test_the_oldest_python_that_a_cluster_may_have(lab: Path, tmp_path: Path) -> None:
    base = venv_of(USABLE[OLDEST_MINOR], lab / "oldest", "distributed")
    asked = [base / "bin" / "python", "-c", "import distributed, platform; print(distributed.__version__, end='')"]
    dask = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    mine = make_venv(lab / "of-its-time", [f"distributed=={dask}", str(CHECKOUT)])
    with Cluster(base, lab / "oldest-cluster") as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", "--no-nanny", host="b")
        environ = {**bare_environ(), "ENVSHIP_STORE": str(tmp_path / "store")}
        command = [mine / "bin" / "python", "-c", PROGRAM, cluster.address]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    old, new, answer, back, scheduler_swapped = done.stdout.split()
    assert old.startswith(f"3.{OLDEST_MINOR}.")
    assert (new, back) == (".".join(map(str, sys.version_info[:3])), old)
    assert (answer, scheduler_swapped) == ("3", "True")
