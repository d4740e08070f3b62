"""What the commands print: tables and consoles, the same for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH_IN_A_PIPE = 240
"""Columns where there is no terminal: wide enough that no id and no path is cut for the program that reads it."""


def console() -> Console:
    """The standard output, as wide as the terminal or `WIDTH_IN_A_PIPE`."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_PIPE, highlight=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = (), title: str = ""
) -> Table:
    """A table of texts. Those columns whose name *right* holds are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        # Names of packages, workers and paths are texts of others: their brackets are no markup.
        made.add_row(*(Text(cell) for cell in row))
    return made
