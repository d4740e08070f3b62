"""Progress of whatever takes over a second: in a notebook, on a terminal, or as lines in a log.

`open_display` picks the face. Whoever works calls `Display.update` as often as it likes, from any thread; a
painter thread shows the latest state a few times a second, and nothing at all before a second has passed. Does not know
what a swap is: packing and uploads are shown the same way.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dask.utils import format_bytes

from envship import config
from envship.result import format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.spinner import Spinner

QUIET_S = 1.0
"""Nothing is shown of what takes less."""
REPAINT_S = 0.15
LINE_EVERY_S = 5.0
"""Without a terminal, a phase that goes on adds a line this often."""
ROWS_SHOWN = 12
"""More hosts than this are summed up; those furthest behind are shown."""

STATES = ("failed", "waiting", "fetching", "building", "starting", "ready")
"""States of a host, in the order in which they are shown."""


class HostProgress(NamedTuple):
    """How far one host is. *state* is one of `STATES`; *done_bytes* of *total_bytes* (0: unknown)."""

    label: str
    state: str
    done_bytes: int
    total_bytes: int
    detail: str


class Snapshot(NamedTuple):
    """What is shown at one moment."""

    phase: str
    hosts: Mapping[str, HostProgress]
    note: str
    elapsed_s: float

    @property
    def done_bytes(self) -> int:
        return sum(host.done_bytes for host in self.hosts.values())

    @property
    def total_bytes(self) -> int:
        return sum(host.total_bytes for host in self.hosts.values())

    def headline(self) -> str:
        """One line: phase, hosts that are ready, bytes, time."""
        parts = []
        if len(self.hosts) > 1:
            ready = sum(host.state == "ready" for host in self.hosts.values())
            parts.append(f"{ready} of {len(self.hosts)} hosts ready")
        if self.total_bytes:
            parts.append(f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}")
        parts.append(format_seconds(self.elapsed_s))
        if self.note:
            parts.append(self.note)
        return f"{self.phase}: {', '.join(parts)}"

    def rows(self) -> tuple[Sequence[HostProgress], str]:
        """The hosts to show, those furthest behind first, and a line that sums up the others."""
        ordered = sorted(self.hosts.values(), key=_urgency)
        shown, hidden = ordered[:ROWS_SHOWN], ordered[ROWS_SHOWN:]
        counts = {state: sum(host.state == state for host in hidden) for state in STATES}
        summary = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
        return shown, f"… and {len(hidden):,} more: {summary}" if hidden else ""


class Face(Protocol):
    """Where snapshots are shown. Used from one thread at a time."""

    def paint(self, snapshot: Snapshot) -> None:
        """Show *snapshot* instead of what was shown before."""

    def close(self, failed: bool) -> None:
        """Leave the screen tidy; keep the last state if the work *failed*."""


class Display:
    """Shows the latest of many updates. A context manager; use it once.

    Parameters
    ----------
    face
        Where to show; None shows nothing.
    quiet_s
        Nothing is shown before this many seconds have passed.

    Notes
    -----
    `update` may be called from any thread and returns at once. A face that raises is given up: progress must never
    break the work that it shows.
    """

    def __init__(self, face: Face | None, quiet_s: float = QUIET_S) -> None:
        self._face = face
        self._quiet_s = quiet_s
        self._latest: Snapshot | None = None
        self._began = time.monotonic()
        self._over = threading.Event()
        self._painter = threading.Thread(target=self._paint_until_over, name="envship-progress", daemon=True)
        self._painted = False

    def update(self, phase: str, hosts: Mapping[str, HostProgress], note: str = "") -> None:
        """Make this the state to show. *hosts* maps any key to how far that host is."""
        self._latest = Snapshot(phase, dict(hosts), note, 0.0)

    def __enter__(self) -> Display:
        self._began = time.monotonic()
        if self._face is not None:
            self._painter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._face is None:
            return
        self._painter.join()
        if self._painted:
            try:
                self._paint()
                self._face.close(failed=kind is not None)
            except Exception:
                self._face = None

    def _paint_until_over(self) -> None:
        wait_s = self._quiet_s
        while not self._over.wait(wait_s):
            try:
                self._paint()
            except Exception:
                self._painted = False
                return
            wait_s = REPAINT_S

    def _paint(self) -> None:
        snapshot = self._latest
        if snapshot is not None and self._face is not None:
            self._painted = True
            self._face.paint(snapshot._replace(elapsed_s=time.monotonic() - self._began))


def open_display(enabled: bool | None = None) -> Display:
    """A display that fits where this process runs.

    Parameters
    ----------
    enabled
        False shows nothing. True shows progress everywhere, as lines where there is no terminal. None is what
        ``envship.progress`` says in Dask's configuration; by default, notebooks and terminals only.

    Raises
    ------
    SettingInvalid
        If that setting is not usable.
    """
    if enabled is None:
        enabled = config.progress()
    if enabled is False:
        return Display(None)
    if _in_notebook():
        return Display(NotebookFace())
    if sys.stderr is not None and sys.stderr.isatty():
        return Display(TerminalFace())
    return Display(LinesFace() if enabled else None)


class TerminalFace:
    """A table on standard error that repaints itself, and is gone when the work is done.

    Parameters
    ----------
    console
        Where to write, instead of standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._live = Live(console=console or Console(stderr=True), auto_refresh=False, transient=True)
        self._spinner = Spinner("dots")

    def paint(self, snapshot: Snapshot) -> None:
        if not self._live.is_started:
            self._live.start()
        self._spinner.update(text=snapshot.headline(), style="bold")
        self._live.update(_rich_view(self._spinner, snapshot), refresh=True)

    def close(self, failed: bool) -> None:
        self._live.transient = not failed
        self._live.stop()


