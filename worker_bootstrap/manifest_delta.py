"""A manifest on its way to somebody who holds another one: what of it is not in that, compressed. Pure.

A large environment has a manifest of a megabyte, of which a change of one file changes a hundredth. Nobody has to
believe a delta: what is made of it has the id that is asked for, or is refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

from worker_bootstrap.digest import EnvironmentId, is_digest
from worker_bootstrap.errors import EnvironmentMissing, ManifestInvalid
from worker_bootstrap.manifest import MANIFEST_LIMIT_BYTES, Manifest


def delta_of(manifest: Manifest, bases: Iterable[Manifest] = ()) -> bytes:
    """*manifest* as bytes for somebody who holds *bases*: as what is not in the one that has most of it."""
    wanted = {package: place for place, package in enumerate(manifest.packages)}
    base = max(bases, key=lambda base: len(wanted.keys() & base.packages), default=None)
    raw = json.loads(manifest.to_bytes())
    known = {package: place for place, package in enumerate(base.packages)} if base is not None else {}
    raw["packages"] = [known.get(package, row) for package, row in zip(manifest.packages, raw["packages"])]
    text = json.dumps({"base": base.id if base is not None else None, "manifest": raw}, separators=(",", ":"))
    return zlib.compress(text.encode())


def whole_of(delta: bytes, wanted: EnvironmentId, read: Callable[[EnvironmentId], Manifest]) -> Manifest:
    """The manifest *wanted*, of which *delta* came.

    Parameters
    ----------
    read
        Gives the manifest with an id.

    Raises
    ------
    EnvironmentMissing
        What *read* raises: the one that *delta* is for is not held.
    ManifestInvalid
        If something else comes out of it.
    """
    raw, base_id = _parsed(delta)
    try:
        if base_id is not None:
            rows = json.loads(read(base_id).to_bytes())["packages"]
            raw["packages"] = [rows[row] if type(row) is int else row for row in raw["packages"]]
        data = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    except (TypeError, KeyError, IndexError, RecursionError, ValueError) as error:
        raise ManifestInvalid(f"{type(error).__name__}: {error}", "delta of a manifest") from error
    return Manifest.from_bytes(data.encode(), wanted)


def likely_bases(held: Collection[EnvironmentId], read: Callable[[EnvironmentId], Manifest]) -> list[Manifest]:
    """Those of *held* that can be read here as well."""
    found = []
    for environment_id in held:
        try:
            found.append(read(environment_id))
        except (EnvironmentMissing, ManifestInvalid):
            continue
    return found


def _parsed(delta: bytes) -> tuple[dict[str, Any], EnvironmentId | None]:
    try:
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(delta, MANIFEST_LIMIT_BYTES + 1)
        if len(text) > MANIFEST_LIMIT_BYTES:
            raise ValueError(f"at most {MANIFEST_LIMIT_BYTES} bytes are allowed")
        found = json.loads(text)
        raw, base_id = found["manifest"], found["base"]
        if not isinstance(raw, dict) or not (base_id is None or is_digest(base_id)):
            raise ValueError("not a delta")
    except (zlib.error, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{type(error).__name__}: {error}", "delta of a manifest") from error
    return raw, EnvironmentId(base_id) if base_id is not None else None
