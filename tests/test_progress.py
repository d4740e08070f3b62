"""Progress: nothing for a moment's work, the latest state for longer work, on each kind of screen."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dask.config
import nbclient
import nbformat
import pytest
from rich.console import Console

from envship import progress
from envship.progress import Display, HostProgress, Snapshot

HALF = HostProgress("node-1", "fetching", 1 << 20, 2 << 20, "from node-2")
READY = HostProgress("node-2", "ready", 2 << 20, 2 << 20, "")
FAILED = HostProgress("node[3]", "failed", 0, 2 << 20, "disk full")


class Recorder:
    """A face that remembers what it was asked to show."""

    def __init__(self) -> None:
        self.painted: list[Snapshot] = []
        self.closed: list[bool] = []

    def paint(self, snapshot: Snapshot) -> None:
        self.painted.append(snapshot)

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


def until(condition: Callable[[], object], deadline_s: float = 10) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the state was not reached in time"
        time.sleep(0.005)


def test_a_moments_work_shows_nothing_and_leaves_no_thread() -> None:
    face = Recorder()
    with Display(face, quiet_s=60) as display:
        display.update("fetch", {"h1": HALF})
    assert face.painted == []
    assert face.closed == []
    assert "envship-progress" not in [thread.name for thread in threading.enumerate()]


def test_longer_work_shows_the_latest_state_of_any_thread_even_if_nothing_moves() -> None:
    """One update, then silence: it is shown all the same, and time goes on."""
    face = Recorder()
    with Display(face, quiet_s=0.01) as display:
        thread = threading.Thread(target=display.update, args=("fetch", {"h1": HALF}))
        thread.start()
        thread.join()
        until(lambda: len(face.painted) >= 2)
        display.update("build", {"h1": READY}, "nearly")
    assert face.painted[0].hosts == {"h1": HALF}
    assert face.painted[0].elapsed_s < face.painted[1].elapsed_s
    assert face.painted[-1][:3] == ("build", {"h1": READY}, "nearly")
    assert face.closed == [False]


def test_failed_work_keeps_its_last_state() -> None:
    face = Recorder()
    with pytest.raises(ZeroDivisionError), Display(face, quiet_s=0) as display:
        display.update("fetch", {"h1": FAILED})
        until(lambda: face.painted)
        raise ZeroDivisionError
    assert face.closed == [True]


def test_a_broken_screen_does_not_break_the_work() -> None:
    class Broken(Recorder):
        def paint(self, snapshot: Snapshot) -> None:
            super().paint(snapshot)
            raise BrokenPipeError

    face = Broken()
    with Display(face, quiet_s=0) as display:
        display.update("fetch", {"h1": HALF})
        until(lambda: face.painted)
    assert face.closed == []


def test_headline_sums_up_the_hosts() -> None:
    text = Snapshot("fetch", {"a": HALF, "b": READY}, "", 2.5).headline()
    assert text == "fetch: 1 of 2 hosts ready, 3.00 MiB of 4.00 MiB, 2.50 s"


def test_of_many_hosts_those_furthest_behind_are_shown() -> None:
    hosts = {str(i): READY._replace(label=f"node-{i:04}") for i in range(1000)} | {"x": FAILED, "y": HALF}
    shown, more = Snapshot("fetch", hosts, "", 1).rows()
    assert len(shown) == progress.ROWS_SHOWN
    assert shown[:2] == [FAILED, HALF]
    assert more == "… and 990 more: 990 ready"


@pytest.mark.parametrize("failed", [True, False])
def test_terminal_table_stays_when_failed_and_goes_when_done(failed: bool) -> None:
    screen = io.StringIO()
    face = progress.TerminalFace(Console(file=screen, force_terminal=True, width=100, color_system=None))
    face.paint(Snapshot("fetch", {"a": HALF, "c": FAILED}, "", 1))
    assert "node[3]" in screen.getvalue()  # not taken for markup
    assert "disk full" in screen.getvalue()
    face.close(failed)
    erase_line = "\x1b[2K"
    assert screen.getvalue().endswith(erase_line) is not failed


def test_log_gets_a_line_for_each_phase_not_for_each_paint(capsys: pytest.CaptureFixture[str]) -> None:
    face = progress.LinesFace()
    for elapsed_s in (1.0, 1.2, 1.4, 7.0):
        face.paint(Snapshot("fetch", {"a": HALF}, "", elapsed_s))
    face.paint(Snapshot("build", {"a": READY}, "", 7.1))
    face.close(False)
    assert capsys.readouterr().err.splitlines() == [
        "envship: fetch: 1.00 MiB of 2.00 MiB, 1.00 s",
        "envship: fetch: 1.00 MiB of 2.00 MiB, 7.00 s",
        "envship: build: 2.00 MiB of 2.00 MiB, 7.10 s",
    ]


def test_without_a_terminal_only_those_who_ask_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress.open_display(None)._face is None
    assert progress.open_display(False)._face is None
    assert isinstance(progress.open_display(True)._face, progress.LinesFace)
    with dask.config.set({"envship.progress": True}):
        assert isinstance(progress.open_display(None)._face, progress.LinesFace)


def test_terminal_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(progress.open_display()._face, progress.TerminalFace)


def test_notebook_repaints_one_table_from_the_painters_thread(tmp_path: Path) -> None:
    """In a real kernel: one output for the cell, with the last state; nothing for a moment's work."""
    program = """
import time
from envship.progress import HostProgress, NotebookFace, open_display
display = open_display()
assert isinstance(display._face, NotebookFace)
display._quiet_s = 0
with display:
    display.update("fetch", {"a": HostProgress("<node>", "fetching", 1, 2, "")})
    while not display._painted:
        time.sleep(0.01)
    raise SystemExit
"""
    cell = nbformat.v4.new_code_cell(program)  # type: ignore[no-untyped-call]
    book = nbformat.v4.new_notebook(cells=[cell])  # type: ignore[no-untyped-call]
    client = nbclient.NotebookClient(book, timeout=60, kernel_name="python3", allow_errors=True)
    client.execute(env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    tables = [output.data["text/html"] for output in book.cells[0].outputs if output.output_type == "display_data"]
    assert len(tables) == 1
    assert "&lt;node&gt;" in tables[0]
    assert "fetching" in tables[0]
