"""Re-executing this process inside an environment: same PID, same arguments.

``execve`` replaces the interpreter; the kernel closes our sockets, and leases survive until the process has arrived.
The stub that runs first in the new interpreter imports everything before it gives up the way back: if the import fails,
it executes the interpreter that we came from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from worker_bootstrap.interpreter import ENVIRONMENT_VARIABLE, FAILED_VARIABLE, Interpreter, with_base
from worker_bootstrap.launch import Launch, recognise
from worker_bootstrap.quick_import import compile_ours, import_dask, quickly

logger = logging.getLogger("envship.reexec")

ORDERS_VARIABLE = "ENVSHIP_ORDERS"
STATE_VARIABLE = "ENVSHIP_SCHEDULER_STATE"
CARRIED_VARIABLES = (STATE_VARIABLE,)
"""What every re-executed process takes along, whatever its environment."""
STUB = (
    "import gc, sys; gc.disable(); sys.dont_write_bytecode = True; sys.path[:1] = [sys.argv.pop(1)];"
    "from worker_bootstrap.reexec import main; main()"
)
WAIT_INTERVAL_S = 0.02
ARRIVAL_SHARE = 0.6
"""Of the time that a commit may take: whoever does not arrive shall have gone back, and say so, before it is over."""


class Orders(NamedTuple):
    """What the stub is to do.

    *extra* arguments are appended to the command line; *wait_for* is a (host, port) that must accept a connection
    first; *arrival_timeout_s* is how long it may take from then on to get where it is sent; *lease* is the file that
    holds the environment; *fallback* is the way back, as (python, variables, lease); *inherited* are the descriptors of
    leases that the process held before.
    """

    code: str
    extra: Sequence[str] = ()
    wait_for: tuple[str, int] | None = None
    wait_timeout_s: float = 60.0
    arrival_timeout_s: float = 60.0
    lease: str | None = None
    fallback: tuple[str, dict[str, str], str | None] | None = None
    inherited: Sequence[int] = ()


def execute(interpreter: Interpreter, base: Interpreter, launch: Launch, orders: Orders, folder: Path) -> NoReturn:
    """Replace this process. Does not return, unless the interpreter cannot be executed.

    Parameters
    ----------
    base
        What the process was first started with, remembered for the way back.
    folder
        Where the orders are left for the stub; a private file, removed by it.

    Raises
    ------
    OSError
        If the kernel refuses to execute the interpreter. The process goes on.
    """
    _replace_process(interpreter.python, with_base(interpreter, base).environ, launch, orders, folder)


class Arrival:
    """Whether this process has got where it was sent: a worker is registered, a scheduler has taken over.

    Until then, it holds the environment that it came from as well.
    """

    done = False
    inherited: Sequence[int] = ()
    lock = threading.Lock()
    """Held by who arrives, and by who gives up."""

    @classmethod
    def arrive(cls) -> None:
        """It has: there is no way back any more, and what lies there may be evicted."""
        with cls.lock:
            cls.done = True
            for lease in cls.inherited:
                with contextlib.suppress(OSError):
                    os.close(lease)
            cls.inherited = ()


def main() -> None:
    """Entry of the stub, in the new interpreter."""
    path = Path(os.environ.pop(ORDERS_VARIABLE))
    orders = Orders(**json.loads(path.read_text()))
    path.unlink()
    Arrival.inherited = orders.inherited
    sys.argv[:1] = []
    launch = recognise(sys.argv)
    assert launch is not None
    sys.path.append(sys.path.pop(0))
    try:
        compile_ours(orders.code)
        _hold(orders.lease)
        with quickly(orders.code):
            import_dask()
            command = importlib.import_module(launch.module).main
            _import_services(launch.kind)
        if orders.wait_for is not None:
            _wait_for(*orders.wait_for, timeout_s=orders.wait_timeout_s)
        if orders.fallback is not None:
            _go_back_unless_arrived(orders, launch, path.parent)
        command(args=[*launch.arguments, *orders.extra], prog_name=" ".join(("dask", launch.kind)))
    except BaseException as error:
        if Arrival.done or orders.fallback is None or (isinstance(error, SystemExit) and not error.code):
            raise
        _go_back(orders, launch, error, path.parent)


def _import_services(kind: str) -> None:
    """Import what a scheduler or worker serves over HTTP, the dashboard if there is one, while this is cheap."""
    import dask

    routes = dask.config.get(f"distributed.{kind}.http.routes", [])
    for name in (*routes, f"distributed.dashboard.{kind}"):
        with contextlib.suppress(ImportError):  # whoever needs it says so later
            importlib.import_module(name)


def _go_back_unless_arrived(orders: Orders, launch: Launch, folder: Path) -> None:
    """Have a thread go back if this process hangs: nobody else could."""

    def late() -> None:
        with Arrival.lock:
            if not Arrival.done:
                error = TimeoutError(f"it has not arrived after {orders.arrival_timeout_s:.0f} s")
                _go_back(orders, launch, error, folder)

    timer = threading.Timer(orders.arrival_timeout_s, late)
    timer.name, timer.daemon = "envship-arrival", True
    timer.start()


def _go_back(orders: Orders, launch: Launch, error: BaseException, folder: Path) -> NoReturn:
    """Execute the interpreter that we came from: this one cannot run what it should."""
    assert orders.fallback is not None
    python, environ, lease = orders.fallback
    logger.error("%s does not work for `dask %s` (%r): back to %s", sys.prefix, launch.kind, error, python)
    again = orders._replace(fallback=None, lease=lease)
    environ = {**environ, FAILED_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE, "")}
    _replace_process(python, environ, launch, again, folder)


def _replace_process(python: str, environ: Mapping[str, str], launch: Launch, orders: Orders, folder: Path) -> NoReturn:
    from worker_bootstrap.lock import passed_on

    with passed_on() as leases:
        orders = orders._replace(inherited=[*Arrival.inherited, *leases])
        handle, path = tempfile.mkstemp(dir=folder, suffix=".orders")
        with os.fdopen(handle, "w") as file:
            json.dump(orders._asdict(), file)
        kept = {name: os.environ[name] for name in CARRIED_VARIABLES if name in os.environ}
        variables = {**environ, **kept, ORDERS_VARIABLE: path}
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execve(python, [python, "-c", STUB, orders.code, *launch.argv], variables)
        except OSError:
            Path(path).unlink()
            raise


def arrival_timeout_s(options: Mapping[str, Any]) -> float:
    """How long a worker may take to register, once it may, where a commit has the time that *options* give it."""
    return ARRIVAL_SHARE * float(options["commit_timeout_s"])


def _hold(lease: str | None) -> None:
    if lease is not None:
        from worker_bootstrap.lock import Lease

        Lease(Path(lease)).hold()


def _wait_for(host: str, port: int, timeout_s: float) -> None:
    """Wait until the scheduler listens: Dask's own back-off would overshoot by a second."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            time.sleep(WAIT_INTERVAL_S)


def pinned(launch: Launch, port: int, dashboard_port: int | None) -> list[str]:
    """Arguments that make a scheduler come back at the ports that it has now; later options win."""
    extra: list[str] = []
    given = option(launch.arguments, "--port")
    host = option(launch.arguments, "--host") or ""
    if (given is None or "," not in given) and str(port) != (given or "8786") and not _has_port(host):
        extra += ["--port", str(port)]
    if dashboard_port:
        address = option(launch.arguments, "--dashboard-address") or ""
        host_part = address.rpartition(":")[0]
        extra += ["--dashboard-address", f"{host_part}:{dashboard_port}"]
    return extra


def _has_port(host: str) -> bool:
    last = host.rpartition(":")[2]
    return last.isdigit() and last != "0"


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value that *arguments* give to the option *name*: the last one, as click has it."""
    found: str | None = None
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(name + "="):
            found = argument[len(name) + 1 :]
    return found


def dialled(address: str) -> tuple[str, int]:
    """(host, port) of a Dask address such as ``tls://10.0.0.1:8786``."""
    from distributed.comm import parse_host_port

    location = address.split("://")[-1]
    host, port = parse_host_port(location)
    return str(host), int(port)
