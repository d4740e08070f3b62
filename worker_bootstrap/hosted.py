"""A nanny's worker process that runs in an environment of its own.

`Nanny.instantiate` starts whatever object stands in ``nanny.process``; the classes here stand there. `HostedProcess`
behaves like `distributed.nanny.WorkerProcess`, but starts its worker with another interpreter. `PendingProcess`
and `RefusedProcess` are for a nanny that must not start a worker yet, or at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple

from distributed.core import Status

from worker_bootstrap.errors import NotSwappable, StartError
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.standby import HEADER, STUB

logger = logging.getLogger("envship.hosted")

KILL_TIMEOUT_S = 5.0


class WorkerOptions(NamedTuple):
    """What a nanny was told about its worker. *env* are the variables for its process, *config* is Dask's."""

    worker_class: Any
    kwargs: Mapping[str, Any]
    env: Mapping[str, str]
    config: Mapping[str, Any]
    silence_logs: Any

    @classmethod
    def of_nanny(cls, nanny: Any) -> WorkerOptions:
        """The options that *nanny* would start its worker with (see `Nanny.instantiate`)."""
        kwargs = {
            "scheduler_ip": nanny.scheduler_addr,
            "nthreads": nanny.nthreads,
            "local_directory": nanny._original_local_dir,
            "services": nanny.services,
            "nanny": nanny.address,
            "name": nanny.name,
            "memory_limit": nanny.memory_manager.memory_limit,
            "resources": nanny.resources,
            "validate": nanny.validate,
            "silence_logs": nanny.silence_logs,
            "death_timeout": nanny.death_timeout,
            "preload": nanny.preload,
            "preload_argv": nanny.preload_argv,
            "security": nanny.security,
            "contact_address": nanny.contact_address,
        }
        kwargs.update(nanny.worker_kwargs)
        return cls(nanny.Worker, kwargs, nanny.env, nanny.config, nanny.silence_logs)

    def pickled(self) -> bytes:
        """For a process of the same user on the same machine.

        Raises
        ------
        NotSwappable
            If an option cannot be pickled.
        """
        config = {name: value for name, value in self.config.items() if name not in ("scheduler", "shuffle")}
        options = {
            "class": self.worker_class,
            "kwargs": dict(self.kwargs),
            "env": dict(self.env),
            "config": config,
            "silence_logs": self.silence_logs,
        }
        try:
            return pickle.dumps(options, protocol=4)
        except Exception as error:
            raise NotSwappable(
                f"the worker {self.kwargs.get('name')!r}",
                f"its options cannot be sent to another interpreter ({error})",
                "Start it with options that pickle.",
            ) from error


class StartRequest(NamedTuple):
    """What a new interpreter is asked to get ready for. *worker* is None for a mere probe."""

    code: str
    lease: str | None
    worker: bytes | None = None
    modules: Sequence[str] = ()
    optional_modules: Sequence[str] = ()
    plugins: Sequence[tuple[str, bytes]] = ()


