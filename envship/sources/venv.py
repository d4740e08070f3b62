"""Venvs (venv, virtualenv, uv) and plain interpreters: their packages together with the interpreter itself.

The result is one relocatable prefix in which everything lies where Python expects it without a ``pyvenv.cfg``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from envship.errors import NotAnEnvironment
from envship.options import PackOptions
from envship.sources.base import base_draft, base_roots
from envship.sources.distributions import Distribution, is_byte_code, read_distributions
from envship.sources.draft import Draft, Item, Plan
from envship.sources.installed import distribution_draft, missing_files, path_file_drafts
from envship.sources.interpreter import Interpreter, ask, check_is_whole, say_users_packages_stay
from envship.sources.items import Collector, with_byte_code
from envship.sources.projects import without_leavings
from envship.sources.tree import Found, Root, Trees
from envship.sources.version_control import VERSION_CONTROL

_LEFT_OUT = re.compile(
    r"pyvenv\.cfg|\.lock|\.gitignore|CACHEDIR\.TAG|lib64|include|include/python[0-9.]*t?|bin/(?:python|pypy)[0-9.]*t?|bin/[Aa]ctivate.*"
    r"|bin/deactivate.*|bin/pydoc\.bat|(?:.*/)?(?:\.DS_Store|[^/]*\.log|[^/]*~|_virtualenv\.(?:pth|py))"
)
"""What makes a folder a venv, which the prefix is not any more; caches and logs."""

NO_USER_SITE = {"PYTHONNOUSERSITE": "1"}
"""A venv sees no packages of its user, or sees its own first; without ``pyvenv.cfg``, the user's come first."""

_NAMED = 5
"""Packages that are named where some are said to come along."""

logger = logging.getLogger("envship.sources")


def plan_venv(prefix: Path, trees: Trees, options: PackOptions, is_archive: bool = False) -> Plan:
    """What a pack of the venv, or the plain interpreter, at *prefix*, which may come out of an archive, will do.

    Raises
    ------
    NotAnEnvironment
        If its interpreter does not run, or is not whole in the archive.
    SourceProblems
        If files are missing (unless *options* ignore that) or cannot be packed.
    """
    executable = next((path for path in (prefix / "bin/python", prefix / "bin/python3") if path.exists()), None)
    if executable is None:
        raise NotAnEnvironment(str(prefix), "the interpreter that it was made with is gone")
    interpreter = ask(str(executable), str(prefix), libraries=True)
    if is_archive:
        check_is_whole(str(prefix), interpreter)
    library = f"lib/python{interpreter.short_version}"
    for root in base_roots(interpreter):
        trees.walk(root)
    files, distributions, others = _installed(prefix, f"{library}/site-packages", interpreter, trees)
    files = without_leavings(files, distributions, [str(prefix), str(prefix.resolve())], trees)
    spellings, inside = _spellings(prefix, interpreter), _inside(prefix, interpreter)
    collector = Collector(spellings, trees, options, is_archive=is_archive, inside=inside)
    drafts = [base_draft(interpreter, trees, collector)]
    owners = {item.path: "python" for item in drafts[0].items}
    drafts += [distribution_draft(distribution, files, owners, collector) for distribution in distributions]
    drafts += path_file_drafts(f"{library}/site-packages", files, distributions, owners, collector)
    drafts.append(_unowned(files, owners, collector))
    # What is missing from another place's packages is not the venv's to mend (Debian's RECORDs name such files).
    mine = [distribution for distribution in distributions if distribution not in others]
    ignored = collector.settle(str(prefix), missing_files(mine, files))
    _say(prefix, interpreter, others)
    if not is_archive and _sees_packages_of_others(prefix):
        say_users_packages_stay(str(prefix), interpreter)
    return Plan(
        prefix=str(prefix),
        prefixes=collector.prefixes,
        interpreter=str(executable),
        platform=interpreter.platform,
        python=interpreter.version,
        environ={} if _settings(prefix) is None else NO_USER_SITE,
        drafts=[
            draft._replace(items=list(with_byte_code(draft.items, library, interpreter.cache_tag))) for draft in drafts
        ],
        problems=ignored,
    )


