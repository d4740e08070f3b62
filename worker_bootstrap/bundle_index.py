"""Where in a bundle which chunk lies, found out by hopping from record to record: no chunk is read.

What the client needs to tell hosts what to read, and what a host finds out for a client that does not see the bundle
itself. The format is in ``docs/format.md``; bundles are written, and read as a whole, by ``envship.bundle``.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import BundleInvalid, ManifestInvalid
from worker_bootstrap.manifest import CHUNK_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, Manifest

MAGIC = b"ENVSHIP\x01"
END = b"ENVSHIP\xff"
CODECS = ("raw", "zlib", "zstd")
"""By the number that stands for them in a bundle."""
PAYLOAD_LIMIT_BYTES = CHUNK_LIMIT_BYTES + (64 << 10)
"""A chunk that does not compress takes a little more room than its bytes."""
LENGTH = struct.Struct(">Q")
RECORD = struct.Struct(">32sBI")


class Extent(NamedTuple):
    """Where in a bundle the payload of a chunk lies, and how it is compressed."""

    offset: int
    codec_number: int
    size_bytes: int


@contextlib.contextmanager
def opened(where: str) -> Iterator[BinaryIO]:
    """The file at a path or URL, for reading, as long as the block lasts.

    Raises
    ------
    OSError
        If it cannot be opened, also because a library for that kind of URL is not installed here.
    """
    with contextlib.ExitStack() as stack:
        if "://" not in where:
            yield stack.enter_context(open(where, "rb"))
            return
        try:
            import fsspec  # for URLs only: every process that starts pays for it

            file: BinaryIO = stack.enter_context(fsspec.open(where, "rb"))
        except OSError:
            raise
        except Exception as error:  # whatever a file system's library raises of its own
            raise OSError(f"{type(error).__name__}: {error}") from error
        yield file


def survey(where: str) -> tuple[Manifest, dict[Digest, Extent]]:
    """The manifest of the bundle at a path or URL, and where in it each chunk lies.

    Raises
    ------
    BundleInvalid
        If the file is no bundle, is cut short, or holds anything that its manifest does not ask for.
    OSError
        If it cannot be read.
    """
    extents: dict[Digest, Extent] = {}
    try:
        with opened(where) as file:
            manifest = read_manifest(file, where)
            for digest in manifest.chunks:
                codec_number, size_bytes = read_record(file, where, digest)
                extents[digest] = Extent(file.tell(), codec_number, size_bytes)
                file.seek(size_bytes, os.SEEK_CUR)
            if file.read(len(END) + 1) != END:
                raise BundleInvalid(where, "it does not end where it should")
    except ManifestInvalid as error:
        raise BundleInvalid(where, str(error)) from error
    return manifest, extents


def read_manifest(file: BinaryIO, where: str) -> Manifest:
    """The manifest, with which a bundle begins; what follows is the first record.

    Raises
    ------
    BundleInvalid, ManifestInvalid
        If it does not begin so.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise BundleInvalid(where, "it does not begin as a bundle of this format does")
    (size_bytes,) = LENGTH.unpack(exactly(file, LENGTH.size, where))
    if size_bytes > MANIFEST_LIMIT_BYTES:
        raise BundleInvalid(where, f"its manifest claims {size_bytes} bytes")
    return Manifest.from_bytes(exactly(file, size_bytes, where))


def read_record(file: BinaryIO, where: str, expected: Digest) -> tuple[int, int]:
    """The codec's number and the payload's size of the chunk that comes next, *expected*; the payload follows.

    Raises
    ------
    BundleInvalid
        If another one comes, or the record breaks the format.
    """
    raw_digest, codec_number, size_bytes = RECORD.unpack(exactly(file, RECORD.size, where))
    digest = Digest(raw_digest.hex())
    if digest != expected:
        raise BundleInvalid(where, f"chunk {digest} where the manifest asks for {expected}")
    if codec_number >= len(CODECS) or size_bytes > PAYLOAD_LIMIT_BYTES:
        raise BundleInvalid(where, f"chunk {digest} claims codec {codec_number} and {size_bytes} bytes")
    return codec_number, size_bytes


def exactly(file: BinaryIO, size_bytes: int, where: str) -> bytes:
    """The next *size_bytes*.

    Raises
    ------
    BundleInvalid
        If the file ends before.
    """
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise BundleInvalid(where, "it is cut short")
    return data
