"""The program that a standby process runs: get ready, wait, become a worker.

Started by `worker_bootstrap.standby` with one end of a socket pair. The parent sends one pickled request (it comes from
the nanny that started us, nobody else can write to the socket), then JSON commands; we answer in JSON. When the parent
dies the socket closes, and so do we.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from worker_bootstrap import launch
from worker_bootstrap.quick_import import compile_ours, import_dask, quickly

logger = logging.getLogger("envship.standby")

HEADER = struct.Struct(">Q")
STUB = (
    "import gc, sys; gc.disable(); sys.dont_write_bytecode = True; sys.path[:1] = [sys.argv[2]];"
    "from worker_bootstrap.standby_main import main; main()"
)
"""What ``python -c`` is given, followed by the number of our socket and the folder of this code."""


class Channel:
    """Length-prefixed frames over a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def receive(self) -> bytes | None:
        """The next frame, or None at the end."""
        header = self._exactly(HEADER.size)
        return None if header is None else self._exactly(HEADER.unpack(header)[0])

    def receive_json(self) -> dict[str, Any] | None:
        frame = self.receive()
        return None if frame is None else json.loads(frame)

    def send_json(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self._sock.sendall(HEADER.pack(len(data)) + data)

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            more = self._sock.recv(count - len(data))
            if not more:
                return None
            data += more
        return data


def main() -> None:
    """Entry of ``python -c STUB SOCKET CODE``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole job; the nanny decides what happens
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    frame = channel.receive()
    if frame is None:
        return
    try:
        options = pickle.loads(frame)
        stderr = options["stderr"]
        code = sys.path.pop(0)
        with quickly(code):
            _enter(options, code)
            worker = _checked_worker(options["worker"]) if options["worker"] is not None else None
        for plugin_name, data in options["plugins"]:
            _check_unpickles(plugin_name, data)
    except BaseException as error:
        channel.send_json({"error": _in_words(error), "trace": traceback.format_exc()})
        sys.exit(1)
    channel.send_json({"ready": _description()})
    os.dup2(stderr, 2)
    if worker is not None:
        _look_ahead()
    command = channel.receive_json()
    if command is not None and command["op"] == "run" and worker is not None:
        _run(worker, command, channel)


def _enter(options: dict[str, Any], code: str) -> None:
    sys.argv = list(options["argv"])
    sys.path[:] = [*options["sys_path"], *sys.path, code]  # ours comes last: nothing of the environment is shadowed
    compile_ours(code)
    _hold_lease(options["lease"])
    import_dask()
    for name in options["modules"]:
        importlib.import_module(name)
    if options["checks_command"]:
        from worker_bootstrap import option_check

        command = launch.own()
        assert command is not None
        option_check.check_command(command)


def _hold_lease(path: str | None) -> None:
    if path is not None:
        from worker_bootstrap.lock import Lease

        Lease(Path(path)).hold()
        if not os.path.exists(sys.executable):
            raise RuntimeError(f"the environment at {sys.prefix} was evicted while this process started")


def _checked_worker(data: bytes) -> dict[str, Any]:
    """The worker's options, unpickled here to prove that this environment understands them."""
    worker: dict[str, Any] = pickle.loads(data)
    from worker_bootstrap import option_check

    option_check.check_keywords(worker["class"], worker["kwargs"])
    option_check.check_preloads(worker["kwargs"].get("preload") or ())
    _warm_up(worker)
    return worker


def _warm_up(worker: dict[str, Any]) -> None:
    """Do now what `Worker.start` would do lazily: it is the swap's downtime otherwise."""
    os.environ.update(worker["env"])
    import dask
    from distributed.versions import get_versions

    dask.config.refresh()
    dask.config.set(worker["config"])
    get_versions()
    for route in dask.config.get("distributed.worker.http.routes", []):
        importlib.import_module(route)
    if worker["kwargs"].get("dashboard"):
        try:
            importlib.import_module("distributed.dashboard.worker")
        except ImportError:
            logger.debug("no bokeh in this environment: the worker has no dashboard")


def _check_unpickles(name: str, data: bytes) -> None:
    from worker_bootstrap.scheduler_state import load_plugin

    try:
        load_plugin(data, scheduler=None)
    except Exception as error:
        raise RuntimeError(f"the plugin {name!r} does not load in this environment: {error}") from error


def _look_ahead() -> None:
    """Get ready for the plugin that the scheduler is going to send: who waits for the order to run has time for it."""
    from worker_bootstrap import carry

    importlib.import_module("worker_bootstrap.plugins")
    carry.package_digest()


def _description() -> dict[str, Any]:
    import distributed

    return {
        "prefix": sys.prefix,
        "python": ".".join(map(str, sys.version_info[:3])),
        "distributed": distributed.__version__,
        "pid": os.getpid(),
    }


def _run(worker: dict[str, Any], command: dict[str, Any], channel: Channel) -> None:
    from dask.multiprocessing import default_initializer
    from distributed.compatibility import asyncio_run
    from distributed.config import get_loop_factory

    default_initializer()
    if worker["silence_logs"]:
        logging.getLogger("distributed").setLevel(worker["silence_logs"])
    kwargs = {**worker["kwargs"], **command.get("override", {})}
    asyncio_run(_serve(worker["class"], kwargs, channel), loop_factory=get_loop_factory())
    # Threads of tasks that ignore their cancellation must not keep the process from ending.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def _serve(worker_class: Any, kwargs: dict[str, Any], channel: Channel) -> None:
    try:
        worker = worker_class(**kwargs)
        threading.Thread(
            target=_obey, args=(channel, worker, asyncio.get_running_loop()), name="envship-orders", daemon=True
        ).start()
        await worker
    except Exception as error:
        logger.exception("the worker does not start in this environment")
        channel.send_json({"error": _in_words(error), "trace": traceback.format_exc()})
        return
    channel.send_json({"address": worker.address, "dir": worker.local_directory})
    await worker.finished()


def _in_words(error: BaseException) -> str:
    """What went wrong, with its causes: Dask's own error says no more than that the worker failed to start."""
    words = f"{type(error).__name__}: {error}"
    if error.__cause__ is None or str(error.__cause__) in words:
        return words
    return f"{words} ({_in_words(error.__cause__)})"


def _obey(channel: Channel, worker: Any, loop: asyncio.AbstractEventLoop) -> None:
    command = channel.receive_json()
    if command is None:
        os._exit(1)

    closing = []  # the loop itself keeps only weak references to its tasks

    def close() -> None:
        how = {name: command[name] for name in ("timeout", "executor_wait", "reason")}
        closing.append(loop.create_task(worker.close(nanny=False, **how)))

    loop.call_soon_threadsafe(close)
    if channel.receive_json() is None:
        os._exit(1)
