"""Clusters of real processes, started from an environment that has ``distributed`` and nothing of ours.

Each *host* is a store of its own (``ENVSHIP_STORE``), whatever machine the tests run on. A cluster ends what it started
and nothing else, and then looks whether anything is left: a process, a port, a temporary file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import dask
import distributed
import numpy
import pytest
from distributed import Client
from distributed.security import Security

from envship.cli.machines import make_venv, write_wheel
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.lock import Lock
from worker_bootstrap.manifest import Manifest, Package
from worker_bootstrap.store import Store

from .environments import package_of
from .guard import RUN, marked

if TYPE_CHECKING:
    from envship.environment import Environment

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
MARK = "ENVSHIP_TEST_CLUSTER"
"""Variable that every process of a cluster inherits, so that no survivor is overlooked."""
DASK_VERSIONS = [f"dask=={dask.__version__}", f"distributed=={distributed.__version__}"]
ONLYHERE = '''"""Only in the packed environment."""

import sys


def f(x):
    return x + 41


def where():
    return sys.prefix
'''
PRELOAD = """
import pathlib, sys

def dask_setup(worker):
    pathlib.Path(worker.local_directory).parent.joinpath("preloaded").write_text(sys.prefix)
"""
"""For ``--preload``: leaves the prefix in which it ran in the worker's local directory."""
TLS_FOLDER = Path(__file__).parent / "tls"

SWAP_MARKS = [
    pytest.mark.timeout(300),
    # The client has numpy and the base environment does not; Dask warns of that whenever a client connects.
    pytest.mark.filterwarnings("ignore:Mismatched versions"),
]
"""For every module that moves clusters."""

_Seen = TypeVar("_Seen")


