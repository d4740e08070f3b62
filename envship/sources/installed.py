"""The draft of a distribution that pip, uv or another installer put into a prefix."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from envship.canonical import Rewritten, Treatment
from envship.sources.distributions import (
    MACHINE_BOUND,
    Distribution,
    canonical_direct_url,
    canonical_installer,
    canonical_record,
)
from envship.sources.draft import Draft, Item
from envship.sources.items import Collector
from envship.sources.projects import Moved, Project
from envship.sources.tree import Found


def distribution_draft(
    distribution: Distribution,
    files: Mapping[str, Found],
    owners: MutableMapping[str, str],
    collector: Collector,
) -> Draft:
    """The draft of *distribution*; takes those of its *files* (by path in the environment) that nobody in *owners* has.

    The source tree of a project that is installed in editable mode comes along (`Project`), unless the user wants none.
    """
    if distribution.editable is not None and collector.options.ignore_editable:
        info = distribution.info + "/"
        mine = {*distribution.files, *(path for path in files if path.startswith(info))}
        owners.update((path, distribution.name) for path in mine if path not in owners)
        return Draft(distribution.name, distribution.version, "", "project", [])
    project = Project(distribution, files) if distribution.editable is not None else None
    if project is not None and not project.is_understood:
        collector.problems.append(
            f"{distribution.name} {distribution.version} is installed in editable mode from {distribution.editable}, "
            "in a way that cannot be followed: install it without -e"
        )
        project = None
    items: list[Item] = []
    info = distribution.info + "/"
    for path in dict.fromkeys((*distribution.files, *(path for path in files if path.startswith(info)))):
        if path not in files or path in owners:
            continue
        owners[path] = distribution.name
        if not (path.startswith(info) and os.path.basename(path) in MACHINE_BOUND):
            treatment = _treatment(path, info, collector)
            if project is not None and path in project.links:
                treatment = Moved(project.root, project.place, collector.own(path))
            items += collector.item(path, *files[path], treatment)
    if project is not None:
        for path, found in project.files(collector.trees):
            items += collector.item(path, *found)
    kind = "pypi" if project is None else "project"
    return Draft(distribution.name, distribution.version, "", kind, items)


def _treatment(path: str, info: str, collector: Collector) -> Treatment | None:
    if path == info + "RECORD":
        return Rewritten("RECORD", canonical_record, collector.own(path))
    if path == info + "INSTALLER":
        return Rewritten("INSTALLER", canonical_installer)
    if path == info + "direct_url.json":
        return Rewritten("direct_url.json", canonical_direct_url)
    return None
