"""Processes and threads that the system does not let us start: one error, wherever that shows."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from worker_bootstrap.errors import ProcessLimitReached


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Raise `ProcessLimitReached` where a process or a thread cannot be started in this block."""
    try:
        yield
    except BlockingIOError as error:
        raise ProcessLimitReached(socket.gethostname(), error.strerror) from error
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise ProcessLimitReached(socket.gethostname(), str(error)) from error
