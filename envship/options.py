"""What a user may say about a pack: which files stay away, which faults of the source to put up with.

One value for the API, the command line and the client. See `envship.pack` for what they do.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from envship.sources.draft import CodeItem, Draft, Item
from worker_bootstrap.manifest import HardLink

Filter = tuple[Literal["exclude", "include"], str]
"""A pattern (as of a shell, ``*`` matches ``/`` as well) of paths in the environment, and what it does to them."""


@dataclass(frozen=True)
class PackOptions:
    """How an environment is packed.

    Attributes
    ----------
    filters
        In this order, as conda-pack has them: ``("exclude", pattern)`` leaves files out, ``("include", pattern)`` takes
        back what was left out before. Patterns are those of a shell; ``*`` matches ``/`` as well.
    ignore_missing
        Pack the environment as it is where files of packages are missing or were overwritten by another package.
    ignore_editable
        Leave projects out that are installed in editable mode, and path files that lead out of the environment.
    copy_outside_links
        Put what symbolic links out of the environment point to in their place.
    project_limit_bytes
        A project installed in editable mode (or linked to by a path file) that is larger than this is an error: it
        holds data that somebody forgot rather than code.
    """

    filters: tuple[Filter, ...] = ()
    ignore_missing: bool = False
    ignore_editable: bool = False
    copy_outside_links: bool = False
    project_limit_bytes: int = 1 << 30

    @property
    def key(self) -> str:
        """Equal for options that pack the same."""
        return repr(self)

    def keeps(self, path: str) -> bool:
        """Whether the filters leave the file at *path* in the environment."""
        return not self.filters or _Filters(self.filters)(path)

    def chosen(self, drafts: Sequence[Draft]) -> list[Draft]:
        """*drafts* with what the filters leave of them. Byte code goes with its module."""
        if not self.filters:
            return list(drafts)
        keeps = _Filters(self.filters)
        return [draft._replace(items=_kept(draft.items, keeps)) for draft in drafts]


NO_OPTIONS = PackOptions()
"""Everything, and every fault is an error."""


class _Filters:
    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = [(kind == "include", re.compile(fnmatch.translate(pattern))) for kind, pattern in filters]

    def __call__(self, path: str) -> bool:
        kept = True
        for includes, pattern in self._filters:
            if kept != includes and pattern.match(path):
                kept = includes
        return kept


def _kept(items: Collection[Item], keeps: _Filters) -> list[Item]:
    kept = [item for item in items if keeps(item.path) and (not isinstance(item, CodeItem) or keeps(item.module_path))]
    paths = {item.path for item in kept}
    # Another name of a file that stays away would lead nowhere.
    return [item for item in kept if not isinstance(item, HardLink) or item.target in paths]
