"""A Dask cluster in a `benchmarks.lab`: the scheduler, every worker and the client each on a host of its own.

Processes are ``dask scheduler`` and ``dask worker`` as a person would start them, from a base environment that holds
``distributed`` and ``zstandard`` and nothing of envship. Each host has a store of its own.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab import Lab
from envship.cli.machines import bare_environ

CHECKOUT = Path(__file__).resolve().parent.parent
PORT = 8786
FETCHED = re.compile(r"^(\S+ \S+) - envship\.provision - INFO - environment \w+: \d+ chunks fetched", re.MULTILINE)


def host_names(count: int) -> list[str]:
    """Names of so many hosts."""
    return [f"host{number}" for number in range(count)]


class LabCluster:
    """A scheduler, and a worker on each of *hosts*.

    Parameters
    ----------
    lab
        Has a host for each name in *hosts*, and two that are called ``scheduler`` and ``client``.
    python
        The interpreter of the base environment.
    store
        The client's store.
    """

    def __init__(self, lab: Lab, hosts: Sequence[str], python: Path, store: Path, nanny: bool = True) -> None:
        self.lab = lab
        self.hosts = tuple(hosts)
        self.address = f"tcp://{lab.address('scheduler')}:{PORT}"
        self._store = store
        where = ["--host", lab.address("scheduler"), "--port", PORT, "--no-dashboard"]
        self._start("scheduler", [python, "-m", "dask", "scheduler", *where])
        for name in self.hosts:
            where = ["--host", lab.address(name), "--name", name, "--no-dashboard", "--nthreads", 1]
            more = ["--memory-limit", 0, "--nanny" if nanny else "--no-nanny"]
            self._start(name, [python, "-m", "dask", "worker", self.address, *where, *more])

    def client(self, *arguments: str | int, timeout_s: float = 900.0) -> dict[str, Any]:
        """Run `benchmarks.spread_client` on the client's host; returns its answer."""
        environ = {**bare_environ(), "ENVSHIP_STORE": str(self._store), "PYTHONPATH": str(CHECKOUT)}
        method, *rest = arguments
        program = CHECKOUT / "benchmarks" / "spread_client.py"
        command = [sys.executable, "-W", "ignore", program, method, self.address, len(self.hosts), *rest]
        printed = self.lab.run("client", "client", [str(part) for part in command], environ, timeout_s)
        answer: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        return answer

    def fetched_s(self, since: float) -> dict[str, float]:
        """When each host, and the scheduler's, had all chunks: seconds after the time *since*."""
        found = {}
        for name in ("scheduler", *self.hosts):
            times = [datetime.datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f") for text in self._noted(name)]
            after = [moment.timestamp() - since for moment in times if moment.timestamp() > since]
            if after:
                found[name] = after[-1]
        return found

    def _noted(self, name: str) -> list[str]:
        return FETCHED.findall(self.lab.log(name))

    def _start(self, name: str, command: Sequence[Any]) -> None:
        folder = self.lab.folder / name
        folder.mkdir(exist_ok=True)
        environ: Mapping[str, str] = {
            **bare_environ(),
            "ENVSHIP_STORE": str(folder / "store"),
            "DASK_TEMPORARY_DIRECTORY": str(folder),
            "DASK_LOGGING__ENVSHIP": "info",
            # It looks at threads a hundred times a second: where sixteen machines share two cores, that counts.
            "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        }
        self.lab.start(name, name, [str(part) for part in command], environ, folder)
