"""Spreading where the network is not one flat thing: namespaces, links and cuts, made here and removed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.lab import Lab, obstacle
from envship.environment import Environment
from worker_bootstrap.store import Store

from .cluster import eventually
from .environments import environment_of, package_of

MISSING = obstacle(["ip", "tc"])
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.timeout(300),
]
HOSTS = ("scheduler", "one", "two", "client")
CUT_S = 10.0
CLIENT = """
import json, sys
from distributed import Client
import envship
with Client(sys.argv[1], timeout=60) as client:
    client.wait_for_workers(2, timeout=120)
    result = client.stage_environment(sys.argv[2], progress=False)
    received = [dict(host.received) for host in client.environment_status().hosts.values()]
    print(json.dumps({"chunks": result.uploaded_chunks, "hosts": result.hosts, "received": received}))
"""


def variables(folder: Path, host: str) -> dict[str, str]:
    return {**os.environ, "ENVSHIP_STORE": str(folder / host), "TMPDIR": str(folder), "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def network(base_venv: Path, tmp_path: Path) -> Iterator[Lab]:
    """A scheduler and two workers, each in a namespace of its own, and one for the client."""
    with Lab(HOSTS, 400, tmp_path) as lab:
        dask = base_venv / "bin" / "dask"
        at = lab.address("scheduler")
        common = ["--no-dashboard"]
        command = [dask, "scheduler", "--host", at, "--port", "8786", *common]
        lab.start("scheduler", "scheduler", command, variables(tmp_path, "scheduler"))
        for host in ("one", "two"):
            options = ["--host", lab.address(host), "--no-nanny", "--nthreads", "1", "--name", host, *common]
            folder = ["--local-directory", str(tmp_path / f"scratch-{host}")]
            lab.start(host, host, [dask, "worker", f"tcp://{at}:8786", *options, *folder], variables(tmp_path, host))
        yield lab


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    store = Store(tmp_path / "client")
    package = package_of(store, {"lib/data": os.urandom(16 << 20)}, chunk_bytes=1 << 20)
    return Environment(environment_of(store, [package]), store)


def client_command(network: Lab, environment: Environment) -> list[str]:
    scheduler = f"tcp://{network.address('scheduler')}:8786"
    return [sys.executable, "-c", CLIENT, scheduler, environment.id]


def all_built(folder: Path, environment: Environment) -> bool:
    return all(Store(folder / host).built(environment.id) for host in ("scheduler", "one", "two"))


@pytest.mark.heavy
def test_a_client_that_reaches_only_the_scheduler_uploads_through_it(
    network: Lab, environment: Environment, tmp_path: Path
) -> None:
    """To different hosts in turn all the same, and each chunk once."""
    namespace = network._namespace("client")
    for host in ("one", "two"):
        address = f"{network.address(host)}/32"
        subprocess.run(["ip", "-n", namespace, "route", "add", "unreachable", address], check=True)
    run = variables(tmp_path, "client")
    answer = json.loads(network.run("client", "client", client_command(network, environment), run).splitlines()[-1])
    assert answer["chunks"] == len(environment.chunks)
    assert all_built(tmp_path, environment)
    assert len([host for host in answer["received"] if host.get("client")]) == 3
    sent_bytes, _ = network.carried_bytes("client")
    assert sent_bytes < 1.1 * (16 << 20)


@pytest.mark.heavy
def test_a_network_that_was_cut_in_two_finds_together_again(
    network: Lab, environment: Environment, tmp_path: Path
) -> None:
    """A host that cannot be heard for ten seconds gets the rest when it can; the others go on meanwhile.

    After thirty, Dask itself gives it up: it is then a host that died.
    """
    network.set_rate("client", 20)
    process = network.start("client", "client", client_command(network, environment), variables(tmp_path, "client"))
    stores = {host: Store(tmp_path / host) for host in ("one", "two")}

    def begun() -> bool:
        missing = stores["two"].missing(environment.chunks)
        return 2 <= len(missing) < len(environment.chunks)

    eventually(begun, "the host has some of the chunks")
    network.cut("two", down=True)
    others = stores["one"]
    cut_s, had = time.monotonic(), len(others.missing(environment.chunks))
    eventually(lambda: len(others.missing(environment.chunks)) < had or not had, "the others go on")
    eventually(lambda: time.monotonic() - cut_s > CUT_S, "batches to and from it time out")
    assert stores["two"].missing(environment.chunks)
    network.cut("two", down=False)
    network.wait("client", process, 200)
    assert all_built(tmp_path, environment)
