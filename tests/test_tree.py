"""Walks of a prefix that are taken over from an earlier look at it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from envship.scan_index import fingerprint_of
from envship.sources.tree import Root, Trees
from tests.prefixes import settle


def test_an_earlier_walk_is_not_done_again_and_counts_once_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("prefix", "project"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    prefix, project = Root(str(tmp_path / "prefix")), Root(str(tmp_path / "project"))
    earlier = Trees()
    earlier.walk(prefix)
    earlier.walk(project)
    (tmp_path / "prefix" / "later").write_text("later")

    trees = Trees(earlier)
    assert list(trees.walk(prefix)) == ["file"]
    # A project that the prefix no longer names must not make its next pack look at it.
    assert trees.roots == (prefix,)
    assert trees.started_ns == earlier.started_ns
    assert trees.changed() == [str(tmp_path / "prefix" / "later")]


def test_what_is_hidden_of_an_earlier_walk_is_seen_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("file")
    earlier = Trees()
    earlier.walk(root := Root(str(tmp_path)))
    trees = Trees(earlier)
    trees.hide(root, ["file"])
    assert not trees.walk(root)
    assert list(earlier.walk(root)) == ["file"]
    assert trees.fingerprint() == earlier.fingerprint()


def test_folders_with_a_mark_are_passed_over_at_any_depth_but_not_the_root(tmp_path: Path) -> None:
    for name in ("mark", "file", "a/file", "a/b/mark", "a/b/c/file", "d/mark/file", "e/marked"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    root = Root(str(tmp_path), skip_marks=("mark",))
    assert list(Trees().walk(root)) == ["a/file", "e/marked", "file", "mark"]


@pytest.mark.parametrize("change", ["content", "times", "mode", "replaced", "renamed", "added", "removed"])
def test_a_fingerprint_tells_of_every_change(change: str, tmp_path: Path) -> None:
    one, other = tmp_path / "folder" / "one", tmp_path / "folder" / "other"
    one.parent.mkdir()
    one.write_text("one")
    other.write_text("other")
    root = Root(str(tmp_path))

    def look() -> tuple[str, str | None]:
        trees = Trees()
        nodes = trees.walk(root)
        return trees.fingerprint(), fingerprint_of(["folder/one"], nodes)

    settle(tmp_path)
    before, status = look(), one.stat()
    assert look() == before
    if change in ("content", "times"):
        one.write_text("two" if change == "content" else "one")
        if change == "content":
            os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "mode":
        one.chmod(0o600 if status.st_mode & 0o777 != 0o600 else 0o644)
    elif change == "replaced":
        (tmp_path / "new").write_text("one")
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").replace(one)
    elif change == "renamed":
        one.rename(one.with_name("two"))
    elif change == "added":
        one.with_name("two").write_text("")
    else:
        other.unlink()
    whole, of_one = look()
    assert whole != before[0]
    assert (of_one == before[1]) == (change in ("added", "removed"))
    assert (of_one is None) == (change == "renamed")
