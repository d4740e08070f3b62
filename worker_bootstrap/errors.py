"""The errors of envship, one tree; those of packing and exporting are in `envship.errors`.

::

    EnvshipError
    ├── ContentError                 bytes are not what their name or format says
    │   ├── ChunkInvalid             a chunk's bytes do not match its digest
    │   ├── ManifestInvalid          a manifest or listing breaks the format
    │   └── BundleInvalid            a bundle breaks the format
    ├── StoreError                   the store cannot be used
    │   ├── StoreUntrusted           somebody else could write to it
    │   ├── StoreFull                no room left on its file system
    │   ├── StoreBusy                somebody else holds a lock for too long
    │   ├── ChunkMissing             a chunk is not there (any more)
    │   └── EnvironmentMissing       no manifest under this environment id
    ├── ProcessLimitReached          the system lets nobody start another process here
    ├── MaterialiseError             the prefix cannot be built
    │   └── PrefixTooLong            a placeholder is shorter than the new prefix
    ├── StartError                   the new interpreter did not get ready
    ├── TransferError                a peer did not deliver (worth a retry with another one)
    │   └── ProtocolBroken           it sent something else than was asked for
    ├── SchedulerLost                the scheduler cannot be reached any more
    ├── SettingInvalid               a value in Dask's configuration is not usable
    ├── NotSwappable                 this cluster, or a process of it, cannot be swapped
    ├── IncompatibleEnvironment      platform or versions unlike the client's or the cluster's
    └── SwapError                    a swap was given up; holds a cause for each host
        ├── PrepareFailed            before anything was touched
        └── CommitFailed             afterwards; the cluster was moved back

Every error is built from its fields, survives pickling, and says what, where, expected against actual, and what to do.
``retryable`` tells whether the same call may succeed later without anybody changing anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EnvshipError(Exception):
    """Base of all errors that envship raises on purpose.

    Subclasses name their fields in `fields`; the constructor takes them by position or keyword, and `describe` turns
    them into the message. Fields must be picklable.
    """

    fields: Sequence[str] = ("message",)
    retryable = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.fields, args))
        given.update(kwargs)
        unknown = set(given) - set(self.fields)
        if unknown or len(args) > len(self.fields):
            raise TypeError(f"{type(self).__name__} takes the fields {self.fields}, not {sorted(unknown) or args!r}")
        self.values = tuple(given.get(name) for name in self.fields)
        for name, value in zip(self.fields, self.values):
            setattr(self, name, value)
        super().__init__(*self.values)

    def describe(self) -> str:
        """The message, built from the fields."""
        return str(self.values[0])

    def __str__(self) -> str:
        return self.describe()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self.values, {"retryable": self.retryable})


class ContentError(EnvshipError):
    """Bytes are not what their name or their format says."""


class ChunkInvalid(ContentError):
    """A chunk's bytes do not match its digest. Worth fetching again from somewhere else."""

    fields = ("digest", "actual", "where")
    retryable = True
    digest: str
    actual: str
    where: str

    def describe(self) -> str:
        return f"chunk {self.digest} from {self.where} is damaged: {self.actual}. Fetch it again from another source."


class ManifestInvalid(ContentError):
    """A manifest or a listing breaks the format, or does not match its id."""

    fields = ("reason", "where")
    reason: str
    where: str

    def describe(self) -> str:
        at = f" ({self.where})" if self.where else ""
        return f"the manifest is not valid{at}: {self.reason}. Pack the environment again."


class BundleInvalid(ContentError):
    """A bundle file breaks the format."""

    fields = ("path", "reason")
    path: str
    reason: str

    def describe(self) -> str:
        return f"{self.path} is not a usable bundle: {self.reason}. Copy it again, or save the environment again."


class StoreError(EnvshipError):
    """The store cannot be used for what was asked."""


class StoreUntrusted(StoreError):
    """Another user could write to the store, so nothing in it can be trusted."""

    fields = ("path", "reason")
    path: str
    reason: str

    def describe(self) -> str:
        return (
            f"the store {self.path} is refused: {self.reason}. Use a folder that only you can write to "
            "(set ENVSHIP_STORE, or envship.store in Dask's configuration)."
        )


class StoreFull(StoreError):
    """The file system of the store is full. Worth a retry when there is room."""

    fields = ("path", "needed_bytes", "free_bytes")
    retryable = True
    path: str
    needed_bytes: int
    free_bytes: int

    def describe(self) -> str:
        needed = f"{self.needed_bytes / 1e6:.0f} MB needed, " if self.needed_bytes else ""
        free = f"{self.free_bytes / 1e6:.0f} MB free" if self.free_bytes is not None else "no space or inodes left"
        return (
            f"not enough room in {self.path}: {needed}{free}. Run `envship gc`, or put the store on a larger file "
            "system (ENVSHIP_STORE)."
        )


class StoreBusy(StoreError):
    """Somebody else held a lock of the store for too long. Worth a retry."""

    fields = ("path", "timeout_s", "holder")
    retryable = True
    path: str
    timeout_s: float
    holder: str

    def describe(self) -> str:
        return (
            f"{self.path} has been locked by {self.holder} for {self.timeout_s:.0f} s: it builds or evicts that "
            "environment. Try again when it is done; ending that process frees the lock."
        )


class ChunkMissing(StoreError):
    """A chunk is not in the store (or has just been evicted). Worth fetching again."""

    fields = ("digest", "where")
    retryable = True
    digest: str
    where: str

    def describe(self) -> str:
        return f"chunk {self.digest} is not in {self.where}"


