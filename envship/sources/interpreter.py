"""What an environment's own interpreter says about itself.

Asked in a subprocess, without site-packages: an environment with a broken ``.pth`` file can be packed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
from typing import NamedTuple

from envship.errors import NotAnEnvironment
from envship.sources.path_files import is_inside
from worker_bootstrap.interpreter import platform_name

_TIMEOUT_S = 60

logger = logging.getLogger("envship.sources")

_QUESTION = r"""
import json, os, platform, sys, sysconfig, importlib
import site
paths = sysconfig.get_paths()
loaded = []
if "libraries" in sys.argv:
    dynload = next((p for p in sys.path if p.endswith("lib-dynload")), None)
    for name in sorted(os.listdir(dynload)) if dynload and os.path.isdir(dynload) else ():
        if name.endswith(".so"):
            try:
                importlib.import_module(name.split(".")[0])
            except Exception:
                pass
    try:
        with open("/proc/self/maps") as maps:
            loaded = sorted({line.split(None, 5)[5].strip() for line in maps if ".so" in line})
    except OSError:
        pass
print("\n" + json.dumps({
    "executable": os.path.realpath(sys.executable),
    "version": platform.python_version(),
    "cache_tag": sys.implementation.cache_tag,
    "implementation": sys.implementation.name,
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "base_prefix": sys.base_prefix,
    "stdlib": paths["stdlib"],
    "platstdlib": paths["platstdlib"],
    "include": paths["include"],
    "platlibdir": getattr(sys, "platlibdir", "lib"),
    "site": [path for path in site.getsitepackages([sys.base_prefix]) if os.path.isdir(path)],
    "user_site": site.getusersitepackages(),
    "scripts": paths["scripts"],
    "system": platform.system(),
    "machine": platform.machine(),
    "loaded": loaded,
}))
"""


class Interpreter(NamedTuple):
    """A CPython: where its parts lie (absolute paths) and what it is.

    *executable* has no symbolic links left. *site* are the folders of packages that are installed into the interpreter
    itself, *user_site* is where its user's would lie. *loaded* are the shared libraries that it and its standard
    library need, if asked for.
    """

    executable: str
    version: str
    cache_tag: str
    implementation: str
    free_threaded: bool
    base_prefix: str
    stdlib: str
    platstdlib: str
    include: str
    platlibdir: str
    site: list[str]
    user_site: str
    scripts: str
    system: str
    machine: str
    loaded: list[str]

    @property
    def short_version(self) -> str:
        """Major and minor version, as in ``lib/python3.11``."""
        return ".".join(self.version.split(".")[:2])

    @property
    def platform(self) -> str:
        """Conda's name of the platform."""
        return platform_name(self.system, self.machine)


def ask(executable: str, prefix: str, *, libraries: bool = False) -> Interpreter:
    """What *executable*, the interpreter of *prefix*, says; with *libraries*, which shared libraries it loads.

    Raises
    ------
    NotAnEnvironment
        If it does not run, or is not CPython 3 with its lock.
    """
    command = [executable, "-I", "-S", "-B", "-c", _QUESTION, *(["libraries"] if libraries else [])]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False, env=clean_environ()
        )
    except BlockingIOError:  # no process can be started, whatever it runs
        raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAnEnvironment(prefix, f"its interpreter {executable} does not run: {error}") from error
    try:
        answer = Interpreter(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError) as error:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise NotAnEnvironment(prefix, f"its interpreter {executable} does not run: {reason[0]}") from error
    if answer.implementation != "cpython" or re.match(r"3\.\d+", answer.version) is None:
        raise NotAnEnvironment(prefix, f"its interpreter is {answer.implementation} {answer.version}, not CPython 3")
    if answer.free_threaded:
        raise NotAnEnvironment(
            prefix, f"its interpreter, CPython {answer.version}, is free-threaded: not supported yet"
        )
    return answer


def check_is_whole(prefix: str, interpreter: Interpreter) -> None:
    """Refuse a prefix whose interpreter has its library, or packages, elsewhere: an archive does not bring them along.

    Raises
    ------
    NotAnEnvironment
        If so.
    """
    parts = (interpreter.stdlib, interpreter.platstdlib, interpreter.executable, *interpreter.site)
    outside = [part for part in parts if not is_inside(os.path.realpath(part), [os.path.realpath(prefix)])]
    if outside:
        raise NotAnEnvironment(prefix, f"its interpreter needs {outside[0]}, which is not in it")


def say_users_packages_stay(prefix: str, interpreter: Interpreter) -> None:
    """Warn where there are packages of the user (``pip install --user``) that the environment sees and leaves here."""
    if "PYTHONNOUSERSITE" in os.environ:
        return
    with contextlib.suppress(OSError):
        if os.listdir(interpreter.user_site):
            message = "with the environment %s go no packages of its user (%s): install into it what is needed of them"
            logger.warning(message, prefix, interpreter.user_site)


def clean_environ() -> dict[str, str]:
    """This process's variables without those that would make another interpreter look in the wrong place."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
