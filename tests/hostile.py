"""Listings that would do harm, and a store in which harm would show: another environment in it, files beside it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.environments import Content, environment_of, tiny_environment
from tests.snapshots import untouched
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.manifest import Chunk, Link, Package
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

E = digest_of(b"")
SECRET = b"nobody else's business"
"""What a file has that lies beside the store."""

NEIGHBOUR: dict[str, Content] = {
    "bin/theirs*": b"#!/bin/sh\n",
    "lib/theirs": b"theirs",
    "lib/also": Link("lib/also", "theirs"),
}
"""What another environment in the store holds: files that no test has as well, so that none are shared."""

OUT: dict[str, tuple[str, list[list[Any]]]] = {
    "file": ("outside/new", [["f", "../../../outside/new", 0, E, 0]]),
    "file from the middle": ("outside/new", [["f", "a/../../../../outside/new", 0, E, 0]]),
    "file in a new folder": ("outside/folder/new", [["f", "../../../outside/folder/new", 0, E, 0]]),
    "folder": ("outside/new", [["d", "../../../outside/new"]]),
    "link": ("outside/new", [["l", "../../../outside/new", "secret"]]),
    "hard link": ("outside/secret", [["h", "a", "../../../outside/secret"]]),
    "hard link there": ("outside/new", [["f", "a", 0, E, 0], ["h", "../../../outside/new", "a"]]),
    "file among builds": ("store/tmp/new", [["f", "../new", 0, E, 0]]),
    "file of the store": ("store/new", [["f", "../../new", 0, E, 0]]),
    "another environment's file": ("store/envs/{}/lib/new", [["f", "../../envs/{}/lib/new", 0, E, 0]]),
    "another environment's hard link": ("store/envs/{}/lib/theirs", [["h", "a", "../../envs/{}/lib/theirs"]]),
    "a mark of one that is not built": ("store/ready/new", [["f", "../../ready/new", 0, E, 0]]),
}
"""What would be touched below the folder that the store lies in, and the listing that would do it if nobody looked.

An environment is written in ``store/tmp/build-…``: one level up are other builds, two the store, three its folder.
``{}`` stands for the name of the other environment's prefix: see `aimed`.
"""


def add_surroundings(folder: Path, store: Store) -> Path:
    """A folder beside *store* with a file worth having (returned), and another environment, built in *store*."""
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    (outside / "secret").chmod(0o600)
    materialise(store, tiny_environment(store, NEIGHBOUR))
    return outside


@contextmanager
def surrounded(folder: Path, store: Store, without: Collection[str] = ("mount", "staged")) -> Iterator[Path]:
    """`add_surroundings`; fail if in the end anything has changed but what environments add to *store*.

    Nothing is said of what lies at *without*: by default where tests put stores of their own.
    """
    outside = add_surroundings(folder, store)
    with untouched(folder, store.layout.root, without=without):
        yield outside


def aimed(store: Store, value: Any) -> Any:
    """*value*, of texts and lists, with the name of the prefix that is built in *store* for ``{}``."""
    (prefix,) = store.layout.envs.iterdir()
    return json.loads(json.dumps(value).replace("{}", prefix.name))


def packed(store: Store, rows: Any, content: bytes = b"", chunks: list[Chunk] | None = None) -> EnvironmentId:
    """An environment whose listing holds *rows*, as they are."""
    raw = json.dumps(rows, separators=(",", ":"), sort_keys=True).encode()
    listing = Chunk(store.write_chunk(raw), len(raw))
    if chunks is None:
        chunks = [Chunk(store.write_chunk(content), len(content))] if content else []
    return environment_of(store, [Package("evil", "1", "0", "files", listing, tuple(chunks))]).id
