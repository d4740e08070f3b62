"""The drafts of distributions that pip, uv or another installer put into a prefix, and of projects it links to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import PurePosixPath

from envship.canonical import Rewritten, Treatment
from envship.scripts import Script
from envship.sources.distributions import (
    MACHINE_BOUND,
    Distribution,
    canonical_direct_url,
    canonical_installer,
    canonical_record,
)
from envship.sources.draft import Draft, Item
from envship.sources.faults import Fault, Owner
from envship.sources.items import Collector
from envship.sources.path_files import is_inside
from envship.sources.projects import Project, linked_by_path_files, place_inside, project_of, too_large
from envship.sources.search_path import named_by_install
from envship.sources.source_tree import repository, stays_behind
from envship.sources.symlinks import target_inside
from envship.sources.tree import Found
from worker_bootstrap.manifest import Link

_NOT_EDITABLE = (
    "Install such projects without -e, or leave them out: PackOptions(ignore_editable=True), --ignore-editable."
)
_ELSEWHERE = (
    "Install such projects without -e before the environment is packed, or leave them out: "
    "PackOptions(ignore_editable=True), --ignore-editable."
)
_TOO_LARGE = (
    "Leave data out of projects (--exclude, .gitignore), or raise the limit: PackOptions(project_limit_bytes=…), "
    "--project-limit."
)


def distribution_draft(
    distribution: Distribution,
    files: Mapping[str, Found],
    owners: MutableMapping[str, str],
    collector: Collector,
) -> Draft:
    """The draft of *distribution*; takes those of its *files* (by path in the environment) that nobody in *owners* has.

    The source tree of a project that is installed in editable mode comes along (`Project`), unless the user wants none.
    """
    info = distribution.info + "/"
    place = place_inside(distribution, collector.prefixes)
    folders = (info, f"{place}/") if place else (info,)
    mine = dict.fromkeys((*distribution.files, *(path for path in files if path.startswith(folders))))
    mine = {path: None for path in mine if path in files and path not in owners}
    owners.update((path, distribution.name) for path in mine)
    draft = Draft(distribution.name, distribution.version, "", "pypi", [])
    project = None
    if distribution.editable is not None:
        draft = draft._replace(kind="project")
        if collector.options.ignore_editable:
            return draft
        project = project_of(distribution, files, collector.inside)
        if project is None:
            collector.search(named_by_install(distribution, files, collector.prefixes))
    if project is not None and collector.is_archive:
        url = distribution.editable
        problem = f"{draft.name} {draft.version} is installed in editable mode from {url}, which is not in the archive"
        collector.note(problem, _ELSEWHERE)
        project = None
    elif project is not None and project.problem:
        collector.note(project.problem, _NOT_EDITABLE)
        project = None
    items: list[Item] = []
    for path in mine:
        if path.startswith(info) and os.path.basename(path) in MACHINE_BOUND:
            continue
        if project is not None and path in project.links:
            items += _link_items(path, files[path], project, collector)
        else:
            items += collector.item(path, *files[path], _treatment(path, info, collector))
    if project is not None:
        items += _project_items(project, collector)
    return draft._replace(items=items)


def missing_files(distributions: Sequence[Distribution], files: Mapping[str, Found]) -> list[Fault]:
    """The files that distributions recorded and that are not there, but for what caches of byte code hold."""
    return [
        Fault(Owner(distribution.name, distribution.version, "pip"), path)
        for distribution in distributions
        for path in distribution.files
        if path not in files and "__pycache__" not in path.split("/")
    ]


def path_file_drafts(
    site_path: str,
    files: Mapping[str, Found],
    distributions: Sequence[Distribution],
    owners: MutableMapping[str, str],
    collector: Collector,
) -> list[Draft]:
    """The drafts of projects to which ``.pth`` files in the site folder link; they take these files.

    None, where the user wants none: the files are taken all the same, and so stay away. The ``.pth`` files of an
    archive mean folders of the machine that it was made on, and are left as they are.
    """
    if collector.is_archive:
        return []
    drafts = []
    for project in linked_by_path_files(site_path, files, distributions, collector.inside):
        if collector.options.ignore_editable:
            for path in project.links:
                owners.setdefault(path, project.name)
            continue
        if project.problem:
            collector.note(project.problem, _NOT_EDITABLE)
            continue
        items: list[Item] = []
        for path in project.links:
            if path not in owners:
                owners[path] = project.name
                items += _link_items(path, files[path], project, collector)
        drafts.append(Draft(project.name, "", "", "project", [*items, *_project_items(project, collector)]))
    return drafts


def _link_items(path: str, found: Found, project: Project, collector: Collector) -> Iterator[Item]:
    """What becomes of the file or symbolic link at *path*, which links to *project*."""
    real = os.path.realpath(found.origin)
    is_link = stat.S_ISLNK(found.node.st_mode)
    if is_link and os.path.isdir(real):
        yield Link(path, os.path.relpath(project.place_of(real), os.path.dirname(path)))
    elif is_link and not project.links[path]:
        # Not a link to where it lies: Python looks for byte code beside the link.
        yield from collector.copied(path, found.origin, is_source=True)
    else:
        yield from collector.item(path, *found, project.moved(path, found.origin, collector.own(path)))


def _project_items(project: Project, collector: Collector) -> list[Item]:
    items: list[Item] = []
    sizes: dict[str, int] = {}
    for path, (origin, node), tree in project.files(collector.trees, collector.prefixes):
        if not stat.S_ISLNK(node.st_mode):
            items += collector.item(path, origin, node)
            if stat.S_ISREG(node.st_mode) and collector.options.keeps(path):
                sizes[path] = node.st_size
            continue
        target = target_inside(path[len(tree.place) + 1 :], origin, [tree.root])
        real = os.path.realpath(origin)
        if target is not None and (project.has(real) or not os.path.exists(real)):
            items.append(Link(path, target))
        elif _is_beside(real, tree.root) and not stays_behind(real):
            # A part of the project that does not go along as such.
            items += collector.copied(path, origin, is_source=True)
        else:
            items += collector.outside_link(path, origin, is_source=True)
    problem = too_large(project, sizes, collector.options.project_limit_bytes)
    if problem:
        collector.note(problem, _TOO_LARGE)
    return items


def _is_beside(path: str, root: str) -> bool:
    """Whether there is anything at *path*, and it lies in the repository of *root*."""
    return os.path.exists(path) and is_inside(path, [os.path.realpath(repository(root))])


def _treatment(path: str, info: str, collector: Collector) -> Treatment | None:
    if path == info + "RECORD":
        return Rewritten("RECORD", canonical_record, collector.own(path))
    if path == info + "INSTALLER":
        return Rewritten("INSTALLER", canonical_installer)
    if path == info + "direct_url.json":
        return Rewritten("direct_url.json", canonical_direct_url)
    if path.startswith("bin/"):
        return Script(collector.own(path), PurePosixPath(info).parts[1])
    return None
