"""Conda environments: packages as ``conda-meta`` records them, pip's packages, and files that nobody owns.

Which files belong to which package, how each names its prefix, and what it was before, comes from ``conda-meta`` and
not from the package cache, which may be gone. What is left out is what conda-pack leaves out (a test compares the
two); asking it took as long as all the rest of planning. Source of the format: conda's ``PrefixRecord`` and
"paths.json" in conda-build's manual, "Package specification".
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from envship.canonical import Own, Recorded, Rewritten, Treatment, Undigested, with_interpreter_of
from envship.errors import NotAnEnvironment, SourceProblems
from envship.options import PackOptions
from envship.scripts import Script
from envship.sources.distributions import Distribution, is_byte_code, read_distributions
from envship.sources.draft import CodeItem, Draft, Item, MadeItem, Plan
from envship.sources.faults import Fault, Owner
from envship.sources.former_prefixes import former_prefixes
from envship.sources.installed import distribution_draft, missing_files, path_file_drafts
from envship.sources.interpreter import ask, say_users_packages_stay
from envship.sources.items import Collector, with_byte_code
from envship.sources.projects import LINKING, without_leavings
from envship.sources.tree import Found, Root, Trees
from envship.sources.unpacked import read_unpacked
from envship.sources.version_control import VERSION_CONTROL
from worker_bootstrap.digest import Digest, digest_of_file, is_digest
from worker_bootstrap.manifest import Relocation

NOT_CONTENT = frozenset(
    ("pkgs", "envs", "conda-bld", ".conda_lock", "users", "conda-recipes", ".index", ".nonadmin", ".unionfs")
)
"""What a base environment holds besides itself (the list of conda-pack)."""

_LEFT_OUT = re.compile(
    r"(?:.*/)?(?:CACHEDIR\.TAG|\.DS_Store|[^/]*\.log|[^/]*~)"
    # Old versions of conda link these into environments when they activate them.
    r"|bin/(?:conda|activate|deactivate)"
    r"|conda-meta/(?:history|[^/]*\.lock|\.[^/]*|pixi[^/]*|initial-state\.explicit\.txt)"
    r"|var/(?:cache|log|tmp)/.*|\.cache/.*"
)
_MACHINE_BOUND = (
    *("extracted_package_dir", "package_tarball_full_path", "link", "indexed_timestamp", "auth"),
    *("requested_spec", "requested_specs"),
)
_UNREADABLE = "Repair the package: conda install --force-reinstall NAME."


def plan_conda(prefix: Path, trees: Trees, options: PackOptions, is_archive: bool = False) -> Plan:
    """What a pack of the conda environment at *prefix*, which may come out of an archive, will do.

    Raises
    ------
    NotAnEnvironment
        If there is no Python in it.
    SourceProblems
        If files are missing or were overwritten (unless *options* ignore that), or cannot be packed.
    """
    files = trees.found(Root(str(prefix), tuple(sorted(NOT_CONTENT.union(VERSION_CONTROL))), follow=True))
    records = _read_records(prefix, files)
    python = next((record for record in records if record["name"] == "python"), None)
    if python is None:
        raise NotAnEnvironment(str(prefix), "no package named python is installed in it")
    interpreter = ask(str(prefix / "bin" / "python"), str(prefix))
    library = f"lib/python{interpreter.short_version}"

    before = read_unpacked(prefix, _placeholders(records))
    prefixes = [str(prefix), str(prefix.resolve()), *(before.older_prefixes if before is not None else ())]
    prefixes += former_prefixes(records, files, prefixes)
    collector = Collector(prefixes, trees, options, before, is_archive)
    owners = _owners(records, files)
    distributions = _foreign_distributions(prefix, f"{library}/site-packages", records, files, owners)
    files = without_leavings(files, distributions, collector.prefixes, trees)
    faults = [*_missing(records, files), *missing_files(distributions, files)]
    faults += _take_over(prefix, records, owners, distributions)
    shared = _shared(records, distributions)
    drafts = [_package(record, files, owners, shared, collector, library) for record in records]
    for distribution in distributions:
        drafts.append(distribution_draft(distribution, files, owners, collector))
    drafts += path_file_drafts(f"{library}/site-packages", files, distributions, owners, collector)
    drafts.append(_unowned(files, owners, collector))
    drafts = [
        draft._replace(
            items=_recorded_code(draft, records, with_byte_code(draft.items, library, interpreter.cache_tag))
        )
        for draft in drafts
    ]
    ignored = collector.settle(str(prefix), faults)
    if not is_archive:
        say_users_packages_stay(str(prefix), interpreter)
    return Plan(
        prefix=str(prefix),
        prefixes=collector.prefixes,
        interpreter=str(prefix / "bin" / "python"),
        platform=str(python.get("subdir") or interpreter.platform),
        python=interpreter.version,
        environ=_environ(prefix, collector.prefixes),
        drafts=drafts,
        problems=ignored,
    )


def canonical_conda_meta(data: bytes) -> bytes:
    """A record of ``conda-meta`` without what is true of one machine, one installation or one user only."""
    record = json.loads(data)
    for key in _MACHINE_BOUND:
        record.pop(key, None)
    record["link"] = {"source": "", "type": 1}
    for key in ("url", "channel"):
        if isinstance(record.get(key), str):
            record[key] = _public_url(record[key])
    for path in record.get("paths_data", {}).get("paths") or []:
        path.pop("sha256_in_prefix", None)
        if path.get("path_type") == "unix_python_entry_point":
            # Written by the installer with the prefix in it.
            path.pop("sha256", None)
        if path.get("path_type") == "unix_python_entry_point" or "prefix_placeholder" in path:
            # Some installers write the size of the original, others that of the file in the prefix.
            path.pop("size_in_bytes", None)
    # Without indentation: that would take Python's encoder, several times as long.
    return json.dumps(record, sort_keys=True).encode()


def _public_url(url: str) -> str:
    """*url* without user, password and token, which are secrets, and without local folders."""
    if url.startswith("file:"):
        return "file:///" + url.rstrip("/").rpartition("/")[2] if url.endswith((".conda", ".bz2")) else "file:///"
    return re.sub(r"/t/[^/]+(?=/)", "", re.sub(r"(?<=://)[^/@]*@", "", url))


def _read_records(prefix: Path, files: Collection[str]) -> list[dict[str, Any]]:
    records = []
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        if f"conda-meta/{path.name}" not in files:
            continue
        try:
            record = json.loads(path.read_bytes())
            _check_record(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceProblems(
                str(prefix), [f"conda-meta/{path.name} cannot be read: {error}"], _UNREADABLE
            ) from error
        record["envship-record"] = path.name
        record["envship-paths"] = list(_recorded_paths(record))
        records.append(record)
    return records


def _check_record(record: Any) -> None:
    if not (isinstance(record["name"], str) and isinstance(record["version"], str)):
        raise TypeError("its name or version is no text")
    paths = record.get("paths_data", {}).get("paths") or []
    if not all(isinstance(name, str) for name in (*record.get("files", []), *(path["_path"] for path in paths))):
        raise TypeError("a path in it is no text")


def _placeholders(records: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The placeholders that packages recorded."""
    return frozenset(
        str(entry["prefix_placeholder"])
        for record in records
        for entry in record["envship-paths"]
        if "prefix_placeholder" in entry
    )


