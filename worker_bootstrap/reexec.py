"""Re-executing this process inside an environment: same PID, same arguments.

``execve`` replaces the interpreter; the kernel closes our sockets, the descriptors that are meant to survive (leases)
survive. The stub that runs first in the new interpreter imports everything before it gives up the way back: if the
import fails, it executes the interpreter that we came from.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from worker_bootstrap.interpreter import Interpreter, with_base
from worker_bootstrap.launch import Launch, recognise

logger = logging.getLogger("envship.reexec")

ORDERS_VARIABLE = "ENVSHIP_ORDERS"
STUB = "import sys; sys.path[:1] = [sys.argv.pop(1)]; from worker_bootstrap.reexec import main; main()"
WAIT_INTERVAL_S = 0.02


class Orders(NamedTuple):
    """What the stub is to do.

    *extra* arguments are appended to the command line; *wait_for* is a (host, port) that must accept a connection
    first; *lease* is the file that holds the environment; *fallback* is the way back, as (python, variables).
    """

    code: str
    extra: Sequence[str] = ()
    wait_for: tuple[str, int] | None = None
    wait_timeout_s: float = 60.0
    lease: str | None = None
    fallback: tuple[str, dict[str, str]] | None = None


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
    handle, path = tempfile.mkstemp(dir=folder, suffix=".orders")
    with os.fdopen(handle, "w") as file:
        json.dump(orders._asdict(), file)
    environ = {**with_base(interpreter, base).environ, ORDERS_VARIABLE: path}
    for carried in ("ENVSHIP_SCHEDULER_STATE",):
        if carried in os.environ:
            environ[carried] = os.environ[carried]
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(interpreter.python, [interpreter.python, "-c", STUB, orders.code, *launch.argv], environ)
    except OSError:
        Path(path).unlink()
        raise


def main() -> None:
    """Entry of the stub, in the new interpreter."""
    gc.disable()  # importing Dask is an eighth faster without; nothing of it is garbage
    path = Path(os.environ.pop(ORDERS_VARIABLE))
    orders = Orders(**json.loads(path.read_text()))
    sys.argv[:1] = []
    launch = recognise(sys.argv)
    assert launch is not None
    sys.path.append(sys.path.pop(0))
    try:
        _hold(orders.lease)
        command = importlib.import_module(launch.module).main
    except BaseException as error:
        if orders.fallback is None:
            raise
        python, environ = orders.fallback
        print(f"envship: {sys.prefix} does not start ({error!r}): back to {python}", file=sys.stderr)  # noqa: T201
        path.write_text(json.dumps(orders._replace(fallback=None, lease=None)._asdict()))
        carried = {name: os.environ[name] for name in ("ENVSHIP_SCHEDULER_STATE",) if name in os.environ}
        environ = {**environ, **carried, ORDERS_VARIABLE: str(path)}
        os.execve(python, [python, "-c", STUB, orders.code, *launch.argv], environ)
    path.unlink()
    gc.freeze()
    gc.enable()
    if orders.wait_for is not None:
        _wait_for(*orders.wait_for, timeout_s=orders.wait_timeout_s)
    command(args=[*launch.arguments, *orders.extra], prog_name=" ".join(("dask", launch.kind)))


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
    given = _option(launch.arguments, "--port")
    host = _option(launch.arguments, "--host") or ""
    if (given is None or "," not in given) and str(port) != (given or "8786") and not _has_port(host):
        extra += ["--port", str(port)]
    if dashboard_port:
        address = _option(launch.arguments, "--dashboard-address") or ""
        host_part = address.rpartition(":")[0]
        extra += ["--dashboard-address", f"{host_part}:{dashboard_port}"]
    return extra


def _has_port(host: str) -> bool:
    last = host.rpartition(":")[2]
    return last.isdigit() and last != "0"


def _option(arguments: Sequence[str], name: str) -> str | None:
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


__all__: Any = ["Orders", "dialled", "execute", "main", "pinned"]
