"""A whole pack in processes of its own, so that it has all cores, and the caller's interpreter is free meanwhile.

One process plans and forks as many writers as there are cores (at most `WRITERS_LIMIT`). It is started afresh, without
the parts of envship that need Dask: a process of the user's may have threads, and those do not survive a fork. When
the caller ends, whatever the reason, so do all of them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from envship.crew import die_with_parent
from envship.options import PackOptions
from envship.packer import Packer, Report
from envship.scan_index import ScanIndex
from envship.sources.archive import scratch_folder
from envship.sources.tree import Trees
from worker_bootstrap import process_limit
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.layout import Layout
from worker_bootstrap.store import Store

WRITERS_LIMIT = 5
"""More would wait for the disk, and each takes some 60 MB with the interpreter that compiles for it: 400 MB for all."""

# Buffers of whole chunks go back to the system when they are freed. By itself, glibc's malloc would take them for the
# usual size after the first one, and keep the pages of all between other objects (mallopt(3)).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}

# The package as a mere folder of modules: importing it in the ordinary way imports Dask.
_START = """
import sys, types
sys.path[:] = sys.argv[2:]
sys.modules["envship"] = types.ModuleType("envship")
sys.modules["envship"].__path__ = [sys.argv[1]]
from envship.packing_process import main
main()
"""
_SIZE = struct.Struct(">I")


class Job(NamedTuple):
    """What to pack, how, and where to."""

    place: Path
    store: Path
    read_only: Sequence[Path]
    options: PackOptions


def pack_in_processes(job: Job, report: Report | None) -> EnvironmentId:
    """Pack in other processes, which are gone when this returns or raises, and so is what they unpacked.

    Raises
    ------
    EnvshipError
        What went wrong there; also if they ended without a word.
    """
    tmp = Layout(job.store).tmp
    # Of this process: the others are ended without a chance to remove anything.
    with contextlib.nullcontext(tmp) if job.place.is_dir() else scratch_folder(tmp) as scratch:
        return _pack_in_processes(job, scratch, report)


def _pack_in_processes(job: Job, scratch: Path, report: Report | None) -> EnvironmentId:
    command = [sys.executable, "-c", _START, str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_MALLOC},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            _send(process.stdin, (job, scratch))
        while (message := _receive(process.stdout)) is not None:
            kind, value = message
            if kind == "done":
                return EnvironmentId(value)
            if kind == "error":
                raise value
            if kind == "log":
                name, level, text = value
                logging.getLogger(name).log(level, "%s", text)
            elif report is not None:
                report(*value)
        code = process.wait()
        raise EnvshipError(f"packing {job.place} ended with {code} and without a word; it may have been out of memory")
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def main() -> None:
    """The process that plans."""
    die_with_parent()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Whatever the environment's packages print must not get among the answers.
    os.dup2(2, 1)
    job, scratch = _receive(requests)
    # What is made here lives until the end: nothing to collect.
    gc.disable()
    logging.getLogger("envship").addHandler(_Told(answers))
    try:
        with process_limit.named():
            store = Store(job.store, job.read_only)
            packer = Packer(store, job.options, lambda *told: _send(answers, ("progress", told)), _writers(), scratch)
            index = ScanIndex.load(store, str(job.place), job.options)
            _send(answers, ("done", packer.pack(job.place, Trees(slim=True), index)))
    except EnvshipError as error:
        _send(answers, ("error", error))
    except BrokenPipeError:
        pass
    os._exit(0)


class _Told(logging.Handler):
    """What is said while planning is said by the caller's process, which may be a notebook's."""

    def __init__(self, answers: IO[bytes]) -> None:
        super().__init__(logging.WARNING)
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._answers, ("log", (record.name, record.levelno, record.getMessage())))


def _writers() -> int:
    return min(WRITERS_LIMIT, len(os.sched_getaffinity(0)))


def _send(file: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    file.write(_SIZE.pack(len(data)) + data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    head = file.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    return pickle.loads(file.read(*_SIZE.unpack(head)))
