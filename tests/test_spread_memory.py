"""What a spread takes of the memory of real processes: `docs/architecture.md` states the bound, whatever the size."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

import pytest

import envship  # noqa: F401  # adds the methods to Client
from envship.environment import Environment
from envship.road import Road
from worker_bootstrap.assignments import BATCH_LIMIT_BYTES, PARALLEL
from worker_bootstrap.store import Store
from worker_bootstrap.transfer import UPLOADS

from .cluster import SWAP_MARKS, Cluster
from .environments import environment_of, package_of

pytestmark = [
    *SWAP_MARKS,
    pytest.mark.heavy,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is a matter of Linux"),
]
BOUND_BYTES = (3 * PARALLEL + UPLOADS) * BATCH_LIMIT_BYTES
"""Of an agent: what it fetches, twice while it is decompressed, what it serves, and what a client uploads to it."""
HOSTS = ("b", "c")


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def forget_peak(pid: int) -> int:
    """Let the peak of a process begin anew; returns what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_bytes(pid)


@pytest.mark.parametrize("relayed", [False, True], ids=["straight", "by way of the scheduler"])
def test_no_process_ever_holds_an_environment(
    base_venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relayed: bool
) -> None:
    """A scheduler that passes on what a client cannot bring itself holds those messages, too; it is a host besides."""

    async def unreachable(road: Road, addresses: Collection[str]) -> None:
        road._reached.update(dict.fromkeys(addresses, False))

    if relayed:
        monkeypatch.setattr(Road, "explore", unreachable)
    store = Store(tmp_path / "client")
    files = {f"lib/{number}": os.urandom(64 << 20) for number in range(12)}
    environment = Environment(environment_of(store, [package_of(store, files, chunk_bytes=1 << 20)]), store)
    size_bytes = environment.nbytes
    assert size_bytes > 2 * BOUND_BYTES + UPLOADS * BATCH_LIMIT_BYTES
    del files
    with Cluster(base_venv, tmp_path / "cluster") as cluster:
        cluster.start_scheduler()
        for host in HOSTS:
            cluster.start_worker(host, "--no-nanny", host=host)
        with cluster.client(workers=len(HOSTS)) as client:
            client.environment_status()
            before = {name: forget_peak(member.pid) for name, member in cluster.members.items()}
            result = client.stage_environment(environment, build=False, progress=False)
            grown = {name: peak_bytes(member.pid) - before[name] for name, member in cluster.members.items()}
    assert result.uploaded_bytes >= size_bytes
    relaying = UPLOADS * BATCH_LIMIT_BYTES if relayed else 0
    for name, growth in grown.items():
        assert growth <= BOUND_BYTES + (relaying if name == "scheduler" else 0), grown
