"""A small cluster on this machine whose processes and environments are real: for the demo and the benchmarks.

Scheduler and workers are processes of their own, started from whatever prefix is given. Each *machine* is a folder with
a store of its own, so that two of them exchange chunks as two hosts would. Everything lies below one folder, and
nothing is left running when the block ends, however it ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from distributed import Client

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.02


class MachinesError(click.ClickException):
    """A command or a process of the little cluster failed; the message holds the end of what it printed."""


def make_venv(prefix: Path, requirements: Sequence[str | Path]) -> Path:
    """Make a venv of this interpreter at *prefix*, with *requirements* (as pip takes them) and their byte code.

    Raises
    ------
    MachinesError
        If ``venv`` or ``pip`` fails.
    """
    _run([sys.executable, "-m", "venv", str(prefix)])
    pip = [str(prefix / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *map(str, requirements)])
    return prefix


def write_wheel(folder: Path, name: str, version: str, source: str) -> Path:
    """Write a wheel of one module, *name*, with the text *source*. Needs no build tool.

    Source
    ------
    Binary distribution format, https://packaging.python.org/specifications/binary-distribution-format
    """
    info = f"{name}-{version}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: envship\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": tags,
    }
    record = "".join(f"{path},sha256={_record_hash(text)},{len(text.encode())}\n" for path, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


class LittleCluster:
    """A scheduler and workers, each a process of its own, started from the environment at *prefix*.

    Parameters
    ----------
    prefix
        The base environment: a venv or conda prefix with ``distributed``.
    folder
        Where stores, logs and scratch space go.
    workers
        How many workers, each under a nanny. Each has a machine of its own; the scheduler shares that of the first.
    environ
        Variables to set in all processes.
    """

    def __init__(
        self,
        prefix: Path,
        folder: Path,
        workers: int = 2,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.prefix = prefix
        self.folder = folder
        self.address = ""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._workers = workers
        self._environ = dict(environ or {})

    def __enter__(self) -> LittleCluster:
        try:
            self._start_scheduler()
            for number in range(self._workers):
                self.start_worker(number)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start_worker(self, number: int, *options: str) -> str:
        """Start one more worker, on the machine with that number; return its name. Does not wait for it."""
        name = f"worker-{number}"
        arguments = ["--name", name, "--nthreads", "1", *options]
        self._start(name, number, ["worker", self.address, *arguments])
        return name

    def wait_for_workers(self, client: Client) -> None:
        """Wait until *client* sees every worker that was started.

        Raises
        ------
        MachinesError
            If one has ended, or they take too long; with what it printed.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        workers = [name for name in self.processes if name != "scheduler"]
        while len(client.nthreads()) < len(workers):
            for name in workers:
                self._check_alive(name)
            if time.monotonic() > deadline:
                raise MachinesError(f"not all workers registered:\n{self.log(workers[-1])[-2000:]}")
            time.sleep(POLL_S)

    def stop_worker(self, number: int) -> None:
        """End the worker with that number."""
        _end([self.processes.pop(f"worker-{number}")])

    def stop(self) -> None:
        """End every process that was started, and whatever these have started. Idempotent."""
        # Workers first: one that has lost its scheduler tries for 8 s to say good-bye to it.
        scheduler = [process for name, process in self.processes.items() if name == "scheduler"]
        _end([process for process in self.processes.values() if process not in scheduler])
        _end(scheduler)
        self.processes.clear()

    def log(self, name: str) -> str:
        """What the process of that name has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start_scheduler(self) -> None:
        file = self.folder / "scheduler.json"
        where = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        self._start("scheduler", 0, ["scheduler", *where, "--scheduler-file", str(file)])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (file.exists() and file.stat().st_size):
            self._check_alive("scheduler")
            if time.monotonic() > deadline:
                raise MachinesError(f"the scheduler did not start:\n{self.log('scheduler')[-2000:]}")
            time.sleep(POLL_S)
        self.address = json.loads(file.read_text())["address"]

    def _start(self, name: str, number: int, arguments: Sequence[str]) -> None:
        machine = self.folder / f"machine-{number}"
        machine.mkdir(parents=True, exist_ok=True)
        own = {"ENVSHIP_STORE": str(machine / "store"), "DASK_TEMPORARY_DIRECTORY": str(machine / "scratch")}
        environ = {**bare_environ(), **self._environ, **own}
        with open(self.folder / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(self.prefix / "bin" / "python"), "-m", "dask", *arguments],
                cwd=machine,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _check_alive(self, name: str) -> None:
        if _ended(self.processes[name]):
            raise MachinesError(f"{name} ended at once:\n{self.log(name)[-2000:]}")


def bare_environ() -> dict[str, str]:
    """This process's environment variables without those that would reach into another Python, Dask or envship."""
    foreign = ("PYTHON", "DASK_", "ENVSHIP_", "CONDA_", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if not _ended(process):
            os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not all(map(_ended, processes)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in processes:
        # Each process leads a group of its own: what it left behind is found even if it was killed. Not reaped yet, it
        # still holds the number of that group, so nobody else's group can be hit.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether *process* has ended, without reaping it."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _run(command: Sequence[str]) -> None:
    merged = subprocess.STDOUT  # errors in between the output, as a person would have seen them
    done = subprocess.run(command, env=bare_environ(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=merged)
    if done.returncode:
        raise MachinesError(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")


def _record_hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
