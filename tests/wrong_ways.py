"""Wrong ways to do what `tests.killing` does: who is killed in the middle of one leaves something by halves.

They show that the look at what is left finds it. Each is put in place in a process that is to end, and comes to the
same end as the right way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from envship import bundle, scan_index
from envship.scan_index import Known, ScanIndex
from envship.sources.tree import Trees
from worker_bootstrap import donor, evict, materialise, ready_mark, repair, soundness, store
from worker_bootstrap.blueprint import draw, read_listings
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.donor import Donors, seal
from worker_bootstrap.lock import Lease
from worker_bootstrap.manifest import File, Manifest
from worker_bootstrap.store import Store
from worker_bootstrap.writer import Work, Writer


def mark_before_building() -> None:
    """The ready mark first, then the files, where they are to lie."""

    def build(store: Store, environment_id: EnvironmentId, link_mode: str, work: Work) -> Path:
        layout = store.layout
        prefix = layout.prefix(environment_id)
        manifest = store.read_manifest(environment_id)
        listings = read_listings(manifest, store.read_chunk)
        blueprint = draw(manifest, listings, str(prefix))
        prefix.mkdir()
        ready_mark.write(layout.ready(environment_id), prefix, layout.tmp, durable=False)
        donors = Donors(donor.find(store, manifest, listings, donor.built(store, manifest)), link_mode)
        Writer(store, blueprint, donors, str(prefix), str(prefix), work).write(lambda: None)
        soundness.seal(layout, environment_id, blueprint, {}, str(prefix))
        return prefix

    materialise._build = build


def remove_before_unmarking() -> None:
    """The files of an environment first, then its ready mark."""
    take = evict._take

    def remove(store: Store, environment_id: EnvironmentId, lease: Lease) -> Path | None:
        shutil.rmtree(store.layout.prefix(environment_id))
        return take(store, environment_id, lease)

    evict._take = remove


def publish_in_place() -> None:
    """Chunks, manifests, marks and indexes where they are to lie, and no rename."""

    def publish(path: Path, data: bytes | memoryview, tmp: Path, *, sync: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_in_parts(path, data)

    for module in (store, ready_mark, soundness, scan_index):
        module.publish = publish


def overwrite_the_bundle() -> None:
    """The new bundle where the old one lies."""

    def write_bundle(manifest: Manifest, store: Store, path: Path) -> None:
        with open(path, "wb") as file:
            bundle._write(file, manifest, store)

    bundle.write_bundle = write_bundle


def mend_in_place() -> None:
    """A file where it lies, and at each moment with the time of one that is whole."""

    def write(self: repair._Mender, file: File, content: bytes) -> None:
        _write_in_parts(self._prefix / file.path, content, lambda handle: seal(handle, file))

    repair._Mender._write = write


def write_the_manifest_before_the_chunks() -> None:
    """A pack whose manifest is there while one of the chunks that it names is not."""
    write, save = Store.write_manifest, ScanIndex.save
    held: dict[Path, bytes] = {}

    def write_manifest(self: Store, manifest: Manifest) -> EnvironmentId:
        path, _ = next(self._candidates(manifest.packages[0].chunks[0].digest))
        held[path] = path.read_bytes()
        path.unlink()
        return write(self, manifest)

    def save_and_write(self: ScanIndex, trees: Trees, environment_id: EnvironmentId, known: Known) -> None:
        save(self, trees, environment_id, known)
        for path, data in held.items():
            path.write_bytes(data)

    Store.write_manifest = write_manifest
    ScanIndex.save = save_and_write


def _write_in_parts(path: Path, data: bytes | memoryview, after_each: Callable[[int], None] = lambda _: None) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    step = len(data) // 8 + 1
    for start in range(0, len(data), step):
        os.write(handle, data[start : start + step])
        after_each(handle)
    os.close(handle)


WRONG_WAYS: dict[str, Callable[[], None]] = {
    "mark before building": mark_before_building,
    "remove before unmarking": remove_before_unmarking,
    "publish in place": publish_in_place,
    "overwrite the bundle": overwrite_the_bundle,
    "mend in place": mend_in_place,
    "write the manifest before the chunks": write_the_manifest_before_the_chunks,
}
