"""Importing Dask as fast as it can be: a swap lasts about as long as that takes."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """For the block, no collection of garbage: there is none, and looking takes an eighth of the time.

    What was imported is not looked at by later collections either.
    """
    gc.disable()
    try:
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
