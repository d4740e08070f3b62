"""Prefixes that a conda environment had before, and that its files still name.

One that was renamed, or packed by conda-pack for another place (``dest_prefix``), has no script that says which they
are. But of a text file, conda recorded the placeholder and the digest of the original: a path in it was the prefix, if
the placeholder in its place gives the original back. Of each package that has such files, the smallest is looked at:
packages may have been installed before and after a move.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from envship.canonical import SYSTEM_PREFIXES, Own, Recorded
from envship.sources.tree import Found
from worker_bootstrap.digest import Digest, digest_of, is_digest
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import restore

_LIMIT_BYTES = 256 << 10
_SEARCHED_BYTES = 64 << 10
"""So much of a file is searched for paths."""
_CANDIDATES = 500
"""So many paths of a file are tried, the most frequent first."""

_PATH = re.compile(rb"(?:\A|[^\w./-]|-[A-Za-z])(?=(/[^\0\n\"'`:;,=<>|]{1,512}))")
"""A path, and what may follow it up to the end of a text in quotes: there are spaces in names."""
_END = re.compile(rb"/|[ \t\r)}\]]|\Z")
"""Where a prefix may end in that."""


class _Sample(NamedTuple):
    """A text file that a package recorded, and what it was in the package."""

    path: str
    origin: str
    size_bytes: int
    digest: Digest
    relocation: Relocation


def former_prefixes(
    records: Iterable[Mapping[str, Any]], files: Mapping[str, Found], known: Sequence[str]
) -> list[str]:
    """The prefixes besides those *known* that *files*, by path, name in the place of a placeholder of *records*.

    What gives back no original is a changed file, and says nothing.
    """
    found = list(dict.fromkeys(known))
    for record in records:
        sample = min(_samples(record, files), key=_preference, default=None)
        if sample is None:
            continue
        # A file that is gone by now, the pack will tell of.
        with contextlib.suppress(OSError):
            data = Path(sample.origin).read_bytes()
            if not _fits(data, sample, found):
                found += itertools.islice(_former(data, sample), 1)
    return found[len(dict.fromkeys(known)) :]


def _samples(record: Mapping[str, Any], files: Mapping[str, Found]) -> Iterator[_Sample]:
    for entry in record["envship-paths"]:
        if entry.get("file_mode") != "text" or entry.get("path_type", "hardlink") != "hardlink":
            continue
        path, digest, placeholder = entry["_path"], entry.get("sha256"), entry.get("prefix_placeholder")
        if path in files and is_digest(digest) and isinstance(placeholder, str) and placeholder.startswith("/"):
            origin, node = files[path]
            if node.st_size <= _LIMIT_BYTES:
                yield _Sample(path, origin, node.st_size, Digest(digest), Relocation("text", placeholder))


def _preference(sample: _Sample) -> tuple[bool, int, str]:
    # A script may have lost the prefix, with which its first line was too long.
    return sample.path.startswith("bin/"), sample.size_bytes, sample.path


def _fits(data: bytes, sample: _Sample, prefixes: Sequence[str]) -> bool:
    content = Recorded(sample.digest, sample.relocation, Own(tuple(prefixes)))(data)
    return content.digest == sample.digest


def _former(data: bytes, sample: _Sample) -> Iterator[str]:
    """The paths in *data* that stand where the placeholder stood: one, if any."""
    for candidate in _candidates(data):
        if digest_of(restore(data, sample.relocation, candidate)) == sample.digest:
            yield candidate


def _candidates(data: bytes) -> Iterator[str]:
    paths = Counter(
        os.fsdecode(text[: end.start()])
        for text in _PATH.findall(data[:_SEARCHED_BYTES])
        for end in _END.finditer(text, 1)
        if end.start() > 1
    )
    ranked = (path for path, _ in paths.most_common() if path not in SYSTEM_PREFIXES)
    yield from itertools.islice(ranked, _CANDIDATES)
