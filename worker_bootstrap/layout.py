"""Where things lie in a store: the only way from an id to a path.

::

    <store>/VERSION  host-id
            chunks/ab/ab12….zst|.zlib|.raw   immutable, named by the hash of the uncompressed content
            manifests/<environment id>.json
            envs/<first 16 hex>/             the built prefix
            ready/<environment id>           written last: without it, the prefix is not built
            inventories/<environment id>     the names in the prefix, for a quick check of it
            carried/<digest>/                the code that travels with the plugins
            leases/  locks/  tmp/

Does no I/O. See `worker_bootstrap.store` for what reads and writes these places.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from worker_bootstrap.digest import Digest, EnvironmentId, is_digest

STORE_VERSION = "1"
WRITTEN_AT_NS = 1_000_000_000 * 10**9
"""When every file and folder of a built environment was modified (9 September 2001); an edit gives another time."""
SHORT_ID_LENGTH = 16
"""Hex digits of an environment id in the path of its prefix: shebangs end at 127 bytes, conda's placeholder at 255."""


class Layout(NamedTuple):
    """The paths of one store.

    Every method checks the id that it is given and raises `ValueError` for any other text.
    """

    root: Path

    @property
    def version(self) -> Path:
        return self.root / "VERSION"

    @property
    def host_id(self) -> Path:
        return self.root / "host-id"

    @property
    def chunks(self) -> Path:
        return self.root / "chunks"

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def envs(self) -> Path:
        return self.root / "envs"

    @property
    def ready_marks(self) -> Path:
        return self.root / "ready"

    @property
    def inventories(self) -> Path:
        return self.root / "inventories"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that a writable store has."""
        built = (self.envs, self.ready_marks, self.inventories)
        return (self.chunks, self.manifests, *built, self.leases, self.locks, self.tmp)

    @property
    def later_folders(self) -> tuple[Path, ...]:
        """Folders that are made when there is something to put in."""
        return (self.root / "carried", self.root / "index")

    @property
    def collect_lock(self) -> Path:
        """Shared by whoever adds chunks before their manifest; exclusive for whoever removes chunks without one."""
        return self.locks / "collect.lock"

    def chunk(self, digest: Digest, suffix: str) -> Path:
        """Path of a chunk stored with the codec whose file suffix is *suffix* (``.zst``, ``.zlib``, ``.raw``)."""
        return Path(self.chunk_name(digest, suffix))

    def chunk_name(self, digest: Digest, suffix: str) -> str:
        """The same as text, for who asks for thousands."""
        name = _checked(digest)
        return f"{self.root}/chunks/{name[:2]}/{name}{suffix}"

    def manifest(self, environment_id: EnvironmentId) -> Path:
        return self.manifests / (_checked(environment_id) + ".json")

    def prefix(self, environment_id: EnvironmentId) -> Path:
        """Where an environment is built."""
        return self.envs / _checked(environment_id)[:SHORT_ID_LENGTH]

    def ready(self, environment_id: EnvironmentId) -> Path:
        return self.ready_marks / _checked(environment_id)

    def inventory(self, environment_id: EnvironmentId) -> Path:
        return self.inventories / _checked(environment_id)

    def lock(self, environment_id: EnvironmentId) -> Path:
        """The lock that whoever builds or evicts this environment holds."""
        return self.locks / (_checked(environment_id)[:SHORT_ID_LENGTH] + ".lock")

    def lease(self, environment_id: EnvironmentId) -> Path:
        """The file that every process running from this environment holds a shared lock on."""
        return self.leases / _checked(environment_id)

    def carried(self, digest: Digest) -> Path:
        """Folder of the carried code with this digest."""
        return self.root / "carried" / _checked(digest)[:SHORT_ID_LENGTH]


def _checked(name: str) -> str:
    if not is_digest(name):
        raise ValueError(f"not a SHA-256 in lower-case hexadecimal: {name!r}")
    return name
