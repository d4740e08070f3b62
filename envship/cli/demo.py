"""``envship demo``: the whole of it on this machine, in about a minute.

A scheduler and two workers are started from a bare environment, as processes of their own on two machines of their own
(see `envship.cli.machines`). They move into an environment with a package that they lack, back, and there again.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distributed import Client
    from rich.console import Console

    from envship.cli.machines import LittleCluster
    from envship.result import SwapResult

PACKAGE = "teapot"
SOURCE = '''"""A package that the cluster has never heard of."""

import sys


def brew(cups):
    return f"{cups} cups of tea, brewed in {sys.prefix}"
'''
TASK_TIMEOUT_S = 30
WORKERS = 2


@click.command()
def demo() -> None:
    """Move a small cluster into an environment, and back.

    Starts a scheduler and two workers on this machine that lack a package, moves them into an environment that has it,
    swaps back and forth, prints times and sizes, and leaves nothing behind. Installs two small environments with pip
    for this, so it needs a package index.
    """
    from distributed.versions import VersionMismatchWarning
    from rich.console import Console

    from envship.cli.machines import LittleCluster

    began = time.monotonic()
    # What the client has installed besides does not matter here, and Dask would say so.
    warnings.filterwarnings("ignore", category=VersionMismatchWarning)
    with _ends_tidily(), tempfile.TemporaryDirectory(prefix="envship-demo-") as folder:
        story = _Story(Console(highlight=False), Path(folder))
        base, mine = story.install()
        with LittleCluster(base, Path(folder), workers=WORKERS) as cluster, _client_side(Path(folder) / "client"):
            story.tell(cluster, mine)
    story.conclude(time.monotonic() - began)


class _Story:
    """What is done and said, in order. Everything that it makes lies below *folder*."""

    def __init__(self, console: Console, folder: Path) -> None:
        self._console = console
        self._folder = folder
        self._moves: list[tuple[str, SwapResult]] = []

    def install(self) -> tuple[Path, Path]:
        """Make the base environment of the cluster, and the user's own, which has one package more."""
        import distributed

        from envship.cli.machines import make_venv, write_wheel

        dask = f"distributed=={distributed.__version__}"
        wheel = write_wheel(self._folder / "wheels", PACKAGE, "1.0", SOURCE)
        self._heading("Two environments")
        with self._console.status(f"pip install {dask}, twice …"), ThreadPoolExecutor(2) as pool:
            base = pool.submit(make_venv, self._folder / "base", [dask])
            mine = pool.submit(make_venv, self._folder / "mine", [dask, wheel])
            made = base.result(), mine.result()
        self._say(f"base  {dask}: what the cluster is started in")
        self._say(f"mine  {dask} and {PACKAGE} 1.0: what you work in")
        return made

    def tell(self, cluster: LittleCluster, mine: Path) -> None:
        """Move the cluster into *mine* and back, with a task in between."""
        from distributed import Client

        import envship  # noqa: F401  adds the methods to the client

        teapot = importlib.import_module(PACKAGE)
        with Client(cluster.address, set_as_default=False) as client:
            cluster.wait_for_workers(client)
            self._heading(f"A scheduler and {WORKERS} workers, started from base")
            self._say(f"scheduler {cluster.address}, each worker on a machine (a store) of its own")
            self._task(client, teapot)

            self._heading("Move the whole cluster into mine: pack, upload, build, start, swap")
            self._move("base → mine", lambda: client.use_environment(mine))
            self._task(client, teapot)

            self._heading("And back")
            self._move("mine → base", client.reset_environment)
            self._task(client, teapot)

            self._heading("And there again: everything is on the machines by now")
            self._move("base → mine again", lambda: client.use_environment(mine))
            self._task(client, teapot)
            self._move("mine → mine", lambda: client.use_environment(mine))

            self._heading("Who runs what")
            self._print_status(client)

    def conclude(self, seconds: float) -> None:
        """What it all took."""
        from dask.utils import format_bytes

        from envship.cli.tables import table
        from envship.result import format_seconds

        rows = [
            (
                name,
                format_seconds(result.total_s),
                format_seconds(result.downtime_s) if result.changed else "none",
                format_bytes(result.uploaded_bytes) if result.uploaded_bytes else "nothing",
                "moved too" if result.scheduler_swapped else "stayed",
            )
            for name, result in self._moves
        ]
        columns = ("move", "whole call", "downtime", "uploaded", "scheduler")
        self._heading("What it took")
        self._console.print(table(columns, rows, right=columns[1:4]))
        self._say(f"Done in {format_seconds(seconds)}. The cluster is stopped, and what the demo made is deleted.")

    def _task(self, client: Client, teapot: Any) -> None:
        self._say(f"client.submit({PACKAGE}.brew, 3).result()", style="cyan")
        future = client.submit(teapot.brew, 3, pure=False)
        try:
            answer = future.result(TASK_TIMEOUT_S)
        except Exception as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__  # type: ignore[assignment]
            self._say(f"✗ {type(cause).__name__}: {cause}", style="red")
        else:
            self._say(f"✓ {answer}", style="green")
        finally:
            future.release()

    def _move(self, name: str, move: Any) -> None:
        call = "client.reset_environment()" if move.__name__ == "reset_environment" else "client.use_environment(mine)"
        self._say(call, style="cyan")
        result: SwapResult = move()
        self._moves.append((name, result))
        self._say(repr(result))

    def _print_status(self, client: Client) -> None:
        from envship.cli.tables import table

        status = client.environment_status()
        keep = (0, 3, 5)  # process, prefix, PID: as much as a narrow terminal can hold
        rows = [tuple(row[i].replace(str(self._folder), "…") for i in keep) for row in status.process_rows()]
        self._console.print(table(("process", "prefix", "PID"), rows, right=("PID",)))

    def _heading(self, text: str) -> None:
        self._console.print()
        self._console.rule(f"[bold]{text}", align="left")

    def _say(self, text: str, style: str = "") -> None:
        shown = text.replace(str(self._folder), "…")
        self._console.print(shown, style=style, markup=False, soft_wrap=True)


@contextmanager
def _client_side(folder: Path) -> Iterator[None]:
    """This process as the user's machine: with a store in *folder*, and able to import the package."""
    folder.mkdir()
    (folder / f"{PACKAGE}.py").write_text(SOURCE)
    before = os.environ.get("ENVSHIP_STORE")
    os.environ["ENVSHIP_STORE"] = str(folder / "store")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(PACKAGE, None)
        os.environ.pop("ENVSHIP_STORE")
        if before is not None:
            os.environ["ENVSHIP_STORE"] = before


@contextmanager
def _ends_tidily() -> Iterator[None]:
    """Turn SIGTERM into an exit that runs the clean-up on its way, as Ctrl-C does by itself."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
