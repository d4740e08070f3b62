"""Conda environments: packages as ``conda-meta`` records them, pip's packages, and files that nobody owns.

`conda_pack` says which files belong into the environment. How each names its prefix, and what it was before, comes from
``conda-meta`` and not from the package cache, which may be gone. Source of the format: conda's ``PrefixRecord`` and
"paths.json" in conda-build's manual, "Package specification".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conda_pack import CondaEnv, CondaPackException

from envship.canonical import Recorded, Rewritten
from envship.options import PackOptions
from envship.sources.distributions import Distribution, read_distributions
from envship.sources.draft import CodeItem, Draft, Item, MadeItem, Plan
from envship.sources.installed import distribution_draft
from envship.sources.interpreter import ask
from envship.sources.items import Collector, with_byte_code
from envship.sources.tree import Found, Root, Trees
from envship.sources.unpacked import read_unpacked
from worker_bootstrap.digest import Digest, digest_of_file, is_digest
from worker_bootstrap.errors import NotAnEnvironment, SourceProblems
from worker_bootstrap.manifest import Relocation

NOT_CONTENT = frozenset(("pkgs", "envs", "conda-bld", ".conda_lock", "users", "conda-recipes", ".index", ".nonadmin"))
"""What a base environment holds besides itself (the list of conda-pack)."""

_LEFT_OUT = re.compile(
    r"(?:.*/)?(?:CACHEDIR\.TAG|\.DS_Store|[^/]*\.log|[^/]*\.pyc|[^/]*~)"
    r"|conda-meta/(?:history|[^/]*\.lock|\.[^/]*)|var/(?:cache|log|tmp)/.*|\.cache/.*"
)
_MACHINE_BOUND = (
    *("extracted_package_dir", "package_tarball_full_path", "link", "indexed_timestamp", "auth"),
    *("requested_spec", "requested_specs"),
)
_REMEDY = (
    "Repair the packages (conda install --force-reinstall NAME; remove what pip put in the place of conda's files), "
    "or pack what is there: PackOptions(ignore_missing=True), --ignore-missing."
)


def plan_conda(prefix: Path, trees: Trees, options: PackOptions) -> Plan:
    """What a pack of the conda environment at *prefix* will do.

    Raises
    ------
    NotAnEnvironment
        If there is no Python in it, or conda-pack does not accept it.
    SourceProblems
        If files are missing or were overwritten (unless *options* ignore that), or cannot be packed.
    """
    records = _read_records(prefix)
    python = next((record for record in records if record["name"] == "python"), None)
    if python is None:
        raise NotAnEnvironment(str(prefix), "no package named python is installed in it")
    interpreter = ask(str(prefix / "bin" / "python"), str(prefix))
    library = f"lib/python{interpreter.short_version}"
    everything = trees.found(Root(str(prefix), tuple(sorted(NOT_CONTENT))))
    content = _enumerate(prefix)
    files = {path: found for path, found in everything.items() if path in content}

    before = read_unpacked(prefix, _placeholders(records))
    older = before.older_prefixes if before is not None else ()
    collector = Collector([str(prefix), str(prefix.resolve()), *older], trees, options, before)
    owners = _owners(records, files)
    distributions = _foreign_distributions(prefix, f"{library}/site-packages", files, owners)
    collector.check_path_files(f"{library}/site-packages", files, distributions)
    faults = [*_missing(records, files), *_missing_of(distributions, files)]
    faults += _take_over(prefix, records, owners, distributions)
    drafts = [_package(record, files, owners, collector) for record in records]
    for distribution in distributions:
        drafts.append(distribution_draft(distribution, files, owners, collector))
    drafts.append(_unowned(files, owners, collector))
    drafts = [
        draft._replace(
            items=_recorded_code(draft, records, with_byte_code(draft.items, library, interpreter.cache_tag))
        )
        for draft in drafts
    ]
    problems = collector.problems + ([] if options.ignore_missing else faults)
    if problems:
        raise SourceProblems(str(prefix), problems, _REMEDY)
    return Plan(
        prefix=str(prefix),
        prefixes=collector.prefixes,
        interpreter=str(prefix / "bin" / "python"),
        platform=str(python.get("subdir") or interpreter.platform),
        python=interpreter.version,
        environ=_environ(prefix),
        drafts=drafts,
        problems=faults,
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
    for path in record.get("paths_data", {}).get("paths", []):
        path.pop("sha256_in_prefix", None)
        if path.get("path_type") == "unix_python_entry_point":
            # Written by the installer with the prefix in it.
            path.pop("sha256", None)
        if path.get("path_type") == "unix_python_entry_point" or "prefix_placeholder" in path:
            # Some installers write the size of the original, others that of the file in the prefix.
            path.pop("size_in_bytes", None)
    return json.dumps(record, sort_keys=True, indent=1).encode()


def _public_url(url: str) -> str:
    """*url* without user, password and token, which are secrets, and without local folders."""
    if url.startswith("file:"):
        return "file:///" + url.rstrip("/").rpartition("/")[2] if url.endswith((".conda", ".bz2")) else "file:///"
    return re.sub(r"/t/[^/]+(?=/)", "", re.sub(r"(?<=://)[^/@]*@", "", url))


def _read_records(prefix: Path) -> list[dict[str, Any]]:
    records = []
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            if not isinstance(record["name"], str):
                raise TypeError("its name is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise SourceProblems(str(prefix), [f"conda-meta/{path.name} cannot be read: {error}"], _REMEDY) from error
        record["envship-record"] = path.name
        records.append(record)
    return records


def _enumerate(prefix: Path) -> frozenset[str]:
    # Its own checks are switched off where ours name every file (it names three of a package, and no overwritten ones).
    try:
        found = CondaEnv.from_prefix(
            str(prefix), on_missing_cache="ignore", ignore_editable_packages=True, ignore_missing_files=True
        )
    except (CondaPackException, KeyError, TypeError) as error:
        raise NotAnEnvironment(str(prefix), f"conda-pack says: {error}") from error
    return frozenset(file.target for file in found)


def _placeholders(records: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The placeholders that packages recorded."""
    return frozenset(
        str(entry["prefix_placeholder"])
        for record in records
        for entry in _paths(record)
        if "prefix_placeholder" in entry
    )


