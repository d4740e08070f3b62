"""What the calls of the client return: a swap, a staging, and the state of a cluster.

Values only, made by `envship.client`. Each prints well in a terminal (``repr``) and in a notebook (``_repr_html_``);
the tables of the command line are made from the same fields in `envship.cli`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TypedDict

from dask.utils import format_bytes

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.layout import SHORT_ID_LENGTH

PHASES = ("pack", "check", "upload", "fetch", "build", "start", "commit")
"""The phases of a swap, in the order in which they begin."""

WORTH_A_WORD_S = 0.005
"""Phases that took less are not shown."""


@dataclass(frozen=True, slots=True, repr=False)
class SwapResult:
    """A cluster that was moved, or was found where it should be.

    Parameters
    ----------
    environment_id
        What the cluster runs in now; None is the base environment.
    previous_id
        What it ran in before.
    scheduler_swapped
        Whether the scheduler was moved as well.
    hosts, workers
        How many of each run in the environment now.
    uploaded_bytes, uploaded_chunks
        What this client sent: compressed size and count of the chunks that the cluster lacked.
    seconds
        Seconds spent in each phase (see `PHASES`). Phases that overlap add up to more than the total.
    total_s
        Seconds of the whole call.
    downtime_s
        Seconds from stopping the first worker until the last one was back.
    changed
        False if the cluster ran in the environment already.
    lost_futures
        How many futures of this client had to be cancelled because the scheduler was moved.
    """

    environment_id: EnvironmentId | None
    previous_id: EnvironmentId | None
    scheduler_swapped: bool
    hosts: int
    workers: int
    uploaded_bytes: int
    uploaded_chunks: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_s: float = 0.0
    downtime_s: float = 0.0
    changed: bool = True
    lost_futures: int = 0

    def __repr__(self) -> str:
        return "\n".join([self.headline(), *(f"  {name:<9} {text}" for name, text in self._rows())])

    def _repr_html_(self) -> str:
        return _html_table(self.headline(), self._rows())

    def headline(self) -> str:
        """What happened, in one line."""
        where = name_of(self.environment_id)
        if not self.changed:
            return f"The cluster runs in {where} already ({format_seconds(self.total_s)})"
        return f"The cluster moved from {name_of(self.previous_id)} to {where} in {format_seconds(self.total_s)}"

    def _rows(self) -> list[tuple[str, str]]:
        scheduler = ", and the scheduler" if self.scheduler_swapped else ""
        rows = [("runs on", f"{_count(self.workers, 'worker')} on {_count(self.hosts, 'host')}{scheduler}")]
        rows.append(("uploaded", _uploaded(self.uploaded_bytes, self.uploaded_chunks)))
        if self.changed:
            rows.append(("phases", _phases(self.seconds)))
            rows.append(("downtime", format_seconds(self.downtime_s)))
        if self.lost_futures:
            rows.append(("lost", f"{_count(self.lost_futures, 'future')} cancelled: compute again what you still need"))
        return rows


@dataclass(frozen=True, slots=True, repr=False)
class StagedResult:
    """An environment that is built on every host of a cluster, ready to be used.

    Parameters
    ----------
    environment_id
        What was staged.
    hosts
        How many hosts hold it now.
    uploaded_bytes, uploaded_chunks, seconds, total_s
        As for `SwapResult`.
    """

    environment_id: EnvironmentId
    hosts: int
    uploaded_bytes: int
    uploaded_chunks: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_s: float = 0.0

    def __repr__(self) -> str:
        return "\n".join([self.headline(), *(f"  {name:<9} {text}" for name, text in self._rows())])

    def _repr_html_(self) -> str:
        return _html_table(self.headline(), self._rows())

    def headline(self) -> str:
        """What happened, in one line."""
        hosts = _count(self.hosts, "host")
        return f"{name_of(self.environment_id).capitalize()} is ready on {hosts} after {format_seconds(self.total_s)}"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("uploaded", _uploaded(self.uploaded_bytes, self.uploaded_chunks)),
            ("phases", _phases(self.seconds)),
        ]


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A scheduler or a worker, and the environment that it runs in.

    Parameters
    ----------
    address, name
        As Dask knows it.
    host_id
        The host (store) that it belongs to.
    pid
        Of the process itself, not of its nanny.
    environment_id
        What it runs in; None is the base environment.
    prefix
        ``sys.prefix`` there.
    python
        Version of the interpreter.
    nanny
        Whether a nanny looks after it.
    """

    address: str
    name: str
    host_id: str
    pid: int
    environment_id: EnvironmentId | None
    prefix: str
    python: str
    nanny: bool


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The store of a host, and what is in it.

    Parameters
    ----------
    host_id, hostname, store
        The random id of the store, the machine that answered for it, the path there.
    built
        Environments whose prefix is ready there.
    warm
        Environments for which an interpreter is parked there, so that going back is immediate.
    warm_bytes
        Memory of the parked interpreters.
    free_bytes
        Room on the file system of the store.
    received
        Bytes of chunks that it received since the scheduler started, by where from: another host's id, ``client``, or
        ``shared file``.
    served_bytes
        Bytes of chunks that it gave to other hosts.
    rate
        Bytes a second that it receives now.
    left_out
        Host ids of sources that it does not ask any more, and why.
    """

    host_id: str
    hostname: str
    store: str
    built: tuple[EnvironmentId, ...]
    warm: tuple[EnvironmentId, ...]
    warm_bytes: int
    free_bytes: int
    received: Mapping[str, int] = field(default_factory=dict)
    served_bytes: int = 0
    rate: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)


class EnvironmentSummary(TypedDict, total=False):
    """What is known of an environment: count of packages, uncompressed size."""

    packages: int
    size_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class EnvironmentStatus:
    """Who runs what, and who holds what.

    Parameters
    ----------
    target_id
        The environment that the cluster should run in; None is the base environment.
    environments
        The environments that the cluster knows.
    scheduler
        The scheduler.
    workers
        Worker address to worker.
    hosts
        Host id to host.
    """

    target_id: EnvironmentId | None
    environments: Mapping[EnvironmentId, EnvironmentSummary]
    scheduler: ProcessStatus
    workers: Mapping[str, ProcessStatus]
    hosts: Mapping[str, HostStatus]

    @property
    def in_target(self) -> bool:
        """Whether every worker runs in the target environment."""
        return all(worker.environment_id == self.target_id for worker in self.workers.values())

    def label(self, environment_id: EnvironmentId | None) -> str:
        """How to show an environment: by the start of its id."""
        return "base" if environment_id is None else environment_id[:SHORT_ID_LENGTH]

    def process_rows(self) -> list[tuple[str, ...]]:
        """The scheduler and each worker as texts: (process, address, environment, prefix, Python, PID, host)."""
        processes = [("scheduler", self.scheduler), *((f"worker {w.name}", w) for w in self.workers.values())]
        return [
            (what, p.address, self.label(p.environment_id), p.prefix, p.python, str(p.pid), self._hostname(p.host_id))
            for what, p in processes
        ]

    def host_rows(self) -> list[tuple[str, ...]]:
        """Each host as texts: (host, store, free, built, warm, received, served)."""
        return [
            (
                host.hostname,
                host.store,
                format_bytes(host.free_bytes),
                self._labels(host.built),
                self._labels(host.warm) + (f" ({format_bytes(host.warm_bytes)})" if host.warm else ""),
                self._received(host),
                format_bytes(host.served_bytes) if host.served_bytes else "-",
            )
            for host in self.hosts.values()
        ]

    def __repr__(self) -> str:
        lines = [self.headline(), _text_table(PROCESS_COLUMNS, self.process_rows())]
        if self.hosts:
            lines.append(_text_table(HOST_COLUMNS, self.host_rows()))
        return "\n\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<div><b>{escape(self.headline())}</b></div>", _html_grid(PROCESS_COLUMNS, self.process_rows())]
        if self.hosts:
            parts.append(_html_grid(HOST_COLUMNS, self.host_rows()))
        return "\n".join(parts)

    def headline(self) -> str:
        """Where the workers are, in one line."""
        there = sum(worker.environment_id == self.target_id for worker in self.workers.values())
        what = "base environment" if self.target_id is None else f"environment {self.label(self.target_id)}"
        return f"{there} of {_count(len(self.workers), 'worker')} in the {what}"

    def _received(self, host: HostStatus) -> str:
        if not host.received:
            return "-"
        largest = sorted(host.received.items(), key=lambda item: item[1], reverse=True)
        parts = [f"{self._hostname(source) or source} {format_bytes(size)}" for source, size in largest[:SOURCES_SHOWN]]
        if len(largest) > SOURCES_SHOWN:
            parts.append(
                f"{len(largest) - SOURCES_SHOWN:,} more {format_bytes(sum(s for _, s in largest[SOURCES_SHOWN:]))}"
            )
        now = f" (now {format_bytes(int(host.rate))}/s)" if host.rate else ""
        left_out = f"; left out: {', '.join(self._hostname(h) or h for h in host.left_out)}" if host.left_out else ""
        return ", ".join(parts) + now + left_out

    def _hostname(self, host_id: str) -> str:
        return self.hosts[host_id].hostname if host_id in self.hosts else ""

    def _labels(self, environment_ids: Iterable[EnvironmentId]) -> str:
        return ", ".join(self.label(environment_id) for environment_id in environment_ids) or "-"


PROCESS_COLUMNS = ("process", "address", "environment", "prefix", "Python", "PID", "host")
HOST_COLUMNS = ("host", "store", "free", "built", "warm", "received", "served")
SOURCES_SHOWN = 3
"""More sources than this of one host are summed up."""


def name_of(environment_id: EnvironmentId | None) -> str:
    """An environment in a sentence."""
    return "the base environment" if environment_id is None else f"environment {environment_id[:SHORT_ID_LENGTH]}"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``0.34 s``, ``12.3 s``, ``2 min 5 s``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _uploaded(size_bytes: int, chunks: int) -> str:
    return f"{format_bytes(size_bytes)} in {_count(chunks, 'chunk')}" if chunks else "nothing"


def _phases(seconds: Mapping[str, float]) -> str:
    order = [*PHASES, *(phase for phase in seconds if phase not in PHASES)]
    spent = [phase for phase in order if seconds.get(phase, 0.0) >= WORTH_A_WORD_S]
    return ", ".join(f"{phase} {format_seconds(seconds[phase])}" for phase in spent) or "-"


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(_html_row(row, first="th") for row in rows)
    return f"<div><b>{escape(title)}</b></div>\n<table>{cells}</table>"


def _html_grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f"<table><tr>{head}</tr>{''.join(_html_row(row) for row in rows)}</table>"


def _html_row(row: Sequence[str], first: str = "td") -> str:
    tags = [first, *["td"] * (len(row) - 1)]
    cells = zip(tags, row, strict=True)
    return "<tr>" + "".join(f'<{tag} style="text-align:left">{escape(text)}</{tag}>' for tag, text in cells) + "</tr>"
