"""What users write: sizes and durations, with a unit, and folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from worker_bootstrap.sizes import parse_size

        try:
            return parse_size(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 50GB", param, ctx)


class Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from dask.utils import parse_timedelta

        try:
            seconds = float(parse_timedelta(value))
        except (ValueError, TypeError, LookupError):
            seconds = -1.0
        if not seconds >= 0:
            self.fail(f"{value!r} is not a duration such as 30d", param, ctx)
        return seconds


class Timeout(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from envship.config import duration_s

        try:
            return duration_s(value)
        except ValueError as error:
            self.fail(f"{value!r} is not {error}", param, ctx)


class Folder(click.Path):
    """A folder, there or not. An empty text, of a variable that was not set, is none; Click takes it for ``.``."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the path of the folder is empty", param, ctx)
        return super().convert(value, param, ctx)
