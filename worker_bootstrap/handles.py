"""Handles of folders, to look names up from there (``dir_fd``) and not along the whole path, for each of thousands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def opened_folder(path: str | os.PathLike[str]) -> Iterator[int]:
    """A handle of the folder *path*.

    Raises
    ------
    OSError
        If it is no folder, or cannot be opened.
    """
    handle = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)
