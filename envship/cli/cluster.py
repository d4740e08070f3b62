"""``envship use``, ``status`` and ``reset``: the calls of the client, for those who have no notebook open."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from envship.cli.packed_as import PackingCommand
from envship.cli.quantities import Timeout

if TYPE_CHECKING:
    from distributed import Client

    from envship.options import PackOptions
    from envship.result import EnvironmentStatus

CONNECT_TIMEOUT_S = 10

Command = TypeVar("Command", bound=Callable[..., Any])

_existing_file = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Connection:
    """Which scheduler to talk to, and with which certificates."""

    scheduler: str | None
    scheduler_file: Path | None
    tls_ca_file: Path | None
    tls_cert: Path | None
    tls_key: Path | None

    @contextmanager
    def open(self) -> Iterator[Client]:
        """A client for as long as the block lasts.

        Raises
        ------
        click.UsageError
            If nothing says where the scheduler is.
        click.ClickException
            If nobody answers there.
        """
        import dask.config
        from distributed import Client
        from distributed.versions import VersionMismatchWarning

        import envship  # noqa: F401  adds the methods to the client

        # Without an address, Client would start a cluster of its own.
        if not (self.scheduler or self.scheduler_file or dask.config.get("scheduler-address", None)):
            raise click.UsageError("which cluster? Give --scheduler ADDRESS or --scheduler-file FILE.")
        # The cluster's present versions do not matter to those who are about to replace or to look at them.
        warnings.filterwarnings("ignore", category=VersionMismatchWarning)
        try:
            client = Client(
                address=self.scheduler,
                scheduler_file=str(self.scheduler_file) if self.scheduler_file else None,
                security=self._security(),
                timeout=CONNECT_TIMEOUT_S,
                set_as_default=False,
                name="envship",
            )
        except (OSError, ValueError) as error:
            where = self.scheduler or self.scheduler_file or dask.config.get("scheduler-address")
            raise click.ClickException(f"no scheduler answers at {where}: {error}") from error
        with client:
            yield client

    def _security(self) -> Any:
        from distributed import Security

        files = {"tls_ca_file": self.tls_ca_file, "tls_client_cert": self.tls_cert, "tls_client_key": self.tls_key}
        given = {name: str(path) for name, path in files.items() if path is not None}
        return Security(**given, require_encryption=True) if given else Security()


def connected(command: Command) -> Command:
    """Give *command* the options that say which cluster; it gets them as one argument, ``connection``."""

    @functools.wraps(command)  # keeps the options that click has hung on the command already
    def wrapper(
        scheduler: str | None,
        scheduler_file: Path | None,
        tls_ca_file: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        **options: Any,
    ) -> Any:
        return command(connection=Connection(scheduler, scheduler_file, tls_ca_file, tls_cert, tls_key), **options)

    options = [
        click.option("-s", "--scheduler", metavar="ADDRESS", help="Such as tcp://10.0.0.1:8786."),
        click.option("--scheduler-file", type=_existing_file, help="The file that the scheduler wrote."),
        click.option("--tls-ca-file", type=_existing_file, help="Certificates to trust (PEM)."),
        click.option("--tls-cert", type=_existing_file, help="Certificate of this client (PEM)."),
        click.option("--tls-key", type=_existing_file, help="Key of that certificate (PEM)."),
    ]
    decorated: Any = wrapper
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


_timeout = click.option(
    "--timeout",
    type=Timeout(),
    help="How long workers may take to come back, e.g. 120s. [envship.timeouts.commit]",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command(cls=PackingCommand)
@click.argument("source", required=False)
@connected
@click.option("--ignore-versions", is_flag=True, help="Go on if Python or Dask differ from those that envship runs in.")
@_timeout
@_as_json
def use(
    source: str | None,
    connection: Connection,
    ignore_versions: bool,
    packed_as: PackOptions,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Move a running cluster into the environment SOURCE.

    SOURCE is a conda environment's name, the path of a prefix, an archive that conda-pack made, a bundle (.envship) or
    an environment id; without it, the environment that envship itself runs in.
    """
    with connection.open() as client:
        result = client.use_environment(source, ignore_versions=ignore_versions, options=packed_as, timeout=timeout)
    _print_result(result, as_json)


@click.command()
@connected
@_timeout
@_as_json
def reset(connection: Connection, timeout: float | None, as_json: bool) -> None:
    """Move a cluster back to the environment that it was started in."""
    with connection.open() as client:
        result = client.reset_environment(timeout=timeout)
    _print_result(result, as_json)


@click.command()
@connected
@_as_json
def status(connection: Connection, as_json: bool) -> None:
    """Show who runs what, and which host holds what."""
    with connection.open() as client:
        found: EnvironmentStatus = client.environment_status()
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    from envship.cli.tables import console, table
    from envship.result import HOST_COLUMNS, PROCESS_COLUMNS

    out = console()
    out.print(found.headline())
    out.print(table(PROCESS_COLUMNS, found.process_rows(), right=("PID",)))
    if found.hosts:
        out.print(table(HOST_COLUMNS, found.host_rows(), right=("free",)))


def _print_result(result: Any, as_json: bool) -> None:
    click.echo(json.dumps(asdict(result)) if as_json else repr(result))
