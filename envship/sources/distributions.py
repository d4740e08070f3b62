"""Packages that pip, uv or another installer put into site-packages: one ``dist-info`` folder each.

Source: PyPA specifications "Recording installed projects" (RECORD, INSTALLER, REQUESTED) and "Recording the direct
URL origin". See also `envship.sources.conda` for packages that conda owns.
"""

from __future__ import annotations

import csv
import email.parser
import io
import json
import os
import re
from collections.abc import Container, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from envship.errors import SourceProblems

MACHINE_BOUND = frozenset(("REQUESTED", "uv_cache.json", "uv_build.json"))
"""Files of a dist-info folder that say how and when it was installed here, nothing about what it is."""


_UNREADABLE = "Repair the package: pip install --force-reinstall NAME."


class Distribution(NamedTuple):
    """An installed package.

    *info* is the path of its ``dist-info`` folder in the prefix, *files* the paths in the prefix that its RECORD lists
    (byte code left out); *editable* the path of a source tree that it merely links to.
    """

    name: str
    version: str
    info: str
    files: tuple[str, ...]
    editable: str | None


def read_distributions(site_folder: str, site_path: str, files: Iterable[str]) -> list[Distribution]:
    """The distributions in *site_folder*, which lies at *site_path* in the environment with these *files*.

    Raises
    ------
    SourceProblems
        If the metadata of one cannot be read.
    """
    found = []
    for path in files:
        folder, _, name = path.rpartition("/")
        if name == "METADATA" and folder.endswith(".dist-info") and os.path.dirname(folder) == site_path:
            try:
                found.append(_read(site_folder, site_path, os.path.basename(folder)))
            except (OSError, csv.Error) as error:
                raise SourceProblems(site_folder, [f"{folder} cannot be read: {error}"], _UNREADABLE) from error
    return sorted(found)


def is_byte_code(path: str, paths: Container[str]) -> bool:
    """Whether the file at *path* follows from another one among *paths*; a module without source does not."""
    return path.endswith(".pyc") and ("__pycache__/" in path or path[:-1] in paths)


def canonical_name(name: str) -> str:
    """The normalised name of a package. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def canonical_record(data: bytes) -> bytes:
    """RECORD without what depends on prefix, machine or installer: byte code, hashes of scripts, order of lines.

    pip finds byte code without RECORD when it uninstalls.
    """
    rows = []
    read = list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))
    recorded = {row[0] for row in read if row}
    for row in read:
        if not row or is_byte_code(row[0], recorded) or PurePosixPath(row[0]).name in MACHINE_BOUND:
            continue
        path = row[0]
        folder, _, name = path.rpartition("/")
        in_info = folder.endswith(".dist-info") and name in ("RECORD", "INSTALLER", "direct_url.json")
        # Links to projects name the place where these lie.
        is_link = path.endswith(".pth") or ("/" not in path and "editable" in name)
        if in_info or is_link or path.startswith("../") or os.path.isabs(path):
            row = [path, "", ""]
        rows.append(row)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(sorted(rows))
    return text.getvalue().encode("utf-8", "surrogateescape")


def canonical_installer(data: bytes) -> bytes:
    """INSTALLER, the same for every installer that keeps a RECORD: uv's packages are pip's to uninstall."""
    return b"pip\n"


def canonical_direct_url(data: bytes) -> bytes:
    """``direct_url.json`` without paths of this machine.

    Nor has it the digest of a local archive, which has another one each time that it is built from the same source.
    """
    try:
        record = json.loads(data)
        if isinstance(record, dict) and str(record.get("url", "")).startswith("file:"):
            kind = next((kind for kind in ("dir_info", "vcs_info") if kind in record), "archive_info")
            # A checkout is named by its commit, wherever it lay.
            kept = {key: value for key, value in record.get(kind, {}).items() if key in ("vcs", "commit_id")}
            record = {"url": "file:///", kind: kept}
    except (ValueError, AttributeError):
        return data
    return json.dumps(record, sort_keys=True).encode()


def _read(site_folder: str, site_path: str, folder: str) -> Distribution:
    where = os.path.join(site_folder, folder)
    with open(os.path.join(where, "METADATA"), encoding="utf-8", errors="surrogateescape") as file:
        metadata = email.parser.HeaderParser().parse(file)
    name, _, version = folder[: -len(".dist-info")].partition("-")
    return Distribution(
        canonical_name(metadata["Name"] or name),
        metadata["Version"] or version,
        f"{site_path}/{folder}",
        tuple(_recorded(where, site_folder, site_path)),
        _editable(where),
    )


def _recorded(where: str, site_folder: str, site_path: str) -> list[str]:
    try:
        with open(os.path.join(where, "RECORD"), encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        return []
    recorded = {row[0] for row in rows if row}
    depth = len(PurePosixPath(site_path).parts)
    prefix = os.path.normpath(os.path.join(site_folder, *[".."] * depth))
    paths = []
    for row in rows:
        if not row or is_byte_code(row[0], recorded):
            continue
        if os.path.isabs(row[0]):
            path = os.path.relpath(row[0], prefix)
        else:
            path = os.path.normpath(os.path.join(site_path, row[0]))
        if path not in (".", "..") and not path.startswith("../") and "\0" not in path:
            paths.append(path)
    return paths


def _editable(where: str) -> str | None:
    try:
        with open(os.path.join(where, "direct_url.json"), encoding="utf-8") as file:
            record = json.load(file)
        is_editable = record.get("dir_info", {}).get("editable") is True
        return str(record.get("url", "")) if is_editable else None
    except (OSError, ValueError, AttributeError):
        return None
