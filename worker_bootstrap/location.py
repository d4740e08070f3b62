"""Where the store of this machine lies, and whether it can be trusted.

``ENVSHIP_STORE``, else Dask's setting ``envship.store``, else the user's cache folder, unless that is on a network file
system: then ``/var/tmp/envship-<uid>``. A store that another user could write to, itself or a folder on the way to
it, is refused: environments in it are run.
"""

from __future__ import annotations

import contextlib
import grp
import importlib
import logging
import os
import pwd
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from worker_bootstrap.durable import unusable_error
from worker_bootstrap.errors import SettingInvalid, StoreUntrusted
from worker_bootstrap.layout import Layout
from worker_bootstrap.mounts import NETWORK_FILE_SYSTEMS, file_system_of
from worker_bootstrap.sizes import parse_size
from worker_bootstrap.store import Store

logger = logging.getLogger("envship.store")

STORE_VARIABLE = "ENVSHIP_STORE"
LINK_LIMIT = 40
"""As many symbolic links as the kernel follows in one path."""

_ACL_USER, _ACL_GROUP, _ACL_MASK = 0x02, 0x08, 0x10  # linux/posix_acl.h; entries of 8 bytes follow a version of 4


def open_store(root: str | os.PathLike[str] | None = None, read_only: Iterable[str | Path] | None = None) -> Store:
    """The store of this machine; made if it is not there.

    Parameters
    ----------
    root
        The writable store; None finds it as the module says.
    read_only
        Stores that are looked in first and used in place; None takes Dask's setting ``envship.stores``.

    Raises
    ------
    StoreUntrusted
        If another user could write to one of them, or the writable one is a folder with something else in it.
    SettingInvalid
        If a setting is not a path, or not a list of paths.
    StoreError
        If the writable one cannot be got to, or be made.
    """
    others = _configured_stores() if read_only is None else read_only
    wanted = Path(root) if root is not None else default_root()
    try:
        chosen = trusted(wanted)
        _check_is_store(chosen)
    except OSError as error:
        raise unusable_error(error, wanted) from error
    store = Store(chosen, list(_within_reach(others)))
    # What was not there at the first look may have been made by somebody else before we could.
    trusted(chosen)
    return store


def _within_reach(stores: Iterable[str | Path]) -> Iterator[Path]:
    """Those of the read-only *stores* that can be looked at: a file server that is away takes no other along."""
    for path in stores:
        try:
            yield trusted(Path(path))
        except OSError as error:
            logger.warning("the store %s is left alone: %s: %s", path, error.filename, error.strerror)


def default_root() -> Path:
    """Where the writable store lies when nobody names one."""
    given = os.environ.get(STORE_VARIABLE) or _configured("store")
    if given:
        if not isinstance(given, str):
            raise SettingInvalid("store", given, "a path")
        return _at_home(Path(given)).absolute()
    # A user without a home (of a container, or a service) keeps the "~".
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "envship")
    if cache.is_absolute() and file_system_of(cache) not in NETWORK_FILE_SYSTEMS:
        return cache
    return Path(f"/var/tmp/envship-{os.getuid()}")


def store_limit_bytes() -> int | None:
    """The size over which the writable store is collected (Dask's ``envship.store-limit``), or None for no limit.

    Raises
    ------
    SettingInvalid
        If it is not a size.
    """
    value = _configured("store-limit")
    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise SettingInvalid("store-limit", value, "a size such as '50 GB', or null") from error


