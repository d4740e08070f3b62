"""Whether the Dask of an environment understands what its processes are told; found out without running any of it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import dask

from worker_bootstrap.launch import Launch


def check_command(launch: Launch) -> None:
    """See, without running it, that this interpreter's Dask understands a command line and finds what it preloads.

    Raises
    ------
    ValueError
        If it does not know an option; click's own error if one lacks its value.
    ModuleNotFoundError
        If something that is to be preloaded is not there.
    """
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


def check_keywords(worker_class: type, kwargs: Mapping[str, Any]) -> None:
    """See that this Dask's worker knows its options; a class of somebody else may take whatever it likes.

    Raises
    ------
    TypeError
        If it does not.
    """
    if not worker_class.__module__.startswith("distributed."):
        return
    known = {
        name
        for base in worker_class.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    }
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(f"the {worker_class.__name__} of this environment's Dask does not know {', '.join(unknown)}")


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
