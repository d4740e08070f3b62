"""Importing Dask, and this package, as fast as it can be: a swap lasts about as long as that takes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

from worker_bootstrap import compiled

HEADER_BYTES = 16
"""What stands in a ``.pyc`` before the code. Source: PEP 552."""


@contextlib.contextmanager
def quickly(code: str) -> Iterator[None]:
    """Until the end of the block, no collection of garbage: there is none, and looking takes an eighth of the time.

    The stubs that we start interpreters with begin so, for what they import to get here. What was imported is not
    looked at by later collections either. What is compiled is kept in the folder *code*, where our code lies.
    """
    gc.disable()
    try:
        with compiled.kept(code):
            yield
        gc.freeze()
    finally:
        gc.enable()


def import_dask() -> None:
    """Import ``distributed``, with its YAML read by libyaml where PyYAML was built with it: 5% of the time."""
    try:
        import yaml
    except ImportError:  # Dask says so
        importlib.import_module("distributed")
        return
    loader = yaml.SafeLoader
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", loader)  # type: ignore[misc]
    try:
        importlib.import_module("distributed")
    finally:
        yaml.SafeLoader = loader  # type: ignore[misc]


def compile_ours(code: str) -> None:
    """Write the byte code of this package below the folder *code*, unless this version of Python has it there.

    Whoever sets ``PYTHONDONTWRITEBYTECODE`` (most container images do) means other folders than the store's own: each
    scheduler that moves would compile it again. The stubs keep Python itself from writing any while they import us;
    from here on it may again, unless the disk is full.
    """
    package = os.path.join(code, "worker_bootstrap")
    sources = sorted(name for name in os.listdir(package) if name.endswith(".py"))
    compiled = importlib.util.cache_from_source(os.path.join(package, sources[-1]))
    try:
        if os.access(package, os.W_OK) and not os.path.exists(compiled):
            for name in sources:
                _compile(os.path.join(package, name))
    except (OSError, EOFError, ValueError):
        return
    sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)


def _compile(source: str) -> None:
    """Compile one module, aside: on a full disk Python leaves byte code cut short, and says nothing."""
    import marshal
    import py_compile

    compiled = importlib.util.cache_from_source(source)
    aside = f"{compiled}.{os.getpid()}"
    try:
        py_compile.compile(source, aside, doraise=True)
        with open(aside, "rb") as file:
            marshal.loads(file.read()[HEADER_BYTES:])
            os.fsync(file.fileno())  # after a power cut nobody compares it with anything
        os.replace(aside, compiled)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
