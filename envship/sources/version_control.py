"""Folders of version control in an environment: the history of something, which is no part of what runs.

A checkout in the environment has one. That of an environment that was made in a repository's own folder is not even
walked: what git does is no change of the environment. In what lies outside of it, `envship.sources.source_tree` and
`envship.sources.items` pass them over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from envship.sources.distributions import Distribution
from envship.sources.tree import Found

VERSION_CONTROL = (".git", ".hg", ".svn")
"""Names of such folders, and of files in their place (worktrees, submodules)."""

_INSIDE = re.compile(rf"(?:^|/)(?:{'|'.join(map(re.escape, VERSION_CONTROL))})(?:/|$)")


def without_version_control(
    files: dict[str, Found], distributions: Iterable[Distribution], prefix: str
) -> dict[str, Found]:
    """*files* of the environment at *prefix* without folders of version control that none of its packages owns."""
    inside = {path for path in files if _INSIDE.search(path)}
    if not inside:
        return files
    inside.difference_update(*(distribution.files for distribution in distributions), _recorded_by_conda(prefix))
    return {path: found for path, found in files.items() if path not in inside}


def _recorded_by_conda(prefix: str) -> Iterator[str]:
    """Paths that conda packages recorded; whoever plans them says what is wrong with a record."""
    for file in Path(prefix, "conda-meta").glob("*.json"):
        try:
            record = json.loads(file.read_bytes())
            paths = record.get("paths_data", {}).get("paths") or []
            yield from (path["_path"] for path in paths if _is_named(path))
            yield from (name for name in record.get("files", []) if isinstance(name, str))
        except (OSError, ValueError, TypeError, AttributeError):
            continue


def _is_named(path: object) -> bool:
    return isinstance(path, Mapping) and isinstance(path.get("_path"), str)
