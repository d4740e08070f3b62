"""Sizes as users write them."""

from __future__ import annotations

import importlib
from typing import Any


def parse_size(value: Any) -> int:
    """The bytes of *value*: a number of them, or text such as '50 GB', read as Dask reads it, but not without a number.

    Dask takes empty text, which an unset variable leaves, for one byte.

    Raises
    ------
    ValueError
        If it is no size, negative, or without an end.
    """
    if isinstance(value, bool) or (isinstance(value, str) and not any(letter.isdigit() for letter in value)):
        raise ValueError(f"{value!r} is no size")
    try:
        size_bytes = int(importlib.import_module("dask.utils").parse_bytes(value))
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(f"{value!r} is no size") from error
    if size_bytes < 0:
        raise ValueError(f"{value!r} is less than nothing")
    return size_bytes