def _paths(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The paths of a record: those of ``paths_data``, or where an old conda wrote none, of ``files``."""
    recorded = record.get("paths_data", {}).get("paths")
    for path in recorded if recorded is not None else ({"_path": name} for name in record.get("files", [])):
        if path.get("path_type") not in ("pyc_file", "directory") and not path["_path"].endswith(".pyc"):
            yield path


def _owners(records: Sequence[Mapping[str, Any]], files: Mapping[str, Found]) -> dict[str, str]:
    """Path to the name of the record file that owns it. Of two conda packages, the first in order does."""
    owners: dict[str, str] = {}
    for record in records:
        own_record = f"conda-meta/{record['envship-record']}"
        for path in (own_record, *(entry["_path"] for entry in _paths(record))):
            if path in files:
                owners.setdefault(path, record["envship-record"])
    return owners


def _missing(records: Sequence[Mapping[str, Any]], files: Mapping[str, Found]) -> list[str]:
    return [
        f"{record['name']} {record['version']}: {entry['_path']} is missing"
        for record in records
        for entry in _paths(record)
        if entry["_path"] not in files and entry["_path"] not in NOT_CONTENT
    ]


def _missing_of(distributions: Sequence[Distribution], files: Mapping[str, Found]) -> list[str]:
    return [
        f"{distribution.name} {distribution.version} (pip): {path} is missing"
        for distribution in distributions
        for path in distribution.files
        if path not in files
    ]


def _foreign_distributions(
    prefix: Path, site_path: str, files: Mapping[str, Found], owners: Mapping[str, str]
) -> list[Distribution]:
    found = read_distributions(str(prefix / site_path), site_path, files)
    return [distribution for distribution in found if f"{distribution.info}/METADATA" not in owners]


def _take_over(
    prefix: Path,
    records: Sequence[Mapping[str, Any]],
    owners: dict[str, str],
    distributions: Sequence[Distribution],
) -> list[str]:
    """Give files of conda that pip overwrote to pip's package, whose they are now; say which."""
    recorded = {record["envship-record"]: record for record in records}
    faults = []
    for distribution in distributions:
        for path in distribution.files:
            record = recorded.get(owners.get(path, ""))
            if record is None or _is_original(prefix / path, record, path):
                continue
            faults.append(
                f"{record['name']} {record['version']}: {path} was overwritten by {distribution.name} "
                f"{distribution.version} (pip)"
            )
            del owners[path]
    return faults


def _is_original(file: Path, record: Mapping[str, Any], path: str) -> bool:
    entry = next((entry for entry in _paths(record) if entry["_path"] == path), {})
    digest = entry.get("sha256_in_prefix") or entry.get("sha256")
    return digest is not None and file.is_file() and digest_of_file(file) == digest


def _package(
    record: Mapping[str, Any],
    files: Mapping[str, Found],
    owners: Mapping[str, str],
    collector: Collector,
) -> Draft:
    me = record["envship-record"]
    own_record = f"conda-meta/{me}"
    treatment = Rewritten("conda-meta", canonical_conda_meta)
    items: list[Item] = list(collector.item(own_record, *files[own_record], treatment))
    for entry in _paths(record):
        path = entry["_path"]
        if owners.get(path) == me:
            items += collector.item(path, *files[path], _treatment(entry, collector))
    items = list({item.path: item for item in items}.values())
    return Draft(record["name"], str(record["version"]), str(record.get("build", "")), "conda", items)


def _treatment(entry: Mapping[str, Any], collector: Collector) -> Recorded | None:
    digest, mode, placeholder = entry.get("sha256"), entry.get("file_mode"), entry.get("prefix_placeholder")
    if not is_digest(digest) or entry.get("path_type") == "unix_python_entry_point":
        return None
    named = isinstance(placeholder, str) and placeholder.startswith("/") and mode in ("text", "binary")
    relocation = Relocation(str(mode), str(placeholder)) if named else None
    return Recorded(Digest(str(digest)), relocation, collector.own(entry["_path"]))


def _recorded_code(draft: Draft, records: Sequence[Mapping[str, Any]], items: Iterator[Item]) -> list[Item]:
    """*items*, with the digests of byte code that came inside of the package."""
    digests: dict[str, str] = {}
    if draft.kind == "conda":
        record = next(record for record in records if record["name"] == draft.name)
        for entry in record.get("paths_data", {}).get("paths", []):
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
        left_out = _LEFT_OUT.fullmatch(path) is not None or (
            collector.unpacked is not None and collector.unpacked.added(path)
        )
        if path not in owners and not left_out:
            items += collector.item(path, *found)
    return Draft("", "", "", "files", items)


def _environ(prefix: Path) -> dict[str, str]:
    """Variables that ``conda env config vars set`` keeps, and those that packages bring."""
    variables: dict[str, str] = {}
    files = sorted((prefix / "etc" / "conda" / "env_vars.d").glob("*.json"))
    for path in (*files, prefix / "conda-meta" / "state"):
        try:
            content = json.loads(path.read_bytes())
            found = content.get("env_vars", {}) if path.name == "state" else content
            variables.update((str(key), str(value)) for key, value in found.items())
        except (OSError, ValueError, AttributeError):
            continue
    return {key: value for key, value in variables.items() if value != "***unset***"}
