"""What `tests.hostile.surrounded` watches is watched: harm that is done shows, what builds do by right does not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests.environments import tiny_environment
from tests.hostile import OUT, add_surroundings, aimed, packed
from tests.snapshots import changes, snapshot, untouched
from worker_bootstrap import blueprint, manifest, writer
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store


def credulous(patch: pytest.MonkeyPatch) -> None:
    """Take the checks of paths, links and hard links out, and let the build use folders that are there."""
    mkdir = os.mkdir

    def make(path: str, *mode: int, **handle: int) -> None:
        with suppress(*() if mode else [FileExistsError]):  # who gives a mode (`tempfile`) wants to know
            mkdir(path, *mode, **handle)

    patch.setattr(manifest, "check_path", lambda path: path)
    patch.setattr(manifest, "check_link", lambda path, target: target)
    patch.setattr(manifest, "_check_order", lambda entries: None)
    patch.setattr(blueprint, "_escapes", lambda links: [])
    patch.setattr(writer.os, "mkdir", make)


@pytest.mark.parametrize("name", OUT)
def test_whatever_would_leave_the_prefix_does_so_where_nobody_looks_and_is_seen(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """So each of these listings reaches what it aims at, and only the checks that were taken out stand before it."""
    add_surroundings(tmp_path, store)
    touched, rows = aimed(store, OUT[name])
    before = snapshot(tmp_path, [store.layout.root])
    environment_id = packed(store, rows)
    with monkeypatch.context() as patch:
        credulous(patch)
        with suppress(EnvshipError):
            materialise(store, environment_id)
    found = changes(before, tmp_path, [store.layout.root])
    assert [line for line in found if line.startswith(touched + " ")], found


def test_what_a_pack_and_a_build_add_is_no_change(tmp_path: Path, store: Store) -> None:
    add_surroundings(tmp_path, store)
    with untouched(tmp_path, store.layout.root):
        materialise(store, tiny_environment(store))
        store.write_chunk(b"chunk")


@pytest.mark.parametrize("what", ["content", "mode", "name", "time", "link", "gone", "kind"])
@pytest.mark.parametrize("name", ["outside/secret", "store/host-id", "store/envs/{}/lib/theirs", "store/ready"])
def test_any_change_of_what_was_there_is_seen(tmp_path: Path, store: Store, name: str, what: str) -> None:
    add_surroundings(tmp_path, store)
    path = tmp_path / aimed(store, name)
    if path.is_dir():
        (path,) = path.iterdir()
    before = snapshot(tmp_path, [store.layout.root])
    if what == "content":
        path.write_bytes(b"other")
    elif what == "mode":
        path.chmod(0o777)
    elif what == "name":
        path.with_name("another").write_bytes(b"")
    elif what == "time":
        os.utime(path, (1, 1))
    elif what == "link":
        os.link(path, tmp_path / "outside/link")
    else:
        path.unlink()
        if what == "kind":
            path.symlink_to("elsewhere")
    assert changes(before, tmp_path, [store.layout.root])
