"""A started interpreter of an environment that has imported Dask and waits: the proof that the environment works.

The parent's side; the program that runs in it is `worker_bootstrap.standby_main`. `worker_bootstrap.hosted` makes a
worker of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from worker_bootstrap.errors import StartError
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.standby_main import HEADER, STUB


class StartRequest(NamedTuple):
    """What a new interpreter is asked to get ready for.

    *worker* is None for a mere probe; *checks_command*: of whether it understands this process's own command line.
    """

    code: str
    lease: str | None
    worker: bytes | None = None
    modules: Sequence[str] = ()
    plugins: Sequence[tuple[str, bytes]] = ()
    checks_command: bool = False


class Standby:
    """A process of an environment's interpreter that has imported Dask, checked its options, and waits.

    Make one with `start`. Owns the process: `discard` it, or `run` it and `wait` for its end. *worker* are the options
    that it was started with.
    """

    def __init__(
        self, interpreter: Interpreter, process: asyncio.subprocess.Process, worker: bytes | None = None
    ) -> None:
        self.interpreter = interpreter
        self.process = process
        self.worker = worker
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
            except BaseException:
                here.close()
                raise
            there.close()
            standby = cls(interpreter, process, request.worker)
            try:
                standby._reader, standby._writer = await asyncio.open_connection(sock=here)
                await asyncio.wait_for(standby._get_ready(request, stderr), timeout_s)
            except BaseException as error:
                await standby.discard()
                if isinstance(error, asyncio.TimeoutError):
                    reason = f"it was not ready after {timeout_s:.0f} s"
                elif isinstance(error, (asyncio.IncompleteReadError, OSError)):
                    reason = f"it ended with {exit_text(process.returncode)}"
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
            reason = f"the worker ended with {exit_text(self.process.returncode)} while it started"
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
            "plugins": list(request.plugins),
            "lease": request.lease,
            "checks_command": request.checks_command,
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


def exit_text(code: int | None) -> str:
    """How a process ended, in words: *code* is negative for a signal."""
    if code is None:
        return "no exit code"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
