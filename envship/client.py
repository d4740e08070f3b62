"""The methods that `import envship` adds to `distributed.Client`.

Packs here, uploads what the cluster lacks, asks the coordinator for the swap and follows it, also across the
scheduler's replacement. What happens on the cluster is decided in `worker_bootstrap.coordinator`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import dask
import distributed
from distributed import Client

from envship import config
from envship.environment import versions_of
from envship.journey import Journey
from envship.options import NO_OPTIONS, PackOptions
from envship.progress import open_display
from envship.result import EnvironmentStatus, StagedResult, SwapResult
from envship.status import status_of
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import IncompatibleEnvironment, NotSwappable
from worker_bootstrap.interpreter import PROCESS_TOKEN
from worker_bootstrap.manifest import Manifest

Source = Any
"""What to move into: None, a name, a path, an id, an `envship.Environment`; see `use_environment`."""


def use_environment(
    client: Client,
    source: Source = None,
    *,
    scheduler: bool | None = None,
    ignore_versions: bool = False,
    options: PackOptions = NO_OPTIONS,
    timeout: str | float | None = None,
    progress: bool | None = None,
) -> SwapResult:
    """Move the cluster into an environment.

    Parameters
    ----------
    source
        None for the environment that this process runs in; a conda environment's name; a prefix; an archive that
        conda-pack made; a bundle (``.envship``, a path or a URL); an environment id that the cluster or the local store
        holds; an `envship.Environment`.
    scheduler
        Whether the scheduler moves as well. None: it does if it is a process of its own. Futures do not survive that.
    ignore_versions
        Go on although Python, dask or distributed differ from this client's.
    options
        How the source is packed, if it is: which files stay away, which faults to put up with.
    timeout
        For the commit: how long the workers may take to come back (default: ``envship.timeouts.commit``).
    progress
        Show what happens. None: in notebooks and on terminals.

    Returns
    -------
    SwapResult

    Raises
    ------
    PackError
        The source does not exist, or cannot be packed.
    BundleInvalid
        The bundle is damaged.
    EnvironmentMissing
        Nobody holds the environment with this id, or not in full.
    IncompatibleEnvironment
        Versions or platform do not fit.
    NotSwappable
        Something in the cluster cannot be moved. Nothing was touched.
    TransferError, ChunkMissing, ChunkInvalid
        The cluster does not take what is uploaded, or this machine's store has lost or damaged it. Nothing was touched.
    PrepareFailed
        A host could not get ready. Nothing was touched; tasks went on.
    CommitFailed
        Workers did not come up in the environment. The cluster was moved back.
    SchedulerLost
        The scheduler ended, or cannot be reached any more.
    SettingInvalid
        Dask's configuration holds a setting of ours that means nothing.
    ValueError
        *timeout* is no duration over 0.

    Notes
    -----
    Idempotent: a cluster that runs there already is left alone, and no byte moves. Swaps of several clients take turns.
    """
    result: SwapResult = _sync(client, _use, source, scheduler, ignore_versions, options, timeout, progress)
    return result


def stage_environment(
    client: Client,
    source: Source = None,
    *,
    options: PackOptions = NO_OPTIONS,
    build: bool = True,
    progress: bool | None = None,
) -> StagedResult:
    """Bring an environment to every host of the cluster and build it there, without moving anybody.

    Parameters and errors as for `use_environment`. With ``build=False``, hosts only fetch the chunks that they lack.
    """
    result: StagedResult = _sync(client, _stage, source, options, build, progress)
    return result


def environment_status(client: Client) -> EnvironmentStatus:
    """Who runs in which environment, and which host holds what."""
    result: EnvironmentStatus = _sync(client, _status)
    return result


def reset_environment(
    client: Client, *, timeout: str | float | None = None, progress: bool | None = None
) -> SwapResult:
    """Move the cluster back into the base environment, the one it was started in. Raises as `use_environment`."""
    result: SwapResult = _sync(client, _reset, timeout, progress)
    return result


def install() -> None:
    """Add the methods to `distributed.Client`. Idempotent."""
    for method in (use_environment, stage_environment, environment_status, reset_environment):
        setattr(Client, method.__name__, method)


def _sync(client: Client, work: Any, *arguments: Any) -> Any:
    """Run *work* on the client's loop: a value for synchronous clients, an awaitable for asynchronous ones."""
    return client.sync(work, client, *arguments)