class LinesFace:
    """A line on standard error for each phase, and now and then one more while it lasts."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._due_s = 0.0

    def paint(self, snapshot: Snapshot) -> None:
        if snapshot.phase == self._phase and snapshot.elapsed_s < self._due_s:
            return
        self._phase = snapshot.phase
        self._due_s = snapshot.elapsed_s + LINE_EVERY_S
        self._write(snapshot.headline())

    def close(self, failed: bool) -> None:
        pass

    def _write(self, line: str) -> None:
        sys.stderr.write(f"envship: {line}\n")
        sys.stderr.flush()


class NotebookFace:
    """A table below the cell that repaints itself; needs IPython, and no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._snapshot: Snapshot | None = None

    def paint(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._show(_html(snapshot), snapshot.headline())

    def close(self, failed: bool) -> None:
        if not failed and self._snapshot is not None:
            line = f"done in {format_seconds(self._snapshot.elapsed_s)}"
            self._show(f"<div>{line}</div>", line)

    def _show(self, html: str, text: str) -> None:
        from IPython.display import display

        data = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _urgency(host: HostProgress) -> tuple[int, float, str]:
    rank = STATES.index(host.state) if host.state in STATES else 0
    return rank, host.done_bytes / host.total_bytes if host.total_bytes else 0.0, host.label


def _amount(host: HostProgress) -> str:
    return f"{format_bytes(host.done_bytes)} of {format_bytes(host.total_bytes)}" if host.total_bytes else ""


def _rich_view(spinner: Spinner, snapshot: Snapshot) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    shown, more = snapshot.rows()
    for host in shown:
        bar = ProgressBar(total=host.total_bytes, completed=host.done_bytes, width=24) if host.total_bytes else ""
        style = {"failed": "red", "ready": "green"}.get(host.state, "")
        # Labels and details are texts of others: as Text, their brackets are not taken for markup.
        table.add_row(Text("  " + host.label), Text(host.state, style), bar, Text(_amount(host)), Text(host.detail))
    return Group(spinner, table, *([Text("  " + more)] if more else []))


def _html(snapshot: Snapshot) -> str:
    shown, more = snapshot.rows()
    rows = "".join(_html_row(host) for host in shown)
    rest = f"<div>{escape(more)}</div>" if more else ""
    return f"<div><b>{escape(snapshot.headline())}</b></div><table>{rows}</table>{rest}"


def _html_row(host: HostProgress) -> str:
    bar = f'<progress max="{host.total_bytes}" value="{host.done_bytes}"></progress>' if host.total_bytes else ""
    texts = (escape(host.label), escape(host.state), bar, escape(_amount(host)), escape(host.detail))
    return "<tr>" + "".join(f'<td style="text-align:left">{text}</td>' for text in texts) + "</tr>"


def _in_notebook() -> bool:
    # Asking only where IPython is loaded already keeps plain scripts from importing it.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None