class EnvironmentMissing(StoreError):
    """No manifest under this environment id."""

    fields = ("environment_id", "where")
    environment_id: str
    where: str

    def describe(self) -> str:
        return f"environment {self.environment_id} is not in {self.where}. Pack it, or load its bundle."


class ProcessLimitReached(EnvshipError):
    """The system does not let this user start another process or thread. Worth a retry when others have ended."""

    fields = ("host", "reason")
    retryable = True
    host: str
    reason: str

    def describe(self) -> str:
        return (
            f"no further process or thread can be started on {self.host}: {self.reason}. End what you do not need "
            "there, or have the limit raised (`ulimit -u`; for a container, that of its processes)."
        )


class MaterialiseError(EnvshipError):
    """The prefix of an environment cannot be built."""

    fields: Sequence[str] = ("environment_id", "path", "reason")
    environment_id: str
    path: str
    reason: str

    def describe(self) -> str:
        at = f" at {self.path!r}" if self.path else ""
        return f"environment {str(self.environment_id)[:16]} cannot be built{at}: {self.reason}"


class PrefixTooLong(MaterialiseError):
    """The new prefix does not fit into the space that a binary file reserves for it."""

    fields = ("environment_id", "path", "prefix", "room_bytes")
    prefix: str
    room_bytes: int

    def describe(self) -> str:
        return (
            f"environment {str(self.environment_id)[:16]} cannot be built at {self.prefix}: {self.path!r} has room for "
            f"{self.room_bytes} bytes, the path has {len(self.prefix.encode())}. Use a store with a shorter path "
            "(ENVSHIP_STORE)."
        )


class StartError(EnvshipError):
    """The interpreter of an environment did not start, or did not get ready."""

    fields = ("environment_id", "prefix", "reason", "output")
    environment_id: str
    prefix: str
    reason: str
    output: str

    def describe(self) -> str:
        tail = "\n".join(f"    {line}" for line in (self.output or "").strip().splitlines()[-8:])
        name = f"environment {self.environment_id[:16]}" if self.environment_id else "the base environment"
        return f"{name} does not start from {self.prefix}: {self.reason}" + (f"\n{tail}" if tail else "")


class TransferError(EnvshipError):
    """A peer did not deliver what was asked for. Worth a retry with another one."""

    fields = ("peer", "reason")
    retryable = True
    peer: str
    reason: str

    def describe(self) -> str:
        return f"{self.peer} did not deliver: {self.reason}"


class ProtocolBroken(TransferError):
    """A peer sent something else than was asked for: it is not to be trusted."""


class SchedulerLost(EnvshipError):
    """The scheduler cannot be reached any more, and what it was asked for is not known to be done."""

    fields = ("address", "reason")
    address: str
    reason: str

    def describe(self) -> str:
        return (
            f"the scheduler {self.address} cannot be reached any more: {self.reason}. Its log may say why. Connect a "
            "new client when one runs, and call again; hosts keep what they have fetched and built."
        )


class SettingInvalid(EnvshipError):
    """A setting in Dask's configuration has a value that cannot be used."""

    fields = ("setting", "value", "expected")
    setting: str
    value: Any
    expected: str

    def describe(self) -> str:
        variable = "DASK_ENVSHIP__" + self.setting.replace(".", "__").replace("-", "_").upper()
        return (
            f"envship.{self.setting} is {self.value!r} in Dask's configuration: expected {self.expected}. Correct it "
            f"in ~/.config/dask, in {variable}, or where dask.config.set sets it."
        )


class NotSwappable(EnvshipError):
    """This cluster, or one of its processes, cannot be moved to another environment."""

    fields = ("where", "reason", "remedy")
    where: str
    reason: str
    remedy: str

    def describe(self) -> str:
        return f"{self.where} cannot be moved to another environment: {self.reason}. {self.remedy}"


class IncompatibleEnvironment(EnvshipError):
    """Platform or versions of the environment do not fit. ``mismatches`` are (what, expected, actual)."""

    fields = ("environment_id", "mismatches", "remedy")
    environment_id: str
    mismatches: Sequence[tuple[str, str, str]]
    remedy: str

    def describe(self) -> str:
        lines = "; ".join(f"{what}: expected {want}, found {have}" for what, want, have in self.mismatches)
        return f"environment {str(self.environment_id)[:16]} does not fit: {lines}. {self.remedy}"


class SwapError(EnvshipError):
    """A swap was given up. ``causes`` maps each host or process to what went wrong there."""

    fields: Sequence[str] = ("environment_id", "causes")
    environment_id: str
    causes: dict[str, str]
    outcome = "the cluster is as it was"
    remedy = ""

    def describe(self) -> str:
        name = f"environment {str(self.environment_id)[:16]}" if self.environment_id else "the base environment"
        lines = "\n".join(f"  {host}: {cause}" for host, cause in sorted((self.causes or {}).items()))
        return f"{self.outcome.capitalize()}: it could not be moved to {name}.\n{lines}\n{self.remedy}"


class PrepareFailed(SwapError):
    """A host could not get ready. Nothing that runs was touched."""

    outcome = "the cluster is as it was"
    remedy = "Mend what is named, and call again: what these hosts have fetched and built they keep."


class CommitFailed(SwapError):
    """The cluster did not come up in the new environment in time, and was moved back."""

    fields = ("environment_id", "causes", "outcome")
    outcome: str
    remedy = "The logs of these processes say more. Give them longer (timeout=…) if they are slow to start."
