"""``envship gc``, ``verify`` and ``stage``: what an admin does with a store."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envship.cli.cluster import Connection, connected
from envship.cli.quantities import Duration, Folder, Size
from envship.cli.tables import plain

if TYPE_CHECKING:
    from envship.environment import Environment
    from worker_bootstrap.digest import EnvironmentId
    from worker_bootstrap.evict import Plan
    from worker_bootstrap.manifest import Manifest
    from worker_bootstrap.store import Store

_store = click.option("--store", "store_path", type=Folder(), help="The store to look at, instead of your own.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@_store
@click.option("--limit", type=Size(), help="Evict until the store is no larger, e.g. 50GB. [envship.store-limit]")
@click.option("--unused", type=Duration(), help="Evict what nobody has used for so long, e.g. 30d.")
@click.option("--grace", type=Duration(), default="15m", show_default=True, help="Never evict what was used since.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would go.")
@_as_json
def gc(
    store_path: Path | None, limit: int | None, unused: float | None, grace: float, dry_run: bool, as_json: bool
) -> None:
    """Make room in a store.

    Environments that were not used for the longest time go first, then chunks that no environment needs. What a process
    runs from stays. Without a limit, only chunks that nobody needs and what interrupted builds left go.
    """
    from envship import config
    from worker_bootstrap import evict
    from worker_bootstrap.location import open_store
    from worker_bootstrap.stock import needed_elsewhere, survey

    store = open_store(store_path)
    limit_bytes = config.store_limit_bytes() if limit is None else limit
    now = time.time()
    holdings = survey(store, now)
    planned = evict.plan(
        holdings,
        limit_bytes,
        now=now,
        needed_elsewhere=needed_elsewhere(store),
        grace_s=grace,
        unused_s=unused,
    )
    done = evict.Freed(planned.evicted, planned.kept, len(planned.chunks))
    if not dry_run:
        done = evict.carry_out(store, planned, grace_s=grace)
        after = survey(store).size_bytes
    else:
        after = planned.size_bytes - planned.freed_bytes
        if _adding(store):
            after += sum(holdings.chunks[digest] for digest in planned.chunks)
            done = done._replace(chunks=0)
    _tell_of_gc(store, planned, done, after, dry_run=dry_run, as_json=as_json)


def _tell_of_gc(store: Store, planned: Plan, done: Any, after: int, *, dry_run: bool, as_json: bool) -> None:
    from dask.utils import format_bytes

    told = {
        "store": str(store.layout.root),
        "dry_run": dry_run,
        "evicted": list(done.evicted),
        "kept": {kept.environment_id: kept.reason for kept in done.kept},
        "chunks": done.chunks,
        "kept_chunks": _kept_chunks(store, planned),
        "bytes_before": planned.size_bytes,
        "bytes_after": after,
    }
    if as_json:
        click.echo(json.dumps(told))
        return
    for environment_id in done.evicted:
        click.echo(f"{'would evict' if dry_run else 'evicted'}  {environment_id}")
    for kept in done.kept:
        click.echo(f"kept  {kept.environment_id}: {kept.reason}")
    if told["kept_chunks"]:
        click.echo(f"kept  {told['kept_chunks']}")
    verb = "would free" if dry_run else "freed"
    freed_bytes = max(0, planned.size_bytes - after)
    click.echo(
        f"{verb} {format_bytes(freed_bytes)} ({len(done.evicted)} environments, {done.chunks} chunks): "
        f"{store.layout.root} has {format_bytes(after)}"
    )


def _adding(store: Store) -> list[int]:
    """Processes that add chunks, or find them there, ahead of a manifest: meanwhile all of them stay."""
    from worker_bootstrap.lock import holders

    return holders(store.layout.collect_lock)


def _kept_chunks(store: Store, planned: Plan) -> str | None:
    """Which chunks of no environment stay, and why; None if none do."""
    adding = ", ".join(map(str, _adding(store)))
    if adding and (planned.chunks or planned.new_chunks):
        return f"{len(planned.chunks) + planned.new_chunks} chunks: process {adding} packs, or loads a bundle"
    return f"{planned.new_chunks} chunks: they are so new that their manifest may come" if planned.new_chunks else None


@click.command()
@click.argument("sources", metavar="[ID]...", nargs=-1)
@_store
@click.option("--repair", is_flag=True, help="Mend built environments from their chunks, in place.")
@_as_json
def verify(sources: tuple[str, ...], store_path: Path | None, repair: bool, as_json: bool) -> None:
    """Compare every chunk and every built file with its hash.

    ID is an environment that the store holds (all of them by default, and chunks of none), or the first eight digits of
    one. Damaged chunks are dropped, and fetched again when they are needed. Ends with 1 if something is wrong that was
    not repaired.
    """
    from worker_bootstrap.location import open_store
    from worker_bootstrap.verify import other_chunks

    store = open_store(store_path)
    ids = [_environment(source, store).id for source in sources] or store.environments()
    results = [_verified(store, environment_id, repair) for environment_id in ids]
    others, problems = other_chunks(store) if not sources else (0, [])
    if as_json:
        told = {"store": str(store.layout.root), "environments": results}
        click.echo(json.dumps({**told, "other_chunks": others, "problems": problems}))
    else:
        for result in results:
            _print_verified(result)
        if others:
            click.echo(f"{'DAMAGED' if problems else 'sound'}  {others} chunks of no environment")
        for line in problems:
            click.echo(plain(f"  {line}"))
    if problems or not all(result["sound"] for result in results):
        raise SystemExit(1)


def _environment(source: str, store: Store) -> Environment:
    from envship.environment import resolve
    from envship.errors import SourceNotFound

    if not all(letter in "0123456789abcdef" for letter in source) or len(source) < 8:
        raise SourceNotFound(source, [f"{store.layout.root} (an environment id, or its first eight digits, is needed)"])
    return resolve(source, store=store)


def _verified(store: Store, environment_id: Any, repair: bool) -> dict[str, Any]:
    """What is wrong with an environment; looked at again as long as somebody evicts, or builds, it meanwhile."""
    from worker_bootstrap import verify as verification
    from worker_bootstrap.errors import EnvshipError

    told = {"id": environment_id, "prefix": None, "absent_chunks": 0, "problems": [], "mended": [], "sound": True}
    mended: list[str] = []
    while True:
        before = verification.traces(store, environment_id)
        try:
            manifest = verification.manifest_of(store, environment_id)
        except EnvshipError as error:
            return {**told, "problems": [str(error)], "sound": False, "evicted": False}
        if manifest is None:
            return {**told, "evicted": True}
        # One that was built before the machine was last started has not been looked at since.
        prefix = store.built(environment_id) or store.standing(environment_id)
        absent, problems = _looked_at(store, manifest, prefix, mended if repair else None)
        if not problems or verification.traces(store, environment_id) == before:
            told.update(prefix=None if prefix is None else str(prefix), absent_chunks=absent)
            return {**told, "problems": problems, "mended": mended, "sound": not problems, "evicted": False}


def _looked_at(
    store: Store, manifest: Manifest, prefix: Path | None, mended: list[str] | None
) -> tuple[int, list[str]]:
    """How many chunks are not here, and what is wrong; with *mended*, what is not any more is added to that."""
    from worker_bootstrap import verify as verification
    from worker_bootstrap.errors import EnvshipError

    problems: list[str] = []
    absent = set(store.missing(manifest.chunks))
    try:
        problems += verification.damaged_chunks(store, manifest, absent)
        if prefix is not None and mended is not None and prefix == store.layout.prefix(manifest.id):
            _mend(store, manifest.id, mended, problems)
        elif prefix is not None:
            problems += map(str, verification.damaged_files(store, manifest.id, prefix))
    except EnvshipError as error:
        problems.append(str(error))
    return len(absent), problems


def _mend(store: Store, environment_id: EnvironmentId, mended: list[str], problems: list[str]) -> None:
    from worker_bootstrap import ready_mark
    from worker_bootstrap.lock import Lock
    from worker_bootstrap.repair import mend

    layout = store.layout
    with Lock(layout.lock(environment_id)):
        if store.standing(environment_id) is None:
            problems.append(f"{layout.prefix(environment_id)} has gone")
            return
        outcome = mend(store, environment_id, remove_added=True, may_run=os.geteuid() != 0)
        mended += map(str, outcome.mended)
        problems += map(str, outcome.left)
        problems += [] if outcome.missing is None else [str(outcome.missing)]
        mark, prefix = layout.ready(environment_id), layout.prefix(environment_id)
        if outcome.is_whole and not ready_mark.is_valid(mark, prefix):
            ready_mark.write(mark, prefix, layout.tmp, durable=False)


def _print_verified(result: dict[str, Any]) -> None:
    if result["evicted"]:
        click.echo(f"evicted  {result['id']}  while it was looked at")
        return
    where = f"built in {result['prefix']}" if result["prefix"] else "not built"
    click.echo(f"{'sound' if result['sound'] else 'DAMAGED'}  {result['id']}  {where}")
    if result["absent_chunks"]:
        click.echo(f"  {result['absent_chunks']} of its chunks are not here; they are fetched when they are needed")
    for line in result["mended"]:
        click.echo(plain(f"  mended: {line}"))
    for line in result["problems"]:
        click.echo(plain(f"  {line}"))


@click.command()
@click.argument("source")
@click.option("--store", "store_path", type=Folder(), help="Build it in this store, for all users of this machine.")
@click.option("--link-mode", type=click.Choice(["auto", "reflink", "hardlink", "copy"]), help="[envship.link-mode]")
@connected
@_as_json
def stage(source: str, store_path: Path | None, link_mode: str | None, connection: Connection, as_json: bool) -> None:
    """Bring the environment SOURCE to where it will be needed, without moving anything.

    With --store, into a store on this machine: chunks, manifest and the built prefix, all on disk when this returns,
    readable for everybody. With --scheduler, to every machine of a running cluster. SOURCE is a bundle (.envship), an
    environment id, a conda environment's name, the path of a prefix or an archive that conda-pack made.
    """
    if (store_path is None) == (connection.scheduler is None and connection.scheduler_file is None):
        raise click.UsageError("stage where? Give either --store PATH or --scheduler ADDRESS.")
    if store_path is None:
        from dataclasses import asdict

        with connection.open() as client:
            result = client.stage_environment(source)
        click.echo(json.dumps(asdict(result)) if as_json else repr(result))
        return
    told = _stage_here(source, store_path, link_mode)
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(f"environment  {told['id']}\nbuilt        {told['prefix']}")


def _stage_here(source: str, store_path: Path, link_mode: str | None) -> dict[str, Any]:
    from envship import config
    from envship.environment import resolve
    from worker_bootstrap.location import open_store
    from worker_bootstrap.materialise import materialise
    from worker_bootstrap.staging import open_to_everybody

    store = open_store(store_path, read_only=[])
    environment = resolve(source, store=store)
    mode = link_mode or config.link_mode()
    # Root builds for others here, and starts nothing that came with the environment.
    prefix = materialise(store, environment.id, link_mode=mode, durable=True, may_run=os.geteuid() != 0)
    open_to_everybody(store, environment.id)
    return {"id": environment.id, "prefix": str(prefix), "store": str(store.layout.root)}
