"""What the commands print: tables and consoles, the same for all of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH_IN_A_PIPE = 240
"""Columns where there is no terminal: wide enough that no id and no path is cut for the program that reads it."""


_ORDERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but for the ends of lines and tabs, which messages have."""


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
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def plain(text: str) -> str:
    """*text* with escapes in the place of what a terminal takes for orders: names in bundles are texts of others."""
    return _ORDERS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
