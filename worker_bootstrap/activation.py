"""The variables of a process that runs from another environment.

What ``conda activate`` would set is set, what belongs to the environment left behind or leads into it is gone, and what
the user set otherwise stays. Activation scripts run in one shell, whose variables before and after are compared. Does
not start the environment's interpreter; marks of envship itself are set by who does (`worker_bootstrap.interpreter`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from worker_bootstrap.errors import StartError
from worker_bootstrap.relocate import PLACEHOLDER

logger = logging.getLogger("envship.activation")

SCRIPTS_TIMEOUT_S = 60.0
UNSET = "***unset***"
"""What ``conda env config vars unset`` writes as a value."""

SYSTEM_PREFIXES = frozenset(("/", "/usr", "/usr/local"))
"""Prefixes of interpreters that belong to the machine: their folders are everybody's, not an environment's."""

PATH_LISTS = (
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "LIBRARY_PATH"),
    *("CPATH", "PKG_CONFIG_PATH", "CMAKE_PREFIX_PATH", "MANPATH", "INFOPATH", "XDG_DATA_DIRS"),
)

# conda's own installation (CONDA_EXE), unless that is the base, and the user's settings for it (CONDA_PKGS_DIRS,
# CONDA_OVERRIDE_CUDA) stay.
_OF_CONDA_ACTIVATE = ("CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_PROMPT_MODIFIER", "CONDA_SHLVL", "CONDA_STACKED_")
_OF_OLD_ENVIRONMENT = frozenset(
    (
        *("VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PYTHONHOME", "PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__"),
        *("PIXI_PROJECT_ROOT", "PIXI_ENVIRONMENT_NAME", "PIXI_PROMPT", "ENVSHIP_ENVIRONMENT", "ENVSHIP_PREFIX"),
    )
)
# Where these lead to is no matter of the environment's, even if that is below it.
_OF_PROCESS = frozenset(("HOME", "TMPDIR", "TMP", "TEMP", "PWD", "OLDPWD"))
_SETTINGS = ("ENVSHIP_", "DASK_")
_OF_SHELL = frozenset(("_", "SHLVL", "PWD", "OLDPWD", "PS1", "BASH_ENV", "ENV", "BASHOPTS", "SHELLOPTS"))

# Whatever scripts print goes to standard error; a script that exits still leaves its variables.
_SHELL_PROGRAM = """\
exec 3>&1 1>&2
trap 'ENVSHIP_ENV 2>/dev/null -0 >&3' EXIT
for envship_script in "$@"; do . "$envship_script"; done
"""


def activated(
    environ: Mapping[str, str],
    prefix: str,
    manifest_environ: Mapping[str, str],
    *,
    base_prefixes: Sequence[str],
) -> dict[str, str]:
    """Variables for a process that runs from *prefix*, given those of a process of the base environment.

    Parameters
    ----------
    environ
        Variables of the process of the base environment. Not changed.
    prefix
        A built environment.
    manifest_environ
        Variables that the environment itself defines (``Manifest.environ``); where they name its prefix, they hold
        `relocate.PLACEHOLDER`.
    base_prefixes
        Where the base environment lies: its ``sys.prefix`` and ``sys.base_prefix``.

    Raises
    ------
    StartError
        If the environment's activation scripts do not end, or break the shell.

    Notes
    -----
    Starts up to three shells, where the environments have scripts; call it in a thread.
    """
    variables = _without_base(dict(environ), _prefixes(base_prefixes))
    variables["PATH"] = os.pathsep.join([str(Path(prefix, "bin")), *_split(variables.get("PATH", os.defpath))])
    if Path(prefix, "conda-meta").is_dir():
        variables["CONDA_PREFIX"] = variables["CONDA_DEFAULT_ENV"] = prefix
        variables["CONDA_PROMPT_MODIFIER"] = f"({prefix}) "
        variables["CONDA_SHLVL"] = "1"
    else:
        variables["VIRTUAL_ENV"] = prefix
    defined = {name: value.replace(PLACEHOLDER, prefix) for name, value in manifest_environ.items()}
    _define(variables, {**_package_variables(prefix), **defined})
    return _after_scripts(variables, prefix, _scripts(prefix, "activate.d"))


def _without_base(variables: dict[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """What stays of *variables* when the environment at *prefixes* is left."""
    active = variables.get("CONDA_PREFIX")
    if active is not None:
        variables = _deactivated(variables, active)
    for name in list(variables):
        if name in _OF_OLD_ENVIRONMENT or name.startswith(_OF_CONDA_ACTIVATE):
            del variables[name]
    # A cluster started from an environment other than the interpreter's own (a stacked one) leaves both.
    left = [*prefixes, *_prefixes([active] if active else [])]
    for name in PATH_LISTS:
        if name in variables:
            kept = [entry for entry in _split(variables[name]) if not _is_inside(entry, left)]
            if kept:
                variables[name] = os.pathsep.join(kept)
            elif name != "PATH":
                del variables[name]
            else:
                variables[name] = os.defpath
    for name in set(variables) - {*PATH_LISTS, *_OF_PROCESS}:
        if not name.startswith(_SETTINGS):
            outside = _outside(name, variables[name], left)
            if outside is None:
                del variables[name]
            else:
                variables[name] = outside
    return variables


def _outside(name: str, value: str, left: Sequence[str]) -> str | None:
    """*value*, a list without its paths inside *left*; None if nothing remains of it, or a text names one of them."""
    entries = re.split("[: ]", value) if name == "LD_PRELOAD" else _split(value)
    if all(entry.startswith("/") or not entry for entry in entries):
        kept = [entry for entry in entries if not _is_inside(entry, left)]
        return value if kept == entries else os.pathsep.join(kept) or None
    # Such as `-L/base/lib -lz`, or `file:///base/x`: what would remain without the path has another meaning.
    names = "|".join(re.escape(prefix) for prefix in left)
    named = names and re.search(rf"(?:\A|[^\w.-]|\B-[A-Za-z])(?:{names})(?![\w-]|\.\w)", value)
    return None if named else value


def _deactivated(variables: dict[str, str], active: str) -> dict[str, str]:
    """What ``conda deactivate`` leaves of *variables*; faults of the old environment do not stop a swap."""
    scripts = _scripts(active, "activate.d")
    defined = {**_package_variables(active), **_state_variables(active)}
    try:
        leaving = _after_scripts(variables, active, list(reversed(_scripts(active, "deactivate.d"))))
        # Scripts that set something and have no counterpart to unset it: what they set in an empty shell is theirs.
        bare = {name: value for name, value in variables.items() if name in ("HOME", "USER", "TMPDIR", "LANG", "PATH")}
        bare["CONDA_PREFIX"] = active
        set_by_scripts = _after_scripts(bare, active, scripts)
        defined.update((name, value) for name, value in set_by_scripts.items() if bare.get(name) != value)
    except StartError as error:
        logger.warning("the deactivation scripts of %s failed: %s", active, error)
        leaving = dict(variables)
    return {
        name: value
        for name, value in leaving.items()
        if name in PATH_LISTS or name not in defined or defined[name] != value
    }


def _define(variables: dict[str, str], definitions: Mapping[str, str]) -> None:
    for name, value in definitions.items():
        if value == UNSET:
            variables.pop(name, None)
        else:
            variables[name] = value


def _package_variables(prefix: str) -> dict[str, str]:
    """Variables that conda packages define in ``etc/conda/env_vars.d/*.json``."""
    found: dict[str, str] = {}
    for path in sorted(Path(prefix, "etc/conda/env_vars.d").glob("*.json")):
        found.update(_texts(_json(path)))
    return found


def _state_variables(prefix: str) -> dict[str, str]:
    """Variables that the user defined with ``conda env config vars``."""
    state = _json(Path(prefix, "conda-meta/state"))
    return _texts(state.get("env_vars") if isinstance(state, dict) else None)


def _json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return None


def _texts(raw: Any) -> dict[str, str]:
    return {name: str(value) for name, value in raw.items()} if isinstance(raw, dict) else {}


def _scripts(prefix: str, kind: str) -> list[str]:
    return sorted(str(path) for path in Path(prefix, "etc/conda", kind).glob("*.sh"))


def _after_scripts(variables: dict[str, str], prefix: str, scripts: Sequence[str]) -> dict[str, str]:
    """*variables* as they are after sourcing *scripts*, one after the other."""
    if not scripts:
        return dict(variables)
    before = {name: value for name, value in variables.items() if name not in ("BASH_ENV", "ENV")}
    shell = shutil.which("bash") or "/bin/sh"
    options = ["--noprofile", "--norc"] if shell.endswith("bash") else []
    program = _SHELL_PROGRAM.replace("ENVSHIP_ENV", shutil.which("env") or "/usr/bin/env")
    # Files, not pipes: a daemon that a script leaves behind keeps a pipe open, and its reader waiting.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        reason = _run([shell, *options, "-c", program, shell, *scripts], before, output, complaints)
        output.seek(0)
        after = _parse(output.read())
        if reason or not after:
            names = ", ".join(Path(script).name for script in scripts)
            complaints.seek(0)
            text = complaints.read().decode("utf-8", "replace")
            raise StartError(Path(prefix).name, prefix, f"its scripts ({names}) {reason or 'broke the shell'}", text)
    changed = {name: value for name, value in after.items() if before.get(name) != value and name not in _OF_SHELL}
    kept = {name: value for name, value in variables.items() if name in after or name in _OF_SHELL}
    return {**kept, **changed}


def _run(command: Sequence[str], variables: Mapping[str, str], output: IO[bytes], complaints: IO[bytes]) -> str:
    """Run *command* to its end; returns what went wrong, if it had to be killed."""
    # A session of its own, so that what it started can be ended with it.
    with subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=complaints, start_new_session=True
    ) as process:
        try:
            process.wait(SCRIPTS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"took more than {SCRIPTS_TIMEOUT_S:.0f} s"
    return ""


def _parse(output: bytes) -> dict[str, str]:
    pairs = (os.fsdecode(item).partition("=") for item in output.split(b"\0") if b"=" in item)
    return {name: value for name, _, value in pairs}


def _prefixes(paths: Iterable[str]) -> list[str]:
    """*paths* as given and without symbolic links, but no prefix that is the machine's own."""
    found = dict.fromkeys(form for path in paths for form in (os.path.normpath(path), os.path.realpath(path)))
    return [path for path in found if path not in SYSTEM_PREFIXES]


def _is_inside(entry: str, prefixes: Sequence[str]) -> bool:
    if not entry or os.path.basename(os.path.normpath(entry)) == "condabin":
        return False  # where the command conda lies, whatever is active
    forms = {os.path.normpath(entry), os.path.realpath(entry)}
    return any(form == prefix or form.startswith(prefix + os.sep) for form in forms for prefix in prefixes)


def _split(value: str) -> list[str]:
    return value.split(os.pathsep)
