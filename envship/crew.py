"""Who writes the packages of a plan: threads of this process, or processes forked from it.

Threads share one interpreter, which is enough for a few packages; a whole environment is mostly small files, and those
are work for the interpreter. Forks share what was planned without anybody copying it, but only a process that has no
other threads may fork: see `envship.packing_process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import selectors
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from envship.code_ahead import CodeAhead
from envship.package_writer import PackageWriter, Packed
from envship.reading import Reader
from envship.sources.draft import Draft
from worker_bootstrap import process_limit
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.manifest import Chunk
from worker_bootstrap.store import Store

_READERS = 2
_HELPERS = 2
"""Threads that compress, and as many that have byte code made, shared out among those that read: one reads where there
is one package only."""
_WAITING_CHUNKS = 4
"""Chunks of one writer that are read and not yet written: bounds memory."""
_TELL_EVERY_BYTES = 8 << 20
_NUMBER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Written:
    """What a crew has done: packages by their number in the list, and what was wrong with files."""

    packages: dict[int, Packed] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def add_faults(self, reader: Reader) -> None:
        """Take over what *reader* noted."""
        self.problems += reader.problems
        self.doubts += reader.doubts
        self.changed += reader.changed


def write_with_threads(
    drafts: Sequence[Draft], new_reader: Callable[[], Reader], store: Store, done: Callable[[int], None]
) -> Written:
    """Write *drafts*, two at a time; what one of them reads is compressed by two where it is the only one.

    Parameters
    ----------
    new_reader
        Makes the reader of a thread.
    done
        Told the bytes that were read.
    """
    written = Written()
    stopped = threading.Event()

    def go_on(size_bytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        done(size_bytes)

    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(drafts)):
        numbers.put(number)

    readers = min(_READERS, len(drafts))

    def work() -> None:
        helpers = _HELPERS // readers
        with new_reader() as reader, CodeAhead(reader, helpers) as code, _Keeper(store, helpers) as keeper:
            writer = PackageWriter(reader, code, keeper.keep, go_on)
            with contextlib.suppress(queue.Empty):
                while not stopped.is_set():
                    number = numbers.get_nowait()
                    written.packages[number] = writer.write(drafts[number])
            written.add_faults(reader)

    pool = ThreadPoolExecutor(_READERS, "envship-read")
    try:
        done_or_failed, _ = wait([pool.submit(work) for _ in range(readers)], None, FIRST_EXCEPTION)
        for future in done_or_failed:
            future.result()
    finally:
        # Also if the caller is interrupted.
        stopped.set()
        pool.shutdown()
    return written


def write_with_processes(
    drafts: Sequence[Draft],
    new_reader: Callable[[], Reader],
    store: Store,
    done: Callable[[int], None],
    processes: int,
) -> Written:
    """Write *drafts*, each in one of as many *processes* (or fewer, where no more can be started).

    They end with this call. Nobody else may have threads here.

    Raises
    ------
    EnvshipError
        What one of them raised; or one of them ended without a word.
    """
    written = Written()
    ended_well = 0
    with contextlib.ExitStack() as stack:
        # Each takes the next number: reading moves the place that all of them share.
        numbers = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        numbers.write(b"".join(_NUMBER.pack(number) for number in range(len(drafts))))
        numbers.seek(0)
        forks: list[_Fork] = []
        try:
            for _ in range(processes):
                forks.append(_Fork(lambda tell: _work(numbers.fileno(), drafts, new_reader, store, tell)))
                stack.callback(forks[-1].end)
        except BlockingIOError:
            if not forks:
                raise
        for kind, value in _messages(forks):
            if kind == "bytes":
                done(value)
            elif kind == "package":
                written.packages[value[0]] = value[1]
            elif kind == "faults":
                written.problems += value[0]
                written.doubts += value[1]
                written.changed += value[2]
                ended_well += 1
            else:
                raise value
    if ended_well < len(forks):
        raise EnvshipError("a process that packed was ended from outside; it may have been out of memory")
    return written


def _work(
    numbers: int,
    drafts: Sequence[Draft],
    new_reader: Callable[[], Reader],
    store: Store,
    tell: Callable[[str, Any], None],
) -> None:
    """The work of one process."""
    unsaid_bytes = 0

    def done(size_bytes: int) -> None:
        nonlocal unsaid_bytes
        unsaid_bytes += size_bytes
        if unsaid_bytes >= _TELL_EVERY_BYTES:
            tell("bytes", unsaid_bytes)
            unsaid_bytes = 0

    with new_reader() as reader, _Keeper(store) as keeper:
        writer = PackageWriter(reader, CodeAhead(reader), keeper.keep, done)
        while data := os.read(numbers, _NUMBER.size):
            (number,) = _NUMBER.unpack(data)
            tell("package", (number, writer.write(drafts[number])))
        tell("bytes", unsaid_bytes)
        tell("faults", (reader.problems, reader.doubts, reader.changed))


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, whatever the reason. Linux only."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Keeper:
    """Compresses and keeps chunks in threads of its own, so that reading goes on meanwhile."""

    def __init__(self, store: Store, threads: int = 1) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(threads, "envship-keep")
        self._room = threading.BoundedSemaphore(_WAITING_CHUNKS)

    def keep(self, data: bytes | memoryview, digest: Digest | None) -> Future[Chunk]:
        self._room.acquire()
        future = self._pool.submit(lambda: Chunk(self._store.write_chunk(data, digest=digest), len(data)))
        future.add_done_callback(lambda _: self._room.release())
        return future

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Fork:
    """A process that does *work* and tells what comes of it, in messages of a kind and a value."""

    def __init__(self, work: Callable[[Callable[[str, Any], None]], None]) -> None:
        self.pipe, write_end = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self.pipe)
            os.close(write_end)
            raise
        if self.pid == 0:
            _child(work, write_end)
        os.close(write_end)
        self._received = b""

    def receive(self) -> Iterator[tuple[str, Any]]:
        """What has come in; raises `EOFError` at the end."""
        data = os.read(self.pipe, 1 << 16)
        if not data:
            raise EOFError
        self._received += data
        while len(self._received) >= _NUMBER.size:
            (size_bytes,) = _NUMBER.unpack_from(self._received)
            end = _NUMBER.size + size_bytes
            if len(self._received) < end:
                return
            message, self._received = self._received[_NUMBER.size : end], self._received[end:]
            yield pickle.loads(message)

    def end(self) -> None:
        """End the process, and wait for that."""
        os.close(self.pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _child(work: Callable[[Callable[[str, Any], None]], None], write_end: int) -> None:
    """What a fork does; never returns."""
    code = 1
    die_with_parent()

    def tell(kind: str, value: Any) -> None:
        message = pickle.dumps((kind, value))
        view = memoryview(_NUMBER.pack(len(message)) + message)
        while view:
            view = view[os.write(write_end, view) :]

    try:
        try:
            with process_limit.named():
                work(tell)
            code = 0
        except (EnvshipError, OSError) as error:
            tell("error", error)
        except BaseException as error:
            tell("error", EnvshipError(f"packing failed: {type(error).__name__}: {error}"))
    finally:
        os._exit(code)


def _messages(forks: Sequence[_Fork]) -> Iterator[tuple[str, Any]]:
    with selectors.DefaultSelector() as selector:
        for fork in forks:
            selector.register(fork.pipe, selectors.EVENT_READ, fork)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    yield from key.data.receive()
                except EOFError:
                    selector.unregister(key.fd)