def _recorded_paths(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The paths of a record without byte code: of ``paths_data``, or where an old conda wrote none, of ``files``."""
    recorded = record.get("paths_data", {}).get("paths")
    paths = recorded if recorded is not None else [{"_path": name} for name in record.get("files", [])]
    names = {path["_path"] for path in paths}
    for path in paths:
        if path.get("path_type") not in ("pyc_file", "directory") and not is_byte_code(path["_path"], names):
            yield path


def _owners(records: Sequence[Mapping[str, Any]], files: Mapping[str, Found]) -> dict[str, str]:
    """Path to the name of the record file that owns it. Of two conda packages, the first in order does."""
    owners: dict[str, str] = {}
    for record in records:
        own_record = f"conda-meta/{record['envship-record']}"
        for path in (own_record, *(entry["_path"] for entry in record["envship-paths"])):
            if path in files:
                owners.setdefault(path, record["envship-record"])
    return owners


def _missing(records: Sequence[Mapping[str, Any]], files: Mapping[str, Found]) -> list[Fault]:
    absent = [
        (record, entry)
        for record in records
        for entry in record["envship-paths"]
        if entry["_path"] not in files and entry["_path"] not in NOT_CONTENT
    ]
    # A zip may hold copies of what links point to: a folder, where the package has a link.
    folders = _folders_of(files) if absent else ()
    return [
        Fault(_owner(record), entry["_path"])
        for record, entry in absent
        if entry["_path"] not in folders or entry.get("path_type", "softlink") != "softlink"
    ]


def _folders_of(paths: Iterable[str]) -> set[str]:
    folders: set[str] = set()
    for path in paths:
        while (path := os.path.dirname(path)) and path not in folders:
            folders.add(path)
    return folders


def _shared(records: Sequence[Mapping[str, Any]], distributions: Sequence[Distribution]) -> set[str]:
    """The paths that were recorded more than once."""
    seen: set[str] = set()
    shared: set[str] = set()
    recorded = [(entry["_path"] for entry in record["envship-paths"]) for record in records]
    for path in itertools.chain(*recorded, *(distribution.files for distribution in distributions)):
        (shared if path in seen else seen).add(path)
    return shared


def _owner(record: Mapping[str, Any]) -> Owner:
    return Owner(record["name"], str(record["version"]), "conda")


def _foreign_distributions(
    prefix: Path,
    site_path: str,
    records: Sequence[Mapping[str, Any]],
    files: Mapping[str, Found],
    owners: Mapping[str, str],
) -> list[Distribution]:
    """The distributions that another installer put there, be it over those of conda."""
    recorded = _by_file(records)
    return [
        distribution
        for distribution in read_distributions(str(prefix / site_path), site_path, files)
        if f"{distribution.info}/METADATA" not in owners
        or _is_changed(prefix, recorded, owners, f"{distribution.info}/RECORD")
    ]


def _take_over(
    prefix: Path,
    records: Sequence[Mapping[str, Any]],
    owners: dict[str, str],
    distributions: Sequence[Distribution],
) -> list[Fault]:
    """Give files of conda that pip overwrote to pip's package, whose they are now; say which."""
    recorded = _by_file(records)
    faults = []
    for distribution in distributions:
        by = Owner(distribution.name, distribution.version, "pip")
        for path in distribution.files:
            if path in owners and _is_changed(prefix, recorded, owners, path):
                faults.append(Fault(_owner(recorded[owners[path]]), path, by))
                del owners[path]
    return faults


def _by_file(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {record["envship-record"]: record for record in records}


def _is_changed(prefix: Path, recorded: Mapping[str, Mapping[str, Any]], owners: Mapping[str, str], path: str) -> bool:
    """Whether a file of a conda package is no longer the one that was installed."""
    record = recorded.get(owners.get(path, ""))
    return record is not None and not _is_original(prefix / path, record, path)


def _is_original(file: Path, record: Mapping[str, Any], path: str) -> bool:
    entry: Mapping[str, Any] = next((entry for entry in record["envship-paths"] if entry["_path"] == path), {})
    digest = entry.get("sha256_in_prefix") or entry.get("sha256")
    return digest is not None and file.is_file() and digest_of_file(file) == digest


def _package(
    record: Mapping[str, Any],
    files: Mapping[str, Found],
    owners: Mapping[str, str],
    shared: Container[str],
    collector: Collector,
    library: str,
) -> Draft:
    me = record["envship-record"]
    own_record = f"conda-meta/{me}"
    treatment = Rewritten("conda-meta", canonical_conda_meta)
    items: list[Item] = list(collector.item(own_record, *files[own_record], treatment))
    for entry in _as_copies(record["envship-paths"]):
        path = entry["_path"]
        if owners.get(path) == me:
            items += collector.item(path, *files[path], treatment_of(entry, collector, library))
    items = list({item.path: item for item in items}.values())
    paths = (entry["_path"] for entry in record["envship-paths"])
    is_whole = all(owners.get(path) == me and path not in shared and not path.endswith(LINKING) for path in paths)
    return Draft(record["name"], str(record["version"]), str(record.get("build", "")), "conda", items, is_whole)


def _as_copies(entries: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """*entries*, with what is true of the files that links point to in those of the links: a zip may hold copies."""
    entries = list(entries)
    files = {
        entry["sha256"]: entry for entry in entries if "prefix_placeholder" in entry and is_digest(entry.get("sha256"))
    }
    for entry in entries:
        is_link = entry.get("path_type") == "softlink" and is_digest(entry.get("sha256"))
        yield {**files.get(entry["sha256"], entry), "_path": entry["_path"]} if is_link else entry


def treatment_of(entry: Mapping[str, Any], collector: Collector, library: str) -> Treatment | None:
    """How a file is treated that a package recorded as *entry*; None if it says nothing that matters.

    *library* is the place of the standard library, ``lib/python3.11``.
    """
    digest, mode, placeholder = entry.get("sha256"), entry.get("file_mode"), entry.get("prefix_placeholder")
    own = collector.own(entry["_path"])
    if entry.get("path_type") == "unix_python_entry_point":
        # Written by the installer: with the interpreter's path, or where that is too long without it.
        prefix = own.prefixes[0]
        script = Script(own, library.rpartition("/")[2])
        return Rewritten(f"entry point {prefix}", functools.partial(with_interpreter_of, prefix=prefix), script)
    named = isinstance(placeholder, str) and placeholder.startswith("/") and mode in ("text", "binary")
    relocation = Relocation(str(mode), str(placeholder)) if named else None
    if not is_digest(digest):
        return None if relocation is None else Undigested(relocation, own)
    return Recorded(Digest(str(digest)), relocation, own)


def _recorded_code(draft: Draft, records: Sequence[Mapping[str, Any]], items: Iterator[Item]) -> list[Item]:
    """*items*, with the digests of byte code that came inside of the package."""
    digests: dict[str, str] = {}
    if draft.kind == "conda":
        record = next(record for record in records if record["name"] == draft.name)
        for entry in record.get("paths_data", {}).get("paths") or []:
            if entry["_path"].endswith(".pyc") and is_digest(entry.get("sha256")):
                digests[entry["_path"]] = entry["sha256"]
    return [
        item._replace(cached_digest=Digest(digests[item.path]))
        if isinstance(item, CodeItem) and item.path in digests
        else item
        for item in items
    ]


def _unowned(files: Mapping[str, Found], owners: Mapping[str, str], collector: Collector) -> Draft:
    items: list[Item] = [MadeItem("conda-meta/history", b"")]
    for path, found in files.items():
        left_out = (
            _LEFT_OUT.fullmatch(path) is not None
            or is_byte_code(path, files)
            or (collector.unpacked is not None and collector.unpacked.added(path))
        )
        if path not in owners and not left_out:
            items += collector.item(path, *found)
    return Draft("", "", "", "files", items)


def _environ(prefix: Path, prefixes: Sequence[str]) -> dict[str, str]:
    """Variables that ``conda env config vars set`` keeps, with a placeholder for the prefix.

    Those that packages bring (``etc/conda/env_vars.d``) are files like all others, and read where the environment lies.
    """
    try:
        state = json.loads((prefix / "conda-meta" / "state").read_bytes())
        found = {str(key): str(value) for key, value in state.get("env_vars", {}).items()}
    except (OSError, ValueError, AttributeError):
        return {}
    own = Own(tuple(prefixes))
    return {
        key: own(value.encode("utf-8", "surrogateescape")).data.decode("utf-8", "surrogateescape")
        for key, value in found.items()
        if value != "***unset***"
    }
