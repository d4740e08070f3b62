"""``envship show`` and ``envship diff``: what is in environments, and what is different between two of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envship.cli.packed_as import PackingCommand
from envship.cli.quantities import Folder
from envship.cli.summary import open_store, print_summary, reported, summary
from envship.cli.tables import plain

if TYPE_CHECKING:
    from envship.difference import Difference, FileChange
    from envship.environment import Environment
    from envship.options import PackOptions
    from envship.usage import Part

ROWS_SHOWN = 15
FILES_SHOWN = 20

_store = click.option("--store", "store_path", type=Folder(), help="Look in this store instead of your own.")


@click.command(cls=PackingCommand)
@click.argument("source")
@_store
@click.option("--all", "show_all", is_flag=True, help=f"List everything, not only the {ROWS_SHOWN} largest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything.")
def show(source: str, packed_as: PackOptions, store_path: Path | None, show_all: bool, as_json: bool) -> None:
    """Show what SOURCE holds: versions, packages by size, where the bytes are, what could be left out.

    SOURCE is a bundle (.envship), an environment id that the store holds, a conda environment's name, the path of a
    prefix, or an archive that conda-pack made. An environment that is not packed yet is packed first.
    """
    from envship.environment import resolve
    from envship.usage import usage

    with reported("reading") as report:
        environment = resolve(source, store=open_store(store_path), options=packed_as, report=report)
        used = usage(environment)
    if as_json:
        packages = [
            {"name": p.name, "version": p.version, "build": p.build, "kind": p.kind, "size_bytes": p.size_bytes}
            for p in _by_size(environment)
        ]
        click.echo(json.dumps({**summary(environment), "packages": packages, **asdict(used)}))
        return
    print_summary(environment)
    _print_packages(environment, show_all)
    _print_parts("kind of file", used.kinds, environment.nbytes, show_all)
    _print_parts("folder", used.folders, environment.nbytes, show_all)
    _print_unneeded(used.unneeded, environment.nbytes)


@click.command(cls=PackingCommand)
@click.argument("old")
@click.argument("new")
@_store
@click.option(
    "--all", "show_all", is_flag=True, help=f"List every file, not only the first {FILES_SHOWN} of a package."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything.")
def diff(old: str, new: str, packed_as: PackOptions, store_path: Path | None, show_all: bool, as_json: bool) -> None:
    """Show what NEW has that OLD has not: packages, files, and the bytes that a cluster with OLD has to receive.

    Both are whatever "envship show" takes.
    """
    from envship.environment import resolve

    store = open_store(store_path)
    with reported("reading") as report:
        before, after = (resolve(each, store=store, options=packed_as, report=report) for each in (old, new))
        found = before.diff(after)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    _print_difference(found, show_all)


def _print_packages(environment: Environment, show_all: bool) -> None:
    ordered = _by_size(environment)
    rows = [(p.name or "(no package)", p.version, p.kind, p.size_bytes) for p in ordered]
    _print_sized(("package", "version", "kind"), rows, environment.nbytes, show_all)


def _print_parts(title: str, parts: Sequence[Part], total_bytes: int, show_all: bool) -> None:
    rows = [(_part_name(part, parts), f"{part.files:,}", part.size_bytes) for part in parts]
    _print_sized((title, "files"), rows, total_bytes, show_all)


def _part_name(part: Part, parts: Sequence[Part]) -> str:
    """Its name; of a folder in which others lie that have a row of their own, that this is what is left."""
    is_rest = any(other.name != part.name and other.name.startswith(part.name) for other in parts)
    return (part.name or "(top)") + (" (the rest)" if is_rest and part.name.endswith("/") else "")


def _print_sized(columns: Sequence[str], rows: Sequence[Sequence[Any]], total_bytes: int, show_all: bool) -> None:
    """A table whose last column is a size: with its share of all, and a bar."""
    from dask.utils import format_bytes

    from envship.cli.tables import console, table

    shown = rows if show_all else rows[:ROWS_SHOWN]
    texts = [
        (*row[:-1], format_bytes(row[-1]), f"{row[-1] / max(total_bytes, 1):.1%}", _bar(row[-1], total_bytes))
        for row in shown
    ]
    out = console()
    out.print(table((*columns, "size", "share", ""), texts, right=("files", "size", "share")))
    rest = rows[len(shown) :]
    if rest:
        rest_bytes = sum(row[-1] for row in rest)
        out.print(f"… and {len(rest)} smaller ones, {format_bytes(rest_bytes)} (--all lists them)")


def _print_unneeded(parts: Sequence[Any], total_bytes: int) -> None:
    from dask.utils import format_bytes

    from envship.cli.tables import console, table

    if not parts:
        return
    ordered = sorted(parts, key=lambda part: -part.size_bytes)
    rows = [
        (
            part.name,
            f"{part.files:,}",
            format_bytes(part.size_bytes),
            f"{part.size_bytes / max(total_bytes, 1):.1%}",
            " ".join(f"--exclude '{pattern}'" for pattern in part.patterns),
        )
        for part in ordered
    ]
    columns = ("often not needed", "files", "size", "share", "left out by")
    console().print(table(columns, rows, right=("files", "size", "share")))


def _print_difference(found: Difference, show_all: bool) -> None:
    from dask.utils import format_bytes

    from envship.cli.tables import console, table

    click.echo(f"old  {found.old_id}")
    click.echo(f"new  {found.new_id}")
    if found.is_empty:
        click.echo("They are the same environment.")
        return
    click.echo(
        f"to receive, for a cluster that holds the old one: {format_bytes(found.ship_bytes)} in {found.ship_chunks} "
        f"chunks ({format_bytes(found.ship_uncompressed_bytes)} uncompressed), "
        f"and {format_bytes(found.manifest_bytes)} of the manifest"
    )
    for name, (before, after) in found.settings.items():
        click.echo(plain(f"{name}: {before or '(not set)'} → {after or '(not set)'}"))
    rows = [
        (
            change.name or "(no package)",
            _versions(change.old_version, change.new_version),
            change.kind,
            f"{len(change.files):,}",
            format_bytes(change.new_bytes),
            format_bytes(change.ship_bytes),
        )
        for change in found.packages
    ]
    out = console()
    columns = ("package", "version", "", "files", "new", "to ship")
    out.print(table(columns, rows, right=("files", "new", "to ship")))
    for change in found.packages:
        out.print(plain(f"{change.name or '(no package)'}:"), highlight=False, markup=False)
        _print_files(change.files, show_all)


def _print_files(files: Sequence[FileChange], show_all: bool) -> None:
    from dask.utils import format_bytes

    shown = files
    if len(files) > FILES_SHOWN and not show_all:
        # Where the bytes are, which the first ones by name need not tell.
        shown = sorted(files, key=lambda file: -max(file.old_bytes, file.new_bytes))[:FILES_SHOWN]
    for file in shown:
        mark = {"added": "+", "removed": "-", "changed": "~"}[file.kind]
        sizes = " → ".join(format_bytes(size) for size in (file.old_bytes, file.new_bytes))
        click.echo(plain(f"  {mark} {file.path}  ({sizes})"))
    if len(files) > len(shown):
        click.echo(f"  … and {len(files) - len(shown)} smaller ones (--all lists them)")


def _versions(old: str, new: str) -> str:
    return old if old == new else " → ".join(version or "-" for version in (old, new))


def _bar(size_bytes: int, total_bytes: int) -> str:
    return "█" * round(30 * size_bytes / max(total_bytes, 1))


def _by_size(environment: Environment) -> list[Any]:
    return sorted(environment.packages, key=lambda p: (-p.size_bytes, p.name))