def eventually(look: Callable[[], _Seen], what: str, timeout_s: float = START_TIMEOUT_S) -> _Seen:
    """Poll *look* until it returns something true; return that."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


class Place(NamedTuple):
    """Where a worker runs."""

    prefix: str
    pid: int
    environ: Mapping[str, str]


def processes(client: Client) -> dict[str, int]:
    """The PID of every worker, by address."""
    return {address: place.pid for address, place in places(client).items()}


@contextlib.contextmanager
def client_in_base(cluster: Cluster, workers: int = 2) -> Iterator[Client]:
    """A client of a cluster in its base environment, where it is brought back to."""
    with cluster.client(workers=workers) as client:
        yield client
        client.reset_environment()
        cluster.wait_for_workers(client, workers)


@contextlib.contextmanager
def client_of_unmoved(cluster: Cluster, workers: int = 2) -> Iterator[Client]:
    """A client of a cluster whose processes are the same, with their data, at the end."""
    with cluster.client(workers=workers) as client:
        kept = client.submit(os.urandom, 16, pure=False)
        value = kept.result(timeout=30)
        before = processes(client)
        yield client
        assert processes(client) == before
        assert client.gather(kept) == value, "data was lost"


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """What the scheduler knows of its workers, by address.

    `Client.scheduler_info` answers from a variable that a refresh in the background now and then fills without them.
    """
    identity: dict[str, dict[str, dict[str, Any]]] = client.sync(client.scheduler.identity, n_workers=-1)
    return identity["workers"]


def places(client: Client) -> dict[str, Place]:
    """Where every worker of the cluster runs, by address."""
    return {address: Place(*row) for address, row in client.run(_look()).items()}


def _look() -> Callable[[], tuple[str, int, dict[str, str]]]:
    # Made in here so that it is pickled by value: the cluster cannot import the tests.
    def look() -> tuple[str, int, dict[str, str]]:
        import os
        import sys

        return sys.prefix, os.getpid(), dict(os.environ)

    return look


class Member:
    """A process that a cluster started."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log_path = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class Cluster:
    """A scheduler and workers as processes of their own.

    Parameters
    ----------
    prefix
        The base environment.
    folder
        For logs, scratch space and temporary files.
    stores
        Where the hosts' stores lie; default: below *folder*, so that nothing is there yet.
    tls
        Encrypt everything, with the certificates in ``tests/tls``.
    environ
        More variables for all processes.
    """

    def __init__(
        self,
        prefix: Path,
        folder: Path,
        *,
        stores: Path | None = None,
        tls: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.prefix = prefix
        self.folder = folder
        self.stores = stores or folder / "stores"
        self.security = _security() if tls else None
        self.members: dict[str, Member] = {}
        self.address = ""
        self._environ = dict(environ or {})
        self._mark = uuid.uuid4().hex
        if stores is None and self.stores.exists():
            # Of the cluster before this one: tests of a module may be shared out in several turns.
            shutil.rmtree(self.stores)
        for path in (self.folder, self.tmp, self.stores):
            path.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        leaks = self.stop()
        if kind is None:
            assert not leaks, leaks
        else:
            # Shown by pytest with the test that failed.
            for member in self.members.values():
                sys.stderr.write(f"--- {member.name}\n{member.log[-6000:]}\n")

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    def store(self, host: str) -> Path:
        """The store of a host."""
        return self.stores / host

    def scratch(self, name: str) -> Path:
        """The local directory that the worker *name* is told to use."""
        return self.folder / "scratch" / name

    def start_scheduler(self, *options: str, host: str = "a", environ: Mapping[str, str] | None = None) -> Member:
        """Start ``dask scheduler`` and wait until it has written its file."""
        file = self.folder / "scheduler.json"
        command = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        member = self._start("scheduler", host, [*command, "--scheduler-file", str(file), *options], environ)

        def address() -> str:
            assert member.alive, member.log
            with contextlib.suppress(FileNotFoundError, ValueError):
                return str(json.loads(file.read_text())["address"])
            return ""

        self.address = eventually(address, "the scheduler writes its file")
        return member

    def start_worker(
        self, name: str, *options: str, host: str = "a", environ: Mapping[str, str] | None = None
    ) -> Member:
        """Start ``dask worker``; it does not wait."""
        command = ["worker", self.address, "--no-dashboard", "--local-directory", str(self.scratch(name))]
        if "--nthreads" not in options:
            command += ["--nthreads", "1"]
        if "--nworkers" not in options:
            command += ["--name", name]
        return self._start(name, host, [*command, *options], environ)

    @contextlib.contextmanager
    def client(self, workers: int = 0, **options: Any) -> Iterator[Client]:
        """A client of this cluster, once *workers* of them are there."""
        with Client(self.address, security=self.security, set_as_default=False, **options) as client:
            if workers:
                self.wait_for_workers(client, workers)
            yield client

    def wait_for_workers(self, client: Client, count: int) -> None:
        def there() -> bool:
            dead = [member for member in self.members.values() if not member.alive]
            assert not dead, f"{dead[0].name} ended:\n{dead[0].log}"
            return len(workers_of(client)) == count

        eventually(there, f"{count} workers")

    def stop(self) -> list[str]:
        """End everything; return what was left over, and end that, too."""
        scheduler = [member for member in self.members.values() if member.name == "scheduler"]
        workers = [member for member in self.members.values() if member.name != "scheduler"]
        leaks = []
        for group in (workers, scheduler):
            for member in group:
                if member.alive:
                    member.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for member in group:
                try:
                    member.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    leaks.append(f"{member.name} ignores SIGTERM:\n{member.log[-3000:]}")
                    member.process.kill()
                    member.process.wait()
        return leaks + self._survivors() + self._leftovers()

    def _survivors(self) -> list[str]:
        deadline = time.monotonic() + 5
        while (left := marked(f"{MARK}={self._mark}")) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"process {pid} is left: {command}" for pid, command in left.items()]

    def _leftovers(self) -> list[str]:
        left = [f"{path} is left" for path in self.tmp.iterdir()]
        left += [f"{path} is left" for path in self.stores.glob("*/tmp/*")]
        if self.address and _listens(self.address):
            left.append(f"{self.address} still listens")
        return left

    def _start(self, name: str, host: str, command: list[str], environ: Mapping[str, str] | None) -> Member:
        assert name not in self.members
        if self.security is not None:
            cert = str(TLS_FOLDER / "cert.pem")
            command += ["--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", str(TLS_FOLDER / "key.pem")]
            if command[0] == "scheduler":
                command += ["--protocol", "tls"]
        log = self.folder / f"{name}.log"
        variables = {
            "PATH": f"{self.prefix / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder),
            "TMPDIR": str(self.tmp),
            # Dask's own, which it does not remove when a process is killed.
            "DASK_TEMPORARY_DIRECTORY": str(self.folder / "scratch"),
            "ENVSHIP_STORE": str(self.store(host)),
            RUN: os.environ[RUN],
            MARK: self._mark,
            **self._environ,
            **(environ or {}),
        }
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [str(self.prefix / "bin" / "dask"), *command],
                env=variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.members[name] = Member(name, process, log)
        return self.members[name]