def _installed(
    prefix: Path, site_path: str, interpreter: Interpreter, trees: Trees
) -> tuple[dict[str, Found], list[Distribution], list[Distribution]]:
    """Files by their path in the environment, the distributions that own most of them, and which lie outside of it."""
    files: dict[str, Found] = {}
    distributions: list[Distribution] = []
    is_venv = _settings(prefix) is not None
    if is_venv:
        files.update(trees.found(Root(str(prefix), VERSION_CONTROL, follow=True)))
        distributions += read_distributions(str(prefix / site_path), site_path, files)
    mine = len(distributions)
    if _sees_packages_of_others(prefix):
        for folder in interpreter.site:
            _add_site(folder, site_path, trees, files, distributions)
    return files, distributions, distributions[mine:] if is_venv else []


def _say(prefix: Path, interpreter: Interpreter, others: Sequence[Distribution]) -> None:
    if others:
        names = ", ".join(f"{each.name} {each.version}" for each in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        message = "with the venv %s go the packages of its interpreter (%s), %d of them: %s%s"
        logger.warning(message, prefix, ", ".join(interpreter.site), len(others), names, more)


def _add_site(
    folder: str, site_path: str, trees: Trees, files: dict[str, Found], distributions: list[Distribution]
) -> None:
    """Add what lies in a site folder of the interpreter, except for packages that a folder before it has."""
    inside = trees.found(Root(folder, follow=True), site_path)
    taken = {distribution.name for distribution in distributions}
    for distribution in read_distributions(folder, site_path, inside):
        info = distribution.info + "/"
        if distribution.name in taken:
            for path in [*distribution.files, *(path for path in inside if path.startswith(info))]:
                inside.pop(path, None)
            continue
        distributions.append(distribution)
        for path in distribution.files:
            if not path.startswith(site_path + "/"):
                origin = os.path.normpath(os.path.join(folder, os.path.relpath(path, site_path)))
                if os.path.lexists(origin) and (os.path.islink(origin) or not os.path.isdir(origin)):
                    inside.update((path, Found(origin, node)) for node in trees.walk(Root(origin)).values())
    for path, found in inside.items():
        files.setdefault(path, found)


def _sees_packages_of_others(prefix: Path) -> bool:
    """Whether there are packages outside of a venv that it sees; an interpreter sees its user's."""
    settings = _settings(prefix)
    return settings is None or settings.get("include-system-site-packages") == "true"


def _settings(prefix: Path) -> dict[str, str] | None:
    """What ``pyvenv.cfg`` says; None for an interpreter that is no venv."""
    try:
        text = (prefix / "pyvenv.cfg").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip().lower(): value.strip().lower() for key, _, value in pairs}


def _spellings(prefix: Path, interpreter: Interpreter) -> list[str]:
    """Paths under which files may name the environment: the venv's and the interpreter's, links resolved or not."""
    return [str(prefix), str(prefix.resolve()), interpreter.base_prefix, os.path.realpath(interpreter.base_prefix)]


def _inside(prefix: Path, interpreter: Interpreter) -> list[str]:
    """What is part of the environment: the venv, and of its interpreter's folders those that go along."""
    parts = [*interpreter.site, interpreter.stdlib, interpreter.platstdlib]
    if _settings(prefix) is not None:
        parts[:0] = [str(prefix)]
    return [form for part in parts for form in (part, os.path.realpath(part))]


def _unowned(files: Mapping[str, Found], owners: Mapping[str, str], collector: Collector) -> Draft:
    items: list[Item] = []
    for path, found in files.items():
        if path not in owners and _LEFT_OUT.fullmatch(path) is None and not is_byte_code(path, files):
            items += collector.item(path, *found)
    return Draft("", "", "", "files", items)