async def _use(
    client: Client,
    source: Source,
    scheduler: bool | None,
    ignore_versions: bool,
    options: PackOptions,
    timeout: str | float | None,
    show: bool | None,
) -> SwapResult:
    # First of all: nobody shall pack for a minute to be told that the cluster cannot move.
    terms = _terms(scheduler, timeout)
    with open_display(show) as display:
        journey = Journey(client, display)
        _check_processes(client)
        await journey.connect()
        async with journey.expecting(source, options, config.timeout_s("start")):
            manifest, environment = await journey.find(source, options)
            if not ignore_versions:
                _check_fit(manifest)
        return await journey.with_chunks(manifest.id, environment, lambda: _move(journey, manifest.id, terms))


async def _reset(client: Client, timeout: str | float | None, show: bool | None) -> SwapResult:
    terms = _terms(None, timeout)
    with open_display(show) as display:
        journey = Journey(client, display)
        await journey.connect()
        journey.lap("check")
        return await _move(journey, None, terms)


async def _stage(client: Client, source: Source, options: PackOptions, build: bool, show: bool | None) -> StagedResult:
    terms = {**_terms(None, None), "chunks_only": not build}
    with open_display(show) as display:
        journey = Journey(client, display)
        await journey.connect()
        manifest, environment = await journey.find(source, options)

        async def stage() -> Mapping[str, Any]:
            swap_id = await journey.ask("envship_stage", environment_id=manifest.id, options=terms)
            return await journey.follow(swap_id)

        status = await journey.with_chunks(manifest.id, environment, stage)
        return StagedResult(
            environment_id=manifest.id,
            hosts=len(status["hosts"]),
            uploaded_bytes=journey.uploaded_bytes,
            uploaded_chunks=journey.uploaded_chunks,
            seconds=journey.seconds,
            total_s=journey.total_s,
        )


async def _move(
    journey: Journey,
    environment_id: EnvironmentId | None,
    terms: Mapping[str, Any],
) -> SwapResult:
    futures = len(journey.client.futures)
    swap_id = await journey.ask("envship_use", environment_id=environment_id, options=terms)
    status = await journey.follow(swap_id)
    return SwapResult(
        environment_id=status["environment_id"],
        previous_id=status["previous_id"],
        scheduler_swapped=status["scheduler_moves"],
        hosts=len(status["hosts"]),
        workers=status["workers"],
        uploaded_bytes=journey.uploaded_bytes,
        uploaded_chunks=journey.uploaded_chunks,
        seconds=journey.seconds,
        total_s=journey.total_s,
        downtime_s=status["downtime_s"],
        changed=status["moves"],
        lost_futures=futures if status["scheduler_moves"] else 0,
    )


async def _status(client: Client) -> EnvironmentStatus:
    with open_display(False) as display:
        journey = Journey(client, display)
        await journey.connect()
        return status_of(await journey.ask("envship_status"))


def _terms(scheduler: bool | None, timeout: str | float | None) -> dict[str, Any]:
    """What the coordinator is told besides the environment; all that the user can get wrong is looked at here."""
    try:
        commit = config.timeout_s("commit") if timeout is None else config.duration_s(timeout)
    except ValueError as error:
        raise ValueError(f"timeout={timeout!r}: expected {error}") from error
    return {
        "scheduler": scheduler,
        "client_token": PROCESS_TOKEN,
        "prepare_timeout_s": config.timeout_s("prepare"),
        "start_timeout_s": config.timeout_s("start"),
        "commit_timeout_s": commit,
        "keep_warm": config.keep_warm(),
        "link_mode": config.link_mode(),
        "rate_limit": config.rate_limit(),
    }


def _check_processes(client: Client) -> None:
    """Refuse a cluster whose scheduler, and so all of it, lives in threads of this very process."""
    address = client.scheduler.address
    if address.startswith("inproc://"):
        reason = "its workers are threads of this process, as with LocalCluster(processes=False)"
        raise NotSwappable(f"the cluster of {address}", reason, "Start it with processes=True.")


def _check_fit(manifest: Manifest) -> None:
    """Refuse what would break later: functions pickled by another Python kill workers, and Dask retries that."""
    mine = {"python": platform.python_version(), "dask": dask.__version__, "distributed": distributed.__version__}
    mismatches = []
    theirs = versions_of(manifest)
    for name, expected in mine.items():
        actual = theirs.get(name)
        if actual is None or _compared(name, actual) != _compared(name, expected):
            mismatches.append((name, expected, actual or "not installed"))
    if mismatches:
        raise IncompatibleEnvironment(
            manifest.id,
            mismatches,
            "Install the client's versions there, run the client from it, or pass ignore_versions=True.",
        )


def _compared(name: str, version: str) -> str:
    """What must be equal of a version: major and minor of Python, everything of Dask."""
    return version.rpartition(".")[0] if name == "python" else version
