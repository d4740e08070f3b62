"""What is different between two environments, and what would travel."""

from __future__ import annotations

from pathlib import Path

from envship.difference import FileChange
from envship.environment import Environment
from worker_bootstrap.manifest_delta import delta_of
from worker_bootstrap.store import Store

from .environments import environment_of, package_of


def test_what_differs_is_named_by_package_and_file_and_counted_once(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path / "mine"), Store(tmp_path / "theirs")
    shared = {"lib/same": b"s" * 1000, "lib/edited": b"a" * 1000, "lib/gone": b"g" * 10}
    old = Environment(
        environment_of(mine, [package_of(mine, shared, "pkg", "1"), package_of(mine, {"b": b"1"}, "only-old")]), mine
    )
    changed = {"lib/same": b"s" * 1000, "lib/edited": b"b" * 500 + b"a" * 500, "lib/new": b"n" * 300}
    packages = [
        package_of(theirs, changed, "pkg", "2"),
        package_of(theirs, {"c": b"n" * 300}, "only-new"),
    ]
    new = Environment(environment_of(theirs, packages, {"MINE": "1"}), theirs)
    found = old.diff(new)
    assert {(change.name, change.kind) for change in found.packages} == {
        ("pkg", "changed"),
        ("only-old", "removed"),
        ("only-new", "added"),
    }
    (pkg,) = (change for change in found.packages if change.name == "pkg")
    assert (pkg.old_version, pkg.new_version) == ("1 0", "2 0")
    assert pkg.files == (
        FileChange("lib/edited", "changed", 1000, 1000),
        FileChange("lib/gone", "removed", 10, 0),
        FileChange("lib/new", "added", 0, 300),
    )
    assert pkg.new_bytes == 1300
    assert found.settings == {"variable MINE": ("", "1")}
    missing = [digest for digest in new.chunks if digest not in old.chunks]
    assert found.ship_chunks == len(missing)
    assert found.ship_bytes == sum(len(theirs.read_encoded(digest, ["zstd"])[1]) for digest in missing)
    assert found.ship_uncompressed_bytes == sum(new.chunks[digest] for digest in missing)
    assert sum(change.ship_bytes for change in found.packages) == found.ship_bytes
    assert found.manifest_bytes == len(delta_of(new.manifest, [old.manifest])) > 100


def test_an_environment_does_not_differ_from_itself(store: Store) -> None:
    environment = Environment(environment_of(store, [package_of(store, {"a": b"1"})]), store)
    found = environment.diff(environment)
    assert found.is_empty
    assert (found.packages, found.ship_bytes, found.ship_chunks, found.manifest_bytes) == ((), 0, 0, 0)