def trusted(path: Path) -> Path:
    """*path* without symbolic links, if nobody but its owner, who is us or root, can change what lies there.

    Raises
    ------
    StoreUntrusted
        If it, a folder above it, a symbolic link on the way, or one of the store's own folders belongs to somebody
        else, or others can write to it. Folders with the sticky bit (``/tmp``) may lie above it.
    OSError
        If it cannot be looked at.
    """
    waiting = list(reversed(_at_home(path).absolute().parts[1:]))
    here = "/"
    links = 0
    _check_folder(path, here, os.lstat(here), is_store=False)
    while waiting:
        part = waiting.pop()
        if part == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, part)
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            return Path(step, *reversed(waiting))  # what is not there yet is made by us
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > LINK_LIMIT:
                raise StoreUntrusted(str(path), f"too many symbolic links, the last one is {step}")
            if found.st_uid not in (0, os.getuid()):
                raise StoreUntrusted(str(path), f"the symbolic link {step} belongs to {_user(found.st_uid)}")
            target = Path(os.readlink(step))
            here = "/" if target.is_absolute() else here
            waiting += reversed([part for part in target.parts if part != "/"])
        else:
            _check_folder(path, step, found, is_store=not waiting)
            here = step
    layout = Layout(Path(here))
    for folder in (*layout.folders, *layout.later_folders):
        with contextlib.suppress(FileNotFoundError):
            _check_folder(path, str(folder), os.lstat(folder), is_store=True)
    return Path(here)


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise StoreUntrusted(str(path), "nobody knows the home of that user") from error


def _check_is_store(root: Path) -> None:
    """Refuse a folder that was there before us and is no store: nothing of ours belongs between somebody's files."""
    layout = Layout(root)
    ours = {path.name for path in (*layout.folders, *layout.later_folders, layout.version, layout.host_id)}
    with contextlib.suppress(FileNotFoundError):
        foreign = sorted(set(os.listdir(root)) - ours)
        if foreign and not layout.version.exists():
            raise StoreUntrusted(str(root), f"it is no store, and holds other files, such as {foreign[0]!r}")


def _check_folder(store: Path, path: str, found: os.stat_result, *, is_store: bool) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise StoreUntrusted(str(store), f"{path} is not a folder")
    if found.st_uid not in (0, os.getuid()):
        raise StoreUntrusted(str(store), f"{path} belongs to {_user(found.st_uid)}")
    if found.st_mode & stat.S_ISVTX and not is_store:
        return
    if found.st_mode & stat.S_IWOTH:
        raise StoreUntrusted(str(store), f"everybody can write to {path}")
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        raise StoreUntrusted(str(store), f"the members of group {_group(found.st_gid)} can write to {path}")
    for who in _writers_by_acl(path):
        raise StoreUntrusted(str(store), f"{who} can write to {path} by its access control list")


def _writers_by_acl(path: str) -> Iterator[str]:
    """Users and groups that a POSIX access control list lets write: the mode shows of them only that there are some."""
    try:
        raw = os.getxattr(path, "system.posix_acl_access", follow_symlinks=False)
    except (OSError, AttributeError):  # no list; or a system that has no such thing
        return
    entries = list(struct.iter_unpack("<HHI", raw[4:]))
    mask = next((allowed for tag, allowed, _ in entries if tag == _ACL_MASK), 7)
    for tag, allowed, who in entries:
        if allowed & mask & 2:
            if tag == _ACL_USER and who not in (0, os.getuid()):
                yield _user(who)
            elif tag == _ACL_GROUP and not _is_private(who):
                yield f"group {_group(who)}"


def _is_private(gid: int) -> bool:
    """Whether the group holds nobody but us or root: root's, or the user's own, as most distributions make one."""
    with contextlib.suppress(KeyError):
        own, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
        return (gid == 0 or group.gr_name == own.pw_name) and set(group.gr_mem) <= {own.pw_name, "root"}
    return False


def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"


def _group(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def _configured(name: str) -> Any:
    """A setting of Dask's; None where Dask is not installed."""
    try:
        config = importlib.import_module("dask.config")
    except ImportError:
        return None
    return config.get(f"envship.{name}", None)


def _configured_stores() -> Sequence[str]:
    given = _configured("stores") or []
    if not isinstance(given, (list, tuple)) or not all(isinstance(path, str) for path in given):
        raise SettingInvalid("stores", given, "a list of paths")
    return given
