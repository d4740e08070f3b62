"""What several commands say of an environment, and how they show that something is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envship.cli.tables import plain

if TYPE_CHECKING:
    from envship.environment import Environment
    from worker_bootstrap.store import Store


def open_store(path: Path | None) -> Store:
    from worker_bootstrap.location import open_store

    return open_store(path)


@contextmanager
def reported(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    from envship import progress

    with progress.open_display() as display:

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            here = progress.HostProgress("this machine", stage, done_bytes, total_bytes, "")
            display.update(doing, {"here": here})

        yield report


def summary(environment: Environment) -> dict[str, Any]:
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


def print_summary(environment: Environment, seconds: float | None = None) -> None:
    from dask.utils import format_bytes

    from envship.result import format_seconds

    told = summary(environment)
    versions: Mapping[str, str | None] = told["versions"]
    took = f", in {format_seconds(seconds)}" if seconds is not None else ""
    click.echo(f"environment  {told['id']}")
    click.echo(plain("versions     " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items())))
    click.echo(plain(f"platform     {told['platform']}"))
    click.echo(f"size         {format_bytes(told['size_bytes'])} in {told['packages']} packages{took}")
    click.echo(f"store        {told['store']} ({told['chunks']} chunks)")
    if told["built"]:
        click.echo(f"built        {told['built']}")