class Standby:
    """A process of an environment's interpreter that has imported Dask, checked its options, and waits.

    Make one with `start`. Owns the process: `discard` it, or `run` it and `wait` for its end.
    """

    def __init__(self, interpreter: Interpreter, process: asyncio.subprocess.Process) -> None:
        self.interpreter = interpreter
        self.process = process
        self.description: Mapping[str, Any] = {}
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def start(cls, interpreter: Interpreter, request: StartRequest, timeout_s: float) -> Standby:
        """Start *interpreter* and wait until it is ready.

        Raises
        ------
        StartError
            If it cannot be started, ends, says that something is wrong, or is not ready within *timeout_s*.
        """
        here, there = socket.socketpair()
        with there, tempfile.TemporaryFile() as errors, _copy_of_stderr() as stderr:
            try:
                process = await asyncio.create_subprocess_exec(
                    interpreter.python,
                    "-c",
                    STUB,
                    str(there.fileno()),
                    request.code,
                    env=dict(interpreter.environ),
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=(there.fileno(), stderr),
                )
            except OSError as error:
                here.close()
                raise StartError(interpreter.environment_id, interpreter.prefix, str(error), "") from error
            there.close()
            standby = cls(interpreter, process)
            try:
                standby._reader, standby._writer = await asyncio.open_connection(sock=here)
                await asyncio.wait_for(standby._get_ready(request, stderr), timeout_s)
            except BaseException as error:
                await standby.discard()
                if isinstance(error, asyncio.TimeoutError):
                    reason = f"it was not ready after {timeout_s:.0f} s"
                elif isinstance(error, (asyncio.IncompleteReadError, OSError)):
                    reason = f"it ended with {_exit_text(process.returncode)}"
                elif isinstance(error, _Refusal):
                    reason = str(error)
                else:
                    raise
                raise StartError(
                    interpreter.environment_id, interpreter.prefix, reason, _tail_of(errors, error)
                ) from None
            return standby

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def run(self, override: Mapping[str, Any] | None = None) -> tuple[str, str]:
        """Become a worker, with *override* over its options; return its (address, local directory).

        Raises
        ------
        StartError
            If the worker does not start.
        """
        self._send({"op": "run", "override": dict(override or {})})
        try:
            answer = await self._answer()
        except (asyncio.IncompleteReadError, OSError) as error:
            await self.process.wait()
            reason = f"the worker ended with {_exit_text(self.process.returncode)} while it started"
            raise StartError(self.interpreter.environment_id, self.interpreter.prefix, reason, "") from error
        except _Refusal as refusal:
            reason = str(refusal)
            raise StartError(self.interpreter.environment_id, self.interpreter.prefix, reason, refusal.trace) from None
        return answer["address"], answer["dir"]

    def stop(self, timeout_s: float, executor_wait: bool, reason: str) -> None:
        """Tell the running worker to close. Returns at once; see `wait`."""
        with contextlib.suppress(OSError, RuntimeError):
            self._send({"op": "stop", "timeout": timeout_s, "executor_wait": executor_wait, "reason": reason})

    async def wait(self) -> int:
        """Wait for the end of the process; return its exit code."""
        code = await self.process.wait()
        self._writer.close()
        return code

    def signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        # Not by way of `asyncio.subprocess`: that reaps the process behind the back of its own watcher.
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def discard(self) -> None:
        """End the process, whatever it does."""
        self.signal(signal.SIGKILL)
        await self.process.wait()
        writer = getattr(self, "_writer", None)
        if writer is not None:
            writer.close()

    async def _get_ready(self, request: StartRequest, stderr: int) -> None:
        options = {
            "worker": request.worker,
            "modules": list(request.modules),
            "optional_modules": list(request.optional_modules),
            "plugins": list(request.plugins),
            "lease": request.lease,
            "argv": sys.argv,
            "sys_path": _own_sys_path(),
            "stderr": stderr,
        }
        data = pickle.dumps(options, protocol=4)
        self._writer.write(HEADER.pack(len(data)) + data)
        await self._writer.drain()
        self.description = (await self._answer())["ready"]

    async def _answer(self) -> dict[str, Any]:
        (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        answer: dict[str, Any] = json.loads(await self._reader.readexactly(size))
        if "error" in answer:
            raise _Refusal(answer["error"], answer["trace"])
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self._writer.write(HEADER.pack(len(data)) + data)


class _Refusal(Exception):
    """The standby reports an error of its own."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.trace = trace


class _ProcessHandle:
    """The part of `AsyncProcess` that `NannyMemoryManager` uses."""

    def __init__(self, standby: Standby) -> None:
        self.pid = standby.pid
        self._standby = standby

    def terminate(self) -> None:
        self._standby.signal(signal.SIGTERM)

    def kill(self) -> None:
        self._standby.signal(signal.SIGKILL)


class HostedProcess:
    """Stands in ``nanny.process``: a worker in the environment of *interpreter*.

    Parameters
    ----------
    start_standby
        Makes a new `Standby`; called for every start after the first.
    standby
        A standby that is ready already, used for the first start.
    on_exit
        Called with the exit code when the worker's process has ended; None once it has been replaced.
    override
        Worker options for the first start only (what is left of ``lifetime``).
    """

    def __init__(
        self,
        interpreter: Interpreter,
        start_standby: Callable[[], Any],
        on_exit: Callable[[int], None],
        standby: Standby | None = None,
        override: Mapping[str, Any] | None = None,
    ) -> None:
        self.interpreter = interpreter
        self.on_exit: Callable[[int], None] | None = on_exit
        self.status = Status.init
        self.worker_address: str | None = None
        self.worker_dir: str | None = None
        self.process: _ProcessHandle | None = None
        self.running = asyncio.Event()
        self.stopped = asyncio.Event()
        self.started_at = time.time()
        self._start_standby = start_standby
        self._next = standby
        self._override = override
        self._standby: Standby | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> Status:
        """Start the worker; as `WorkerProcess.start`."""
        if self.status == Status.running:
            return self.status
        if self.status == Status.starting:
            await self.running.wait()
            return self.status
        self.status = Status.starting
        self.running.clear()
        self.stopped.clear()
        try:
            await self._start_worker()
        except BaseException:
            self.status = Status.failed
            raise
        finally:
            self.running.set()
        return self.status

    async def _start_worker(self) -> None:
        standby, self._next = self._next, None
        if standby is None or not standby.alive:
            standby = await self._start_standby()
        override, self._override = self._override, None
        self._standby = standby
        self.process = _ProcessHandle(standby)
        self.started_at = time.time()
        try:
            self.worker_address, self.worker_dir = await standby.run(override)
        except BaseException:
            await standby.discard()
            self._standby = self.process = None
            raise
        self.status = Status.running
        self._watcher = asyncio.create_task(self._watch(standby))

    async def _watch(self, standby: Standby) -> None:
        code = await standby.wait()
        if code != 0:
            logger.info("worker process %d ended with %s", standby.pid, _exit_text(code))
        self.status = Status.stopped
        self._standby = self.process = None
        if self.worker_dir is not None:
            # A worker that was killed leaves its spilled data behind; removing gigabytes must not block the loop.
            await asyncio.to_thread(shutil.rmtree, self.worker_dir, ignore_errors=True)
        self.worker_dir = None
        self.running.clear()
        self.stopped.set()
        if self.on_exit is not None:
            self.on_exit(code)

    async def kill(
        self, timeout: float = KILL_TIMEOUT_S, executor_wait: bool = True, reason: str = "hosted-kill"
    ) -> None:
        """Stop the worker; as `WorkerProcess.kill`."""
        if self.status == Status.starting:
            await self.running.wait()
        standby = self._standby
        if standby is None:
            if self._next is not None:
                await self._next.discard()
                self._next = None
            self.status = Status.stopped
            return
        if self.status != Status.stopping:
            self.status = Status.stopping
            standby.stop(timeout * 0.8, executor_wait, reason)
        try:
            await asyncio.wait_for(self.stopped.wait(), timeout * 0.8)
        except asyncio.TimeoutError:
            logger.warning("worker process %d does not stop after %.1f s: killed", standby.pid, timeout * 0.8)
            standby.signal(signal.SIGKILL)
            await self.stopped.wait()

    def is_alive(self) -> bool:
        return self._standby is not None and self._standby.alive

    @property
    def pid(self) -> int | None:
        return self._standby.pid if self._standby is not None and self._standby.alive else None


class PendingProcess:
    """Stands in ``nanny.process`` while the environment is on its way: starts at once, and does nothing."""

    worker_address = "envship-pending"
    worker_dir = None
    process = None
    pid = None
    status = Status.running

    async def start(self) -> Status:
        return Status.running

    async def kill(self, **kwargs: Any) -> None:
        return None

    def is_alive(self) -> bool:
        return True


class RefusedProcess(PendingProcess):
    """Stands in ``nanny.process`` of a nanny that cannot have the right environment: no worker ever starts."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def start(self) -> Status:
        raise self.error

    def is_alive(self) -> bool:
        return False


def _own_sys_path() -> list[str]:
    """What this process was given beyond its own installation, ``PYTHONPATH`` (inherited anyway) and our code."""
    own = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    inherited = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code = os.path.realpath(os.path.dirname(os.path.dirname(__file__))) if "__file__" in globals() else ""

    def foreign(entry: str) -> bool:
        real = os.path.realpath(entry)
        inside = any(real == prefix or real.startswith(prefix + os.sep) for prefix in own)
        return entry not in inherited and not inside and real != code and not entry.endswith(".zip")

    return [entry for entry in sys.path if entry == "" or foreign(entry)]


@contextlib.contextmanager
def _copy_of_stderr() -> Iterator[int]:
    """A descriptor of this process's standard error, for the child to use once it is ready."""
    copy = os.dup(2)
    try:
        yield copy
    finally:
        os.close(copy)


def _tail_of(errors: Any, error: BaseException) -> str:
    if isinstance(error, _Refusal):
        return error.trace
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4096))
    return str(errors.read().decode(errors="replace"))


def _exit_text(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
