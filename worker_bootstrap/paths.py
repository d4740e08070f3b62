"""Paths and targets of links as listings may name them: inside the prefix, and such as a file can have.

Each by itself; what several of them do together is `worker_bootstrap.blueprint`'s question. Pure: no I/O.
"""

from __future__ import annotations

import re

from worker_bootstrap.errors import ManifestInvalid

PATH_LIMIT = 4095
"""Characters of a path or of the target of a link: Linux has no longer ones (``PATH_MAX``)."""

_ODD_PARTS = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)|\0")
"""An absolute or empty path, a part that is empty, ``.`` or ``..``, a NUL."""


def check_path(path: object) -> str:
    """*path* itself, if it names a place inside the prefix.

    Raises
    ------
    ManifestInvalid
        For an absolute, empty or overlong path, ``.``, ``..``, a doubled slash, a NUL, or what is no name of a file.
    """
    if not isinstance(path, str) or not path or len(path) > PATH_LIMIT:
        raise ManifestInvalid(f"not a path: {shown(path)}", "listing")
    # What few paths have is looked for first: a large environment has 75,000, and the expression takes its time.
    is_plain = not ("/." in path or "//" in path or "\0" in path or path[0] in "./" or path[-1] == "/")
    if not is_plain and _ODD_PARTS.search(path):
        raise ManifestInvalid(f"the path leaves the prefix or is not normal: {shown(path)}", "listing")
    if not (path.isascii() or is_file_name(path)):
        raise ManifestInvalid(f"no file can have this name, or has it under another one: {shown(path)}", "listing")
    return path


def check_link(path: str, target: object) -> str:
    """*target* itself, if the link at *path* stays inside the prefix.

    Raises
    ------
    ManifestInvalid
        For an absolute, empty or overlong target, a NUL, what is no name of a file, or more ``..`` than the link is
        deep.
    """
    if not isinstance(target, str) or not target or "\0" in target or target[0] == "/" or len(target) > PATH_LIMIT:
        raise ManifestInvalid(f"the link {path!r} has no relative target: {shown(target)}", "listing")
    if not (target.isascii() or is_file_name(target)):
        raise ManifestInvalid(f"the link {path!r} leads to what no file can be named: {shown(target)}", "listing")
    depth = path.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            raise ManifestInvalid(f"the link {path!r} leaves the prefix: {target!r}", "listing")
    return target


def is_file_name(text: str) -> bool:
    """Whether *text* is how Python spells some name of a file: others have no bytes, or share those of another text."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    except UnicodeError:
        return False


def shown(value: object) -> str:
    """*value* for a message, not longer than people read."""
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 300 else text[:300] + "…"
