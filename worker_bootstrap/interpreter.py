"""What a Dask process is started with: an interpreter, and the variables of its process.

The *base environment* is the one that the cluster was started in; it has no environment id. A process that we
re-executed remembers its base in ``ENVSHIP_BASE``, so that it can go back there.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from worker_bootstrap.codec import CODECS_VARIABLE, accepted
from worker_bootstrap.digest import EnvironmentId, is_digest

ENVIRONMENT_VARIABLE = "ENVSHIP_ENVIRONMENT"
PREFIX_VARIABLE = "ENVSHIP_PREFIX"
BASE_VARIABLE = "ENVSHIP_BASE"
FAILED_VARIABLE = "ENVSHIP_FAILED"
"""Holds the id of an environment that this process was sent to, did not start in, and came back from."""
PROCESS_TOKEN = uuid.uuid4().hex
"""Names this process: two ids that are equal are the same process, which PIDs in containers are not."""


class Interpreter(NamedTuple):
    """An interpreter and its variables; *environment_id* is None for the base environment."""

    environment_id: EnvironmentId | None
    prefix: str
    python: str
    environ: Mapping[str, str]


def own_environment_id() -> EnvironmentId | None:
    """Id of the environment that this process runs in, or None for a base environment.

    Inherited variables do not count: the interpreter must lie in the prefix that they name.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    prefix = os.environ.get(PREFIX_VARIABLE)
    if not is_digest(name) or not prefix or os.path.realpath(prefix) != os.path.realpath(sys.prefix):
        return None
    return EnvironmentId(str(name))


def base_interpreter() -> Interpreter:
    """The interpreter and the variables that this process was first started with."""
    packed = os.environ.get(BASE_VARIABLE)
    if packed is None or own_environment_id() is None:
        return Interpreter(None, sys.prefix, sys.executable, _without_marks(os.environ))
    raw = json.loads(zlib.decompress(base64.b85decode(packed)))
    return Interpreter(None, raw["prefix"], raw["python"], raw["environ"])


def with_base(interpreter: Interpreter, base: Interpreter) -> Interpreter:
    """*interpreter* for an ``exec`` that can be undone: its variables hold *base*, and what that can decode."""
    if interpreter.environment_id is None:
        return interpreter
    raw = json.dumps({"prefix": base.prefix, "python": base.python, "environ": dict(base.environ)})
    packed = base64.b85encode(zlib.compress(raw.encode())).decode()
    return interpreter._replace(
        environ={**interpreter.environ, BASE_VARIABLE: packed, CODECS_VARIABLE: ",".join(accepted())}
    )


def platform_name(system: str, machine: str) -> str:
    """Conda's name of a platform, given what `platform.system` and `platform.machine` say there."""
    if system == "Darwin":
        return "osx-arm64" if machine == "arm64" else "osx-64"
    return f"{system.lower()}-{ {'x86_64': '64', 'AMD64': '64', 'i686': '32'}.get(machine, machine) }"


def python_of(prefix: str | Path) -> str:
    """Path of the interpreter in *prefix*."""
    return str(Path(prefix) / "bin" / "python")


def _without_marks(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in _MARKS}


_MARKS = frozenset((ENVIRONMENT_VARIABLE, PREFIX_VARIABLE, BASE_VARIABLE, FAILED_VARIABLE, CODECS_VARIABLE))