def _security() -> Security:
    cert, key = str(TLS_FOLDER / "cert.pem"), str(TLS_FOLDER / "key.pem")
    return Security(tls_ca_file=cert, tls_client_cert=cert, tls_client_key=key, require_encryption=True)


def _listens(address: str) -> bool:
    host, port = address.split("://")[1].rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


# -- environments ---------------------------------------------------------------------------------------------------


class Prefixes(NamedTuple):
    """Two venvs: *base* with nothing but distributed, *mine* with numpy and the package ``onlyhere`` as well."""

    base: Path
    mine: Path


@pytest.fixture(scope="session")
def lab() -> Iterator[Path]:
    """A folder for the session. Short, because shebangs are."""
    with tempfile.TemporaryDirectory(prefix="lab-", dir=os.environ[RUN]) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def prefixes(lab: Path) -> Prefixes:
    """Both venvs, made at the same time, by one of the processes that run the tests."""
    wheel = write_wheel(lab / "wheels", "onlyhere", "1.0", ONLYHERE)
    mine = [*DASK_VERSIONS, f"numpy=={numpy.__version__}", wheel]
    with ThreadPoolExecutor(2) as pool:
        return Prefixes(*pool.map(_kept_venv, ("base", "mine"), (DASK_VERSIONS, mine)))


def _kept_venv(name: str, requirements: Sequence[str | Path]) -> Path:
    digest = digest_of(repr([sys.executable, *(Path(r).name for r in requirements)]).encode())
    prefix = Path(os.environ[RUN]) / f"{name}-{digest[:8]}"
    with Lock(prefix.with_suffix(".lock")):
        if not (prefix / "complete").exists():
            shutil.rmtree(prefix, ignore_errors=True)
            make_venv(prefix, requirements)
            (prefix / "complete").touch()
    return prefix


@pytest.fixture(scope="session")
def base_venv(prefixes: Prefixes) -> Path:
    """A bare environment: ``distributed``, nothing of ours, no ``zstandard``, no ``numpy``."""
    return prefixes.base


@pytest.fixture(scope="session")
def client_store(lab: Path) -> Store:
    """The store of the user's machine."""
    return Store(lab / "client")


@pytest.fixture(scope="session")
def packed(prefixes: Prefixes, client_store: Store) -> Environment:
    """The environment with ``numpy`` and ``onlyhere``, packed."""
    from envship.pack import pack

    return pack(prefixes.mine, store=client_store)


@pytest.fixture(scope="session")
def warm_stores(lab: Path) -> Path:
    """Stores that live as long as the session: an environment is built there once for all tests that do not mind."""
    return lab / "stores"


@pytest.fixture(scope="module")
def onlyhere(lab: Path, client_store: Store) -> Iterator[ModuleType]:
    """The user's side: the client's store is the default one, and ``onlyhere`` can be imported."""
    source = lab / "source"
    source.mkdir(exist_ok=True)
    (source / "onlyhere.py").write_text(ONLYHERE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENVSHIP_STORE", str(client_store.layout.root))
        patch.syspath_prepend(str(source))
        yield importlib.import_module("onlyhere")
        sys.modules.pop("onlyhere", None)


def variant(
    store: Store,
    manifest: Manifest,
    files: Mapping[str, bytes] | None = None,
    *,
    without: str = "",
    versions: Mapping[str, str] | None = None,
    platform: str = "",
    python: str = "",
) -> EnvironmentId:
    """Another environment in *store*, made from *manifest*: more files, a package less, other versions; its id.

    Paths of *files* may hold ``{site}``, the folder of site-packages.
    """
    packages = [package for package in manifest.packages if package.name != without]
    packages = [package._replace(version=(versions or {}).get(package.name, package.version)) for package in packages]
    if files:
        minor = ".".join(manifest.python.split(".")[:2])
        named = {path.format(site=f"lib/python{minor}/site-packages"): data for path, data in files.items()}
        extra: Package = package_of(store, named, "variant", "1", chunk_bytes=1 << 20)
        packages.append(extra)
    made = Manifest(platform or manifest.platform, python or manifest.python, packages, manifest.environ)
    return store.write_manifest(made)
