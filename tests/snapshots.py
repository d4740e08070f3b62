"""All that lies in a folder, to be compared with what lies there later: what hostile content must not touch."""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HEX = "[0-9a-f]"
ADDED = re.compile(
    rf"(?P<prefix>envs/{HEX}{{16}})(?:/.*)?"
    rf"|chunks/{HEX}{{2}}(?:/{HEX}{{64}}\.(?:zst|zlib|raw))?|manifests/{HEX}{{64}}\.json"
    rf"|(?:ready|inventories|leases)/{HEX}{{64}}|locks/(?:{HEX}{{16}}|collect)\.lock|index(?:/.*)?",
    re.DOTALL,
)
"""Paths in a store that packing, reading a bundle and building may add; nothing stays in ``tmp``."""
GROWING = re.compile(rf"|(?:envs|chunks|chunks/{HEX}{{2}}|manifests|ready|inventories|leases|locks|tmp|index)")
"""Folders of a store that get such paths, and with them another time; the first is the store itself."""


class Node(NamedTuple):
    """A file, folder or link; of a folder that grows no time."""

    mode: int
    links: int
    inode: int
    modified_ns: int
    content: bytes


def snapshot(folder: Path, stores: Collection[Path] = (), without: Collection[str] = ()) -> dict[str, Node]:
    """Everything below *folder* by its path, but for what lies at the paths *without*.

    Parameters
    ----------
    stores
        Stores below *folder* in which others may pack and build meanwhile: see `changes`.
    """
    found: dict[str, Node] = {}
    for path in sorted([folder, *folder.rglob("*")]):
        name = str(path.relative_to(folder))
        if any(name == left_out or name.startswith(left_out + "/") for left_out in without):
            continue
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        grows = any(GROWING.fullmatch(inside) for inside in _inside(path, stores)) or path == folder
        content = path.read_bytes() if is_file else str(path.readlink()).encode() if path.is_symlink() else b""
        links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        found[name] = Node(status.st_mode, links, status.st_ino, 0 if grows else status.st_mtime_ns, content)
    return found


def changes(
    before: dict[str, Node], folder: Path, stores: Collection[Path] = (), without: Collection[str] = ()
) -> list[str]:
    """What is not as it was *before*, but for what a pack or a build adds to one of *stores*.

    Nothing that was there may have changed or gone, the entries of other environments included; what is new must have
    a place in a store that is its own.
    """
    after = snapshot(folder, stores, without)
    found = [f"{name} has gone" for name in before.keys() - after.keys()]
    found += [f"{name} is {after[name]}, was {node}" for name, node in before.items() if after.get(name, node) != node]
    for name in after.keys() - before.keys():
        if not any(_is_added(store, inside, before, folder) for store, inside in _places(folder / name, stores)):
            found.append(f"{name} is new")
    return sorted(found)


@contextmanager
def untouched(folder: Path, *stores: Path, without: Collection[str] = ()) -> Iterator[None]:
    """Fail if, in the end, anything below *folder* has changed but what is added to *stores*; also after an error."""
    before = snapshot(folder, stores, without)
    try:
        yield
    finally:
        found = changes(before, folder, stores, without)
        assert not found, found


def _is_added(store: Path, inside: str, before: dict[str, Node], folder: Path) -> bool:
    match = ADDED.fullmatch(inside)
    if match is None:
        return False
    # In the prefix of an environment that was there before, nothing is anybody's own.
    return match["prefix"] is None or str((store / match["prefix"]).relative_to(folder)) not in before


def _inside(path: Path, stores: Collection[Path]) -> list[str]:
    return ["" if inside == "." else inside for _, inside in _places(path, stores)]


def _places(path: Path, stores: Collection[Path]) -> list[tuple[Path, str]]:
    return [(store, str(path.relative_to(store))) for store in stores if path == store or store in path.parents]
