"""Some processes that share out a pile of small jobs: Python's threads get in each other's way at 100,000 files.

The others are forked, so they know everything that this process knows, and nothing has to be told to them. Jobs are
tickets in a pipe: whoever is free takes the next. An error of one is the error of all; a process that is killed is an
error, too, never a wait without end. Knows nothing of environments.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import pickle
import select
import signal
import struct
import threading
from typing import Callable, NoReturn

PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
"""2.4 GB in 62,000 files on two cores took 10.5 s with one thread, 7.6 s with two; 6.6 s with two processes."""
WAITING_LIMIT = 4096
"""Jobs that wait. Their tickets, and the answers to them, fit into a pipe of 64 KiB: nobody waits for room in one."""

_TICKET = struct.Struct("=I")
_ANSWER = struct.Struct("=q")
_FAILED = -1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def may_fork() -> bool:
    """Whether this process may be forked: a lock that another thread holds would stay locked for ever in the copy."""
    return hasattr(os, "fork") and threading.active_count() == 1


class Crew:
    """Does jobs in some forked processes, or here if there is to be only one. A context; fork when all is known.

    Parameters
    ----------
    job
        Does the job with that number, 0 to 2³² - 1, and returns a count that is not negative.
    done
        Gets what *job* returned, in this process.
    processes
        How many work, if as many can be started.

    Notes
    -----
    When this process dies, the others are killed by the kernel (Linux; elsewhere they end after their job). They hold
    its locks as long as they live. Leaving the context ends them, whatever they do.
    """

    def __init__(self, job: Callable[[int], int], done: Callable[[int], None], processes: int) -> None:
        self._job = job
        self._done = done
        self._processes = processes
        self._helpers: list[_Helper] = []
        self._waiting = 0
        self._tickets: int | None = None

    def __enter__(self) -> Crew:
        if self._processes > 1:
            gc.freeze()  # or the collector would touch, and so copy, every page that the processes share
            try:
                self._start()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        for helper in self._helpers:
            helper.end()
        self._close()
        if self._processes > 1:
            gc.unfreeze()

    def give(self, number: int) -> None:
        """Have the job with that number done, soon.

        Raises
        ------
        Exception
            The first that any job raised.
        ChildProcessError
            If a process was killed.
        """
        if self._tickets is None:
            self._done(self._job(number))
            return
        os.write(self._tickets, _TICKET.pack(number))
        self._waiting += 1
        self._hear(0)
        while self._waiting >= WAITING_LIMIT:
            self._hear(None)

    def wait(self) -> None:
        """Wait until all jobs that were given are done. Raises as `give`."""
        while self._waiting:
            self._hear(None)

    def finish(self) -> None:
        """Wait until all jobs are done; there are no more. Raises as `give`."""
        self._close()
        self.wait()

    def _start(self) -> None:
        take, self._tickets = os.pipe()
        try:
            # As many as the system lets this user start; none: the jobs are done here.
            with contextlib.suppress(BlockingIOError):
                for _ in range(self._processes):
                    self._helpers.append(_Helper(take, self._tickets, self._job))
        finally:
            os.close(take)
        if not self._helpers:
            self._close()

    def _hear(self, timeout_s: float | None) -> None:
        """Pass on what the helpers have done; with None, wait for one of them."""
        if not self._helpers:
            raise ChildProcessError(errno.ECHILD, "the processes that helped ended before the work did")
        for helper in select.select(self._helpers, [], [], timeout_s)[0]:
            answer = helper.answer()
            if answer is None:
                self._helpers.remove(helper)
                helper.end()
                continue
            self._done(answer)
            self._waiting -= 1

    def _close(self) -> None:
        if self._tickets is not None:
            os.close(self._tickets)
            self._tickets = None


class _Helper:
    """A forked process that does jobs until there are none."""

    def __init__(self, take: int, give: int, job: Callable[[int], int]) -> None:
        self._answers, answers = os.pipe()
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self._answers)
            os.close(answers)
            raise
        if not self._pid:
            _help(parent, take, give, job, answers)
        os.close(answers)

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._answers

    def answer(self) -> int | None:
        """What it did next, None if it found nothing more to do; raises what it raised."""
        raw = os.read(self._answers, _ANSWER.size)
        if len(raw) < _ANSWER.size:
            ended_by = self._wait()
            if ended_by:
                raise ChildProcessError(errno.ECHILD, f"a process that helped was ended by signal {ended_by}")
            return None
        (answer,) = _ANSWER.unpack(raw)
        if answer != _FAILED:
            return int(answer)
        with os.fdopen(os.dup(self._answers), "rb") as rest:
            # Written by a copy of this process: nothing in it came from elsewhere.
            raise pickle.loads(rest.read())

    def end(self) -> None:
        """End it, if it has not ended, and forget it."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._wait()
        os.close(self._answers)

    def _wait(self) -> int:
        """The signal that ended it, or 0."""
        pid, self._pid = self._pid, 0
        return os.waitpid(pid, 0)[1] & 0x7F


def _help(parent: int, take: int, give: int, job: Callable[[int], int], answers: int) -> NoReturn:
    """The life of a helper. Never returns, and runs nothing that its parent wanted to be run at its own end."""
    try:
        gc.disable()
        os.close(give)  # or the tickets would never end
        _die_with(parent)
        while (raw := os.read(take, _TICKET.size)) and os.getppid() == parent:
            os.write(answers, _ANSWER.pack(job(*_TICKET.unpack(raw))))
    except BaseException as error:
        with os.fdopen(answers, "wb") as file:
            file.write(_ANSWER.pack(_FAILED) + _pickled(error))
    finally:
        os._exit(0)


def _pickled(error: BaseException) -> bytes:
    try:
        raw = pickle.dumps(error)
        pickle.loads(raw)
    except Exception:  # somebody else's exception that does not survive it
        raw = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return raw


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
