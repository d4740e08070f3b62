"""What is in a store by halves: everything there is either whole or does not count."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from worker_bootstrap.digest import EnvironmentId, is_digest
from worker_bootstrap.errors import ChunkMissing, EnvshipError
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.stock import chunk_files
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files


def halves(store: Store, damaged: Collection[EnvironmentId] = ()) -> Iterator[str]:
    """Read every chunk, every manifest, and every file of what counts as built; one line for each that is not whole.

    Of environments that were *damaged* before, it is enough that the quick look says so.
    """
    for digest, entry in list(chunk_files(store.layout)):
        with contextlib.suppress(ChunkMissing):
            store.read_chunk(digest)
        if not os.path.exists(entry.path):
            yield f"chunk {digest} is damaged"
    for environment_id in store.environments():
        try:
            store.read_manifest(environment_id)
        except EnvshipError as error:
            yield repr(error)
    for name in sorted(filter(is_digest, os.listdir(store.layout.ready_marks))):
        environment_id = EnvironmentId(name)
        look = sound_prefix if environment_id in damaged else Store.built
        if look(store, environment_id) is None:
            continue
        try:
            yield from (f"{name[:16]}: {each}" for each in damaged_files(store, environment_id))
        except (EnvshipError, OSError) as error:
            yield f"{name[:16]} counts as built, but: {error!r}"
