"""The command line: ``envship pack | show | diff | export | use | status | reset | stage | verify | gc | demo``.

Only here, in `envship.progress` and in a notebook does envship print. Commands import what they need when they run, so
that ``envship --help`` stays quick. Errors of ours, and of the system, end as a message and exit code 1, Ctrl-C as 130.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import click

from envship._version import __version__
from envship.cli.cluster import reset, status, use
from envship.cli.demo import demo
from envship.cli.inspecting import diff, show
from envship.cli.packing import export, pack
from envship.cli.storing import gc, stage, verify
from envship.cli.tables import plain
from worker_bootstrap.errors import EnvshipError

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended, as shells have it (128 + SIGINT)."""


class Commands(click.Group):
    """A group whose commands end with a message, never with a traceback, for errors that are the user's to mend."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EnvshipError as error:
            raise click.ClickException(plain(str(error))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has seen enough, which Click knows
                raise
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
            raise click.ClickException(plain(f"{where}{error.strerror or error}")) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.stdout.flush()
            # Whatever had to be cleared up has been. A client of Dask's that was interrupted while it connected would
            # be waited for at the end of the interpreter, for 20 seconds, and then complain.
            os._exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="envship")
def main() -> None:
    """Move a running Dask cluster into your software environment."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text that can be printed


for command in (pack, show, diff, export, use, status, reset, stage, verify, gc, demo):
    main.add_command(command)
