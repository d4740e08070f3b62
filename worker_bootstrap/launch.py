"""How this process was started, as far as it can be started again in its place.

Knows Dask's own command lines (``dask worker``, ``dask scheduler``, ``dask spec`` and their older names). A scheduler
or worker that lives in any other program cannot be re-executed: nobody but its author knows how.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


def _is_dask(program: str) -> bool:
    path = Path(program)
    return path.name == "dask" or (path.name == "__main__.py" and path.parent.name == "dask")
