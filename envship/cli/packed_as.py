"""The options of commands that pack an environment: ``--exclude``, ``--include``, ``--ignore-missing`` and the like."""

from __future__ import annotations

from typing import Any

import click

from envship.cli.quantities import Size
from envship.errors import SourceProblems
from envship.options import Filter, PackOptions

_FILTERS = ("exclude", "include")
_SETTINGS = ("ignore_missing", "ignore_editable", "copy_outside_links", "project_limit_bytes")
_ALL_PROBLEMS = f"{__name__}.all_problems"


class PackingCommand(click.Command):
    """A command that packs what it is given. Its function gets what the user said about that as ``packed_as``.

    With ``--all-problems``, what keeps it from being packed is told in full.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params += [
            _filter("--exclude", "Leave out files whose path in the environment matches (repeatable)."),
            _filter("--include", "Take back files that an --exclude before it left out (repeatable)."),
            _flag("--ignore-missing", "Go on if files of packages are missing or were overwritten."),
            _flag("--ignore-editable", "Leave out projects in editable mode, and path files that lead outside."),
            _flag("--copy-outside-links", "Put what symbolic links out of the environment point to in their place."),
            click.Option(
                ["--project-limit", "project_limit_bytes"],
                type=Size(),
                default="1 GiB",
                show_default=True,
                help="Refuse a project in editable mode that is larger than this.",
            ),
            _flag("--all-problems", "If it cannot be packed, print everything that is wrong with it, file by file."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Filters work in the order in which they were given, which click forgets once it has sorted them by option.
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        patterns = {name: iter(given.get(name) or ()) for name in _FILTERS}
        filters: list[Filter] = [(p.name, next(patterns[p.name])) for p in order if p.name in _FILTERS]  # type: ignore[misc]
        rest = super().parse_args(ctx, args)
        for name in _FILTERS:
            ctx.params.pop(name, None)
        ctx.meta[_ALL_PROBLEMS] = ctx.params.pop("all_problems")
        flags = {name: ctx.params.pop(name) for name in _SETTINGS}
        ctx.params["packed_as"] = PackOptions(tuple(filters), **flags)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SourceProblems as error:
            if not ctx.meta[_ALL_PROBLEMS]:
                raise
            raise click.ClickException(error.in_full()) from error


def _filter(name: str, text: str) -> click.Option:
    return click.Option([name], metavar="PATTERN", multiple=True, help=text)


def _flag(name: str, text: str) -> click.Option:
    return click.Option([name], is_flag=True, help=text)
