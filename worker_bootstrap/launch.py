"""How this process was started, as far as it can be started again in its place.

Knows Dask's own command lines (``dask worker``, ``dask scheduler``, ``dask spec`` and their older names). A scheduler
or worker that lives in any other program cannot be re-executed: nobody but its author knows how.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_MODULES = {
    "worker": "distributed.cli.dask_worker",
    "scheduler": "distributed.cli.dask_scheduler",
    "spec": "distributed.cli.dask_spec",
}


class Launch(NamedTuple):
    """A Dask command line.

    *kind* is ``worker``, ``scheduler`` or ``spec``; *program* is the original ``sys.argv[0]``.
    """

    kind: str
    program: str
    arguments: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module whose click command ``main`` takes `arguments`."""
        return _MODULES[self.kind]

    @property
    def argv(self) -> list[str]:
        """What ``sys.argv`` was."""
        middle = [self.kind] if _is_dask(self.program) else []
        return [self.program, *middle, *self.arguments]


def recognise(argv: Sequence[str]) -> Launch | None:
    """The launch that *argv* (``sys.argv``) stands for, or None if it is no command line of Dask's."""
    if not argv:
        return None
    program, arguments = argv[0], tuple(argv[1:])
    if _is_dask(program):
        if arguments and arguments[0] in _MODULES:
            return Launch(arguments[0], program, arguments[1:])
        return None
    stem = Path(program).name
    if stem.endswith(".py"):
        stem = stem[:-3]
    for kind in _MODULES:
        if stem in (f"dask-{kind}", f"dask_{kind}"):
            return Launch(kind, program, arguments)
    return None


def own() -> Launch | None:
    """The launch of this very process."""
    return recognise(sys.argv)


def check(launch: Launch) -> None:
    """See, without running it, that this interpreter's Dask understands a command line and finds what it preloads.

    Raises
    ------
    ValueError
        If it does not know an option; click's own error if one lacks its value.
    ModuleNotFoundError
        If something that is to be preloaded is not there.
    """
    import click
    import dask

    command = importlib.import_module(launch.module).main
    # Only parsed: to convert the values would import, and so run, what is to be preloaded.
    parser = command.make_parser(click.Context(command, **command.context_settings))
    given, _, _ = parser.parse_args(list(launch.arguments))
    # Dask takes options that it does not know for those of what it preloads.
    unknown = given.get("preload_argv")
    if isinstance(unknown, (list, tuple)) and unknown and not given.get("preload"):
        raise ValueError(f"`dask {launch.kind}` of Dask {dask.__version__} does not know {' '.join(unknown)}")
    check_preloads(given.get("preload") or ())
    check_preloads(dask.config.get(f"distributed.{launch.kind}.preload", None) or ())


def check_preloads(names: str | Iterable[str]) -> None:
    """See that what is to be preloaded is there.

    Raises
    ------
    ModuleNotFoundError
        If one is not.
    """
    for name in [names] if isinstance(names, str) else names:
        if not _can_preload(name):
            raise ModuleNotFoundError(f"{name!r} is to be preloaded, and this environment lacks it")


def _can_preload(name: str) -> bool:
    if "\n" in name or name.startswith(("http://", "https://")):
        return True
    if name.endswith(".py"):
        return Path(name).exists()
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _is_dask(program: str) -> bool:
    path = Path(program)
    return path.name == "dask" or (path.name == "__main__.py" and path.parent.name == "dask")
