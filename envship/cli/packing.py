"""``envship pack`` and ``envship show``: environments on this machine. Nothing here talks to a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envship.cli.packed_as import PackingCommand

if TYPE_CHECKING:
    from envship.environment import Environment
    from envship.options import PackOptions
    from worker_bootstrap.store import Store

PACKAGES_SHOWN = 15


_output = click.Path(path_type=Path, dir_okay=False)
_folder = click.Path(path_type=Path, file_okay=False)


@click.command(cls=PackingCommand)
@click.argument("source", required=False)
@click.option("-o", "--output", type=_output, help="Save a bundle (.envship) as well.")
@click.option("--store", "store_path", type=_folder, help="Pack into this store instead of your own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pack(
    source: str | None, output: Path | None, packed_as: PackOptions, store_path: Path | None, as_json: bool
) -> None:
    """Pack SOURCE into the store of this machine, and into a bundle with -o.

    SOURCE is a conda environment's name or the path of a prefix (conda or venv); without it, the environment that
    envship itself runs in.
    """
    from envship.pack import pack as pack_environment

    began = time.monotonic()
    with _reported("packing") as report:
        environment = pack_environment(source, store=_open_store(store_path), options=packed_as, report=report)
        saved = environment.save(output) if output is not None else None
    seconds = time.monotonic() - began
    if as_json:
        bundle = {"bundle": str(saved), "bundle_bytes": saved.stat().st_size} if saved is not None else {}
        click.echo(json.dumps({**_summary(environment), **bundle, "seconds": round(seconds, 3)}))
        return
    _print_summary(environment, seconds)
    if saved is not None:
        from dask.utils import format_bytes

        click.echo(f"bundle       {saved} ({format_bytes(saved.stat().st_size)})")


@click.command(cls=PackingCommand)
@click.argument("source")
@click.option("--store", "store_path", type=_folder, help="Look in this store instead of your own.")
@click.option("--all", "show_all", is_flag=True, help=f"List every package, not only the {PACKAGES_SHOWN} largest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every package.")
def show(source: str, packed_as: PackOptions, store_path: Path | None, show_all: bool, as_json: bool) -> None:
    """Show what SOURCE holds: versions, packages by size, where the bytes are.

    SOURCE is a bundle (.envship), an environment id that the store holds, a conda environment's name or the path of a
    prefix. An environment that is not packed yet is packed first.
    """
    from envship.environment import resolve

    with _reported("reading") as report:
        environment = resolve(source, store=_open_store(store_path), options=packed_as, report=report)
    if as_json:
        packages = [
            {"name": p.name, "version": p.version, "build": p.build, "kind": p.kind, "size_bytes": p.size_bytes}
            for p in _by_size(environment)
        ]
        click.echo(json.dumps({**_summary(environment), "packages": packages}))
        return
    _print_summary(environment)
    _print_packages(environment, show_all)


def _open_store(path: Path | None) -> Store:
    from worker_bootstrap.location import open_store

    return open_store(path)


@contextmanager
def _reported(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    from envship import progress

    with progress.open_display() as display:

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            here = progress.HostProgress("this machine", stage, done_bytes, total_bytes, "")
            display.update(doing, {"here": here})

        yield report


def _summary(environment: Environment) -> dict[str, Any]:
    built = environment.store.built(environment.id)
    return {
        "id": environment.id,
        "platform": environment.platform,
        "versions": dict(environment.versions),
        "packages": len(environment.packages),
        "size_bytes": environment.nbytes,
        "chunks": len(environment.chunks),
        "store": str(environment.store.layout.root),
        "built": str(built) if built is not None else None,
    }


def _print_summary(environment: Environment, seconds: float | None = None) -> None:
    from dask.utils import format_bytes

    from envship.result import format_seconds

    summary = _summary(environment)
    versions: Mapping[str, str | None] = summary["versions"]
    took = f", in {format_seconds(seconds)}" if seconds is not None else ""
    click.echo(f"environment  {summary['id']}")
    click.echo("versions     " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    click.echo(f"platform     {summary['platform']}")
    click.echo(f"size         {format_bytes(summary['size_bytes'])} in {summary['packages']} packages{took}")
    click.echo(f"store        {summary['store']} ({summary['chunks']} chunks)")
    if summary["built"]:
        click.echo(f"built        {summary['built']}")


def _print_packages(environment: Environment, show_all: bool) -> None:
    from dask.utils import format_bytes

    from envship.cli.tables import console, table

    ordered = _by_size(environment)
    shown = ordered if show_all else ordered[:PACKAGES_SHOWN]
    total_bytes = max(environment.nbytes, 1)
    rows = [
        (
            p.name or "(no package)",
            p.version,
            p.kind,
            format_bytes(p.size_bytes),
            f"{p.size_bytes / total_bytes:.1%}",
            "█" * round(30 * p.size_bytes / total_bytes),
        )
        for p in shown
    ]
    out = console()
    out.print(table(("package", "version", "kind", "size", "share", ""), rows, right=("size", "share")))
    rest = ordered[len(shown) :]
    if rest:
        rest_bytes = sum(p.size_bytes for p in rest)
        out.print(f"… and {len(rest)} smaller ones, {format_bytes(rest_bytes)} (--all lists them)")


def _by_size(environment: Environment) -> list[Any]:
    return sorted(environment.packages, key=lambda p: (-p.size_bytes, p.name))
