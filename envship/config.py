"""Settings of envship, in Dask's configuration under ``envship:``.

Importing this module loads the defaults of ``envship.yaml`` beneath whatever the user has set. Each setting has one
accessor here, which reads it when called, checks it, and returns it in one unit: nothing else of `envship` reads the
configuration. Machines of the cluster have their own; what they need of the client's is sent to them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Literal, cast, get_args

import dask.config
import yaml
from dask.utils import parse_timedelta

from worker_bootstrap import location
from worker_bootstrap.courtesy import own_rate
from worker_bootstrap.errors import SettingInvalid

LinkMode = Literal["auto", "reflink", "hardlink", "copy"]
Timeout = Literal["prepare", "start", "commit", "upload"]


def load_defaults() -> None:
    """Put the defaults of ``envship.yaml`` beneath the present configuration. Idempotent."""
    with open(Path(__file__).with_name("envship.yaml"), encoding="utf-8") as file:
        dask.config.update_defaults(yaml.safe_load(file))


def store() -> Path | None:
    """The writable store, or None where it is left to ``ENVSHIP_STORE`` and the cache folder.

    Raises
    ------
    SettingInvalid
        If ``envship.store`` is not a path.
    """
    value = _get("store")
    return None if value is None else _path("store", value)


def stores() -> tuple[Path, ...]:
    """The read-only stores, in the order in which they are looked in.

    Raises
    ------
    SettingInvalid
        If ``envship.stores`` is not a list of paths.
    """
    value = _get("stores")
    if not isinstance(value, (list, tuple)):
        raise SettingInvalid("stores", value, "a list of paths")
    return tuple(_path("stores", entry) for entry in value)


def share_store() -> bool | None:
    """Whether hosts that see this machine's store may read it there: yes, no, or (None) if its file system is shared.

    Raises
    ------
    SettingInvalid
        If ``envship.share-store`` is neither ``auto`` nor a truth value.
    """
    value = _get("share-store")
    if value == "auto":
        return None
    if not isinstance(value, bool):
        raise SettingInvalid("share-store", value, "auto, true or false")
    return value


def store_limit_bytes() -> int | None:
    """The size over which the writable store is collected, or None for no limit.

    Raises
    ------
    SettingInvalid
        If ``envship.store-limit`` is not a size.
    """
    return location.store_limit_bytes()


def link_mode() -> LinkMode:
    """How files of an environment already built are reused: ``auto``, ``reflink``, ``hardlink`` or ``copy``.

    Raises
    ------
    SettingInvalid
        If ``envship.link-mode`` is none of these.
    """
    value = _get("link-mode")
    if value not in get_args(LinkMode):
        raise SettingInvalid("link-mode", value, "one of " + ", ".join(get_args(LinkMode)))
    return cast(LinkMode, value)


def keep_warm() -> int:
    """How many environments left behind keep a parked interpreter: one for each worker that has a nanny.

    Raises
    ------
    SettingInvalid
        If ``envship.keep-warm`` is not a whole number of at least 0.

    Notes
    -----
    Resident memory of one, and what of it no other process shares (Linux, Python 3.11): 50 and 38 MB where the
    environment holds nothing but ``distributed``, 87 and 80 MB with numpy, pandas and bokeh.
    """
    value = _get("keep-warm")
    if type(value) is not int or value < 0:
        raise SettingInvalid("keep-warm", value, "a whole number of at least 0")
    return value


def timeout_s(phase: Timeout) -> float:
    """The seconds that *phase* may take.

    Raises
    ------
    SettingInvalid
        If ``envship.timeouts.<phase>`` is not a duration over 0.
    """
    name = f"timeouts.{phase}"
    value = _get(name)
    try:
        return duration_s(value)
    except ValueError as error:
        raise SettingInvalid(name, value, str(error)) from error


def duration_s(value: Any) -> float:
    """The seconds of a duration that somebody waits for: a number of them, or what Dask takes, such as '60s'.

    Raises
    ------
    ValueError
        If it is none, or not over 0; with what was expected.
    """
    try:
        seconds = float(parse_timedelta(value))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError("a duration such as '60s'") from error
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError("a duration over 0" if not seconds > 0 else "a duration that ends")
    return seconds


def rate_limit() -> float | None:
    """Bytes per second that chunks may take of a host's network, in each direction, or None for no limit.

    Raises
    ------
    SettingInvalid
        If ``envship.rate-limit`` is not a size over 0.
    """
    return own_rate()


def topology() -> dict[str, list[str]]:
    """Places, and the patterns of names that say who stands there; empty if machines speak for themselves.

    Raises
    ------
    SettingInvalid
        If ``envship.topology`` is neither a place nor a mapping of places to patterns.
    """
    value = _get("topology")
    if value is None or isinstance(value, str):
        return {}
    rule = "a place such as 'site/rack', a mapping of places to lists of patterns, or null"
    if not isinstance(value, dict):
        raise SettingInvalid("topology", value, rule)
    for place, patterns in value.items():
        texts = isinstance(patterns, (list, tuple)) and all(isinstance(pattern, str) for pattern in patterns)
        if not isinstance(place, str) or not texts:
            raise SettingInvalid("topology", value, rule)
    return {place: list(patterns) for place, patterns in value.items()}


def progress() -> bool | None:
    """Whether to show progress: always, never, or (None) only in notebooks and on terminals.

    Raises
    ------
    SettingInvalid
        If ``envship.progress`` is neither ``auto`` nor a truth value.
    """
    value = _get("progress")
    if value == "auto":
        return None
    if not isinstance(value, bool):
        raise SettingInvalid("progress", value, "auto, true or false")
    return value


def _get(name: str) -> Any:
    return dask.config.get(f"envship.{name}", default=None)


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise SettingInvalid(name, value, "a path")
    return Path(os.path.expanduser(value))


load_defaults()
