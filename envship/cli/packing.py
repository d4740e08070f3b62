"""``envship pack`` and ``envship export``: environments on this machine, and files made of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envship.cli.packed_as import PackingCommand
from envship.cli.quantities import Folder
from envship.cli.summary import open_store, print_summary, reported, summary

if TYPE_CHECKING:
    from envship.options import PackOptions


class _Output(click.Path):
    """A file to be written, in a folder that is there: an environment may take minutes to pack."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent}", param, ctx)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            self.fail(f"nothing can be written in the folder {path.parent}", param, ctx)
        return path


_output = _Output(path_type=Path, dir_okay=False)


@click.command(cls=PackingCommand)
@click.argument("source", required=False)
@click.option("-o", "--output", type=_output, help="Save a bundle (.envship) as well.")
@click.option("--store", "store_path", type=Folder(), help="Pack into this store instead of your own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pack(
    source: str | None, output: Path | None, packed_as: PackOptions, store_path: Path | None, as_json: bool
) -> None:
    """Pack SOURCE into the store of this machine, and into a bundle with -o.

    SOURCE is a conda environment's name, the path of a prefix (conda or venv) or an archive that conda-pack made
    (.tar.gz, .zip and the like); without it, the environment that envship itself runs in.
    """
    from envship.pack import pack as pack_environment

    began = time.monotonic()
    with reported("packing") as report:
        environment = pack_environment(source, store=open_store(store_path), options=packed_as, report=report)
        saved = environment.save(output) if output is not None else None
    seconds = time.monotonic() - began
    if as_json:
        bundle = {"bundle": str(saved), "bundle_bytes": saved.stat().st_size} if saved is not None else {}
        click.echo(json.dumps({**summary(environment), **bundle, "seconds": round(seconds, 3)}))
        return
    print_summary(environment, seconds)
    if saved is not None:
        from dask.utils import format_bytes

        click.echo(f"bundle       {saved} ({format_bytes(saved.stat().st_size)})")


@click.command(cls=PackingCommand)
@click.argument("source", required=False)
@click.option("-o", "--output", type=_output, required=True, help="Such as analysis.tar.gz, .tar.zst or .zip.")
@click.option("--store", "store_path", type=Folder(), help="Pack into this store instead of your own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(source: str | None, output: Path, packed_as: PackOptions, store_path: Path | None, as_json: bool) -> None:
    """Write SOURCE as an archive that conda-pack's users know: unpack it, source bin/activate, run conda-unpack.

    SOURCE is all that "envship show" takes; without it, the environment that envship itself runs in. Clusters need no
    archive: "envship pack -o FILE.envship" makes a bundle, several times as quickly.
    """
    from dask.utils import format_bytes

    from envship.environment import resolve

    with reported("exporting") as report:
        environment = resolve(source, store=open_store(store_path), options=packed_as, report=report)
        environment.export(output)
    size_bytes = output.stat().st_size
    if as_json:
        click.echo(json.dumps({**summary(environment), "archive": str(output), "archive_bytes": size_bytes}))
        return
    click.echo(f"environment  {environment.id}")
    click.echo(f"archive      {output} ({format_bytes(size_bytes)})")
