"""Steps of a program at the file system: counted in a fork of this process and its forks, and kill -9 at one of them.

Steps are what Python audits (opening, renaming, linking, removing, locking, ...), writes (half of one may be done), and
syncs. Each is of a *kind*; what makes something appear, disappear or stay is of a kind of its own for each folder of
the store. A process that has one thread forks in milliseconds, so hundreds of points are tried in seconds.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import random
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EVENTS = {
    "os.mkdir": "make a folder",
    "os.rmdir": "remove a folder",
    "os.link": "link",
    "os.symlink": "link",
    "os.chmod": "change a mode",
    "os.utime": "change a time",
    "os.truncate": "truncate",
    "os.scandir": "list",
    "fcntl.flock": "lock",
    "fcntl.ioctl": "reflink",
}
"""Kinds of what Python audits (its documentation, "Audit events table"), each before it is done."""
DECISIVE = ("rename", "remove", "sync")
"""Kinds begin so that decide what is there afterwards."""
FOLDERS = ("chunks", "manifests", "envs", "ready", "inventories", "index/bytecode", "index", "tmp", "", "elsewhere")
"""Of these folders of a store: the nearest to what is renamed to, removed or synced."""
HELPER = " by a helper"
_OWN_KINDS = (
    *("open to read", "open to write", "write"),
    *dict.fromkeys(EVENTS.values()),
    *(f"{verb} {name}" for verb in DECISIVE for name in FOLDERS),
)
KINDS = (*_OWN_KINDS, *(kind + HELPER for kind in _OWN_KINDS))
LAST_STEPS = 10
SLOTS = 64
"""Processes count in slots of their own, so that none overwrites what another has counted at the same moment."""
ORDER_LIMIT = 1 << 16


class Point(NamedTuple):
    """The *number*-th step of a kind, counted from 1."""

    kind: str
    number: int


class Trace(NamedTuple):
    """The steps of a program that came to its end: those of its first process in their order, of its forks how many."""

    order: Sequence[str]
    helpers: Mapping[str, int]

    @property
    def points(self) -> list[Point]:
        """Every step."""
        count: collections.Counter[str] = collections.Counter()
        found = []
        for kind in self.order:
            count[kind] += 1
            found.append(Point(kind, count[kind]))
        return found + [Point(kind, number + 1) for kind, total in self.helpers.items() for number in range(total)]

    @property
    def decisive(self) -> list[Point]:
        """Steps that decide what is there afterwards, and the last ones."""
        points = self.points
        last = points[: len(self.order)][-LAST_STEPS:]
        return [point for point in points if point.kind.startswith(DECISIVE) or point in last]

    @property
    def kinds(self) -> list[str]:
        return sorted({*self.order, *self.helpers})

    def drawn(self, kind: str, chance: random.Random) -> Point:
        """Any step of that kind."""
        return chance.choice([point for point in self.points if point.kind == kind])


def drawn(
    traces: Mapping[str, Trace], count: int, chance: random.Random, first: tuple[str, ...] = ("",)
) -> list[tuple[str, Point]]:
    """*count* points of programs, by their names: one of each kind that begins with *first*, then from each in turn.

    Of the latter, every second is one that decides what is there afterwards; the others are of any kind.
    """
    found: dict[str, tuple[str, Point]] = {}
    for name, trace in traces.items():
        for kind in trace.kinds:
            if kind.startswith(first) and kind not in found:
                found[kind] = name, trace.drawn(kind, chance)
    assert len(found) <= count, f"{len(found)} kinds of steps, and {count} points"
    plan = list(found.values())
    names = list(traces)
    while len(plan) < count:
        name = names[len(plan) % len(names)]
        trace = traces[name]
        is_decisive = len(plan) // len(names) % 2
        plan.append(
            (name, chance.choice(trace.decisive) if is_decisive else trace.drawn(chance.choice(trace.kinds), chance))
        )
    return plan


def traced(work: Callable[[], object], root: Path) -> Trace:
    """The steps of *work*, which is done in a fork, to its end; *root* is the store that it writes to."""
    trace = _forked(work, root, None, half=False)
    assert trace is not None
    return trace


def killed(work: Callable[[], object], root: Path, point: Point, *, half: bool) -> bool:
    """Do *work* in a fork that is killed at *point*; whether it came to it. With *half*, half of a write is done.

    Nobody who took part is alive when this returns.
    """
    return _forked(work, root, point, half=half) is None


def _forked(work: Callable[[], object], root: Path, last: Point | None, *, half: bool) -> Trace | None:
    counter = Counter(root, last, half)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(reading)
        code = 3
        try:
            counter.install()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    os.read(reading, 1)  # its end: every fork has ended, too
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the work failed by itself, before {last}")
    return counter.trace


class Counter:
    """Counts the steps of a process and its forks, and kills all of them at one of the steps."""

    def __init__(self, root: Path, last: Point | None, half: bool) -> None:
        self._root = str(root)
        self._last = None if last is None else (KINDS.index(last.kind), last.number)
        self._half = half
        self._counts = memoryview(mmap.mmap(-1, len(KINDS) * SLOTS * 8)).cast("Q")
        self._order = mmap.mmap(-1, ORDER_LIMIT)
        self._taken = 0
        self._pid = 0
        self._write = os.write

    def install(self) -> None:
        """From now on. Never undone: the process is to end."""
        self._pid = os.getpid()
        os.write = self._do_write  # type: ignore[assignment]
        fsync = os.fsync

        def counted_fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            self._step("sync " + self._folder(os.readlink(f"/proc/self/fd/{number}")))
            fsync(handle)

        os.fsync = counted_fsync
        sys.addaudithook(self._audit)

    @property
    def trace(self) -> Trace:
        order = [KINDS[number - 1] for number in self._order[:].partition(b"\0")[0]]
        helpers = {kind: self._count(KINDS.index(kind)) for kind in KINDS if kind.endswith(HELPER)}
        return Trace(order, {kind: count for kind, count in helpers.items() if count})

    def _count(self, kind: int) -> int:
        return sum(self._counts[kind * SLOTS : (kind + 1) * SLOTS])

    def _step(self, kind: str) -> None:
        pid, number = os.getpid(), self._number(kind)
        self._counts[number * SLOTS + pid % SLOTS] += 1
        if pid == self._pid and self._taken < ORDER_LIMIT:
            self._order[self._taken] = number + 1
            self._taken += 1
        if self._last is not None and number == self._last[0] and self._count(number) >= self._last[1]:
            os.killpg(0, signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._step("open to write" if arguments[2] & (os.O_WRONLY | os.O_RDWR) else "open to read")
        elif event in EVENTS:
            self._step(EVENTS[event])
        elif event == "os.rename":
            self._step("rename " + self._folder(arguments[1]))
        elif event == "os.remove":
            self._step("remove " + self._folder(arguments[0]))
        elif event == "ctypes.dlsym" and arguments[1] == "syncfs":
            self._step("sync ")  # all of the store

    def _do_write(self, handle: int, data: Any) -> int:
        # What is less than a page goes through a pipe as a whole, or not at all (pipe(7)).
        if self._half and self._last is not None and stat.S_ISREG(os.fstat(handle).st_mode):
            number = self._number("write")
            if number == self._last[0] and self._count(number) + 1 >= self._last[1]:
                self._write(handle, memoryview(data)[: len(data) // 2])
        self._step("write")
        return self._write(handle, data)

    def _number(self, kind: str) -> int:
        return KINDS.index(kind if os.getpid() == self._pid else kind + HELPER)

    def _folder(self, path: Any) -> str:
        """The one of `FOLDERS` that *path* lies in; ``rmtree`` names what it removes relative to a folder."""
        found = os.fsdecode(path) + "/"
        if not found.startswith(self._root + "/"):
            return "elsewhere"
        return next(name for name in FOLDERS if found.startswith(f"{self._root}/{name}/".replace("//", "/")))


def tell_outcome(
    try_points: Callable[[Path, Any, int, int, str], dict[str, Any]],
    what: str,
    kind: Callable[[str], Any],
    wrong_ways: Iterable[str],
) -> None:
    """The command line ``FOLDER WHAT SEED RUNS [--wrong-way WAY]`` of a program that kills: prints what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument(what, type=kind)
    parser.add_argument("seed", type=int)
    parser.add_argument("runs", type=int)
    parser.add_argument("--wrong-way", choices=wrong_ways, default="")
    options = vars(parser.parse_args())
    outcome = try_points(options["folder"], options[what], options["seed"], options["runs"], options["wrong_way"])
    print(json.dumps(outcome))  # noqa: T201
