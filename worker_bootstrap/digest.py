"""Names of content: SHA-256 in lower-case hexadecimal.

See also `worker_bootstrap.layout`, the only place that turns such a name into a path.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NewType

Digest = NewType("Digest", str)
"""SHA-256 of some bytes: 64 lower-case hexadecimal digits."""

EnvironmentId = NewType("EnvironmentId", str)
"""SHA-256 of a canonical manifest: 64 lower-case hexadecimal digits."""

_HEX = re.compile(r"[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    """Whether *text* has the form of a digest (or of an environment id)."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """The digest of *data*. Releases the GIL for anything over 2 KiB."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_of_file(path: Path | str, block_bytes: int = 1 << 20) -> Digest:
    """The digest of the file at *path*, read in blocks of *block_bytes*.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    state = hashlib.sha256()
    buffer = bytearray(block_bytes)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(view[:count])
    return Digest(state.hexdigest())
