"""What `envship.exporting` wrote of a venv, or of a plain interpreter: one prefix that holds all that it needs.

A folder with a history of conda and no package of conda's: the export has one, so that conda takes the folder for an
environment. Everything in it belongs to the environment, its interpreter too; what conda-pack and the export added is
left out. See also `envship.sources.venv`, for the environments that it is exported of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from envship.options import PackOptions
from envship.sources.base import base_draft, base_roots
from envship.sources.distributions import is_byte_code, read_distributions
from envship.sources.draft import Draft, FileItem, Item, Plan
from envship.sources.installed import distribution_draft, path_file_drafts
from envship.sources.interpreter import ask, check_is_whole
from envship.sources.items import Collector, with_byte_code
from envship.sources.projects import without_leavings
from envship.sources.tree import Found, Root, Trees
from envship.sources.unpacked import Unpacked, read_exported

_LEFT_OUT = re.compile(r"conda-meta/(?:history|state)|(?:.*/)?(?:CACHEDIR\.TAG|\.DS_Store|[^/]*\.log|[^/]*~)")
"""What the export added, caches and logs."""


def plan_exported(prefix: Path, trees: Trees, options: PackOptions, is_archive: bool = False) -> Plan:
    """What a pack of the exported environment at *prefix*, which may come out of an archive, will do.

    Raises
    ------
    NotAnEnvironment
        If its interpreter does not run, or is not whole.
    SourceProblems
        If something in it cannot be packed. Files that packages miss were missing, or left out, before the export.
    """
    if prefix.is_symlink():
        trees.walk(Root(str(prefix)))  # where it leads is part of what was seen
        prefix = prefix.resolve()
    executable = prefix / "bin" / "python"
    interpreter = ask(str(executable), str(prefix), libraries=True)
    check_is_whole(str(prefix), interpreter)
    library = f"lib/python{interpreter.short_version}"
    for root in base_roots(interpreter):
        trees.walk(root)
    files = trees.found(Root(str(prefix)))
    distributions = read_distributions(str(prefix / library / "site-packages"), f"{library}/site-packages", files)
    before = read_exported(prefix)
    collector = Collector([str(prefix), str(prefix.resolve())], trees, options, before, is_archive)
    files = without_leavings(files, distributions, collector.prefixes, trees)
    drafts = [_with_placeholders(base_draft(interpreter, trees, collector), before)]
    owners = {item.path: "python" for item in drafts[0].items}
    drafts += [distribution_draft(distribution, files, owners, collector) for distribution in distributions]
    drafts += path_file_drafts(f"{library}/site-packages", files, distributions, owners, collector)
    drafts.append(_unowned(files, owners, collector, before))
    return Plan(
        prefix=str(prefix),
        prefixes=collector.prefixes,
        interpreter=str(executable),
        platform=interpreter.platform,
        python=interpreter.version,
        environ=_environ(prefix),
        drafts=[
            draft._replace(items=list(with_byte_code(draft.items, library, interpreter.cache_tag))) for draft in drafts
        ],
        problems=collector.settle(str(prefix), []),
    )


def _with_placeholders(draft: Draft, before: Unpacked) -> Draft:
    """The interpreter's own files do not come by way of the collector."""
    items = [
        item._replace(treatment=before.treatment(item.path, item.treatment)) if isinstance(item, FileItem) else item
        for item in draft.items
    ]
    return draft._replace(items=items)


def _unowned(files: Mapping[str, Found], owners: Mapping[str, str], collector: Collector, before: Unpacked) -> Draft:
    items: list[Item] = []
    for path, found in files.items():
        left_out = _LEFT_OUT.fullmatch(path) is not None or is_byte_code(path, files) or before.added(path)
        if path not in owners and not left_out:
            items += collector.item(path, *found)
    return Draft("", "", "", "files", items)


def _environ(prefix: Path) -> dict[str, str]:
    """The variables that the export kept as conda does."""
    try:
        variables = json.loads((prefix / "conda-meta" / "state").read_bytes())["env_vars"]
        return {str(name): str(value) for name, value in variables.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
