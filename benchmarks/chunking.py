"""Ways to cut packages into chunks, compared on two versions of each: what would be shipped, how large a store gets.

Called by ``benchmarks/pack.py --chunking``. Files are those of a wheel, in the order of their paths, as a pack
sees them; byte code is left out, of which the same holds as of its sources. Where the package ``fastcdc`` is
installed, cuts inside of files are compared as well.
"""

from __future__ import annotations

import functools
import importlib.util
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard

from envship import chunking
from envship.chunking import LARGE_FILE_BYTES, LIMIT_BYTES
from envship.cli.tables import console, table
from worker_bootstrap.codec import ZSTD_LEVEL
from worker_bootstrap.digest import Digest, digest_of

CONTENT_BYTES = 64 << 10
Files = Sequence[tuple[str, bytes]]
Cut = Callable[[Files], list[bytes]]


def compare_cuts(wheels: Sequence[Path]) -> None:
    """Print, for pairs of an old and a new wheel, megabytes shipped, and the store's size over that of one stream."""
    if len(wheels) % 2:
        raise SystemExit("an old and a new wheel for each package")
    ways: dict[str, Cut] = {
        "whole package": lambda files: [b"".join(data for _, data in files)],
        "each file": lambda files: [data for _, data in files if data],
        **{
            f"at files, {size} KiB": functools.partial(at_files, average_bytes=size << 10)
            for size in (256, 512, 768, 1024, 2048)
        },
    }
    if importlib.util.find_spec("fastcdc") is not None:
        ways["FastCDC, 64 KiB"] = by_content
    shipped, stored = [], []
    for old, new in zip(wheels[::2], wheels[1::2], strict=True):
        name = f"{'-'.join(old.name.split('-')[:2])} → {new.name.split('-')[1]}"
        before, after = files_of(old), files_of(new)
        stream_bytes = compressed_bytes([b"".join(data for _, data in after)])
        rows = [measured(cut, before, after) for cut in ways.values()]
        shipped.append((name, *(f"{ship / 1e6:.2f}" for ship, _, _ in rows)))
        stored.append((name, *(f"{store / stream_bytes:.3f} ({count})" for _, store, count in rows)))
    out = console()
    out.print(table(("MB to ship", *ways), shipped, right=tuple(ways)))
    out.print(table(("store over one stream (chunks)", *ways), stored, right=tuple(ways)))
    out.print(f"envship cuts at files, {chunking.AVERAGE_BYTES >> 10} KiB; zstd {ZSTD_LEVEL}")


def measured(cut: Cut, before: Files, after: Files) -> tuple[int, int, int]:
    """Compressed bytes to ship, compressed bytes of all of the new version, and its chunks."""
    known = {digest_of(chunk) for chunk in cut(before)}
    chunks = {digest_of(chunk): chunk for chunk in cut(after)}
    ship = [chunk for digest, chunk in chunks.items() if digest not in known]
    return compressed_bytes(ship), compressed_bytes(list(chunks.values())), len(chunks)


def at_files(files: Files, average_bytes: int) -> list[bytes]:
    """As `envship.chunking` does, with another mean size."""
    chunks: list[bytes] = []
    waiting: list[bytes] = []

    def flush() -> None:
        if data := b"".join(waiting):
            chunks.append(data)
        waiting.clear()

    for _, data in files:
        if len(data) > LARGE_FILE_BYTES:
            flush()
            chunks.extend(data[start : start + LIMIT_BYTES] for start in range(0, len(data), LIMIT_BYTES))
            continue
        if sum(map(len, waiting)) + len(data) > LIMIT_BYTES:
            flush()
        waiting.append(data)
        if ends(digest_of(data), len(data), average_bytes):
            flush()
    flush()
    return chunks


def by_content(files: Files) -> list[bytes]:
    """Cut by FastCDC, wherever in a file that is: as backup programs do, on one stream of all files."""
    from fastcdc import fastcdc

    stream = b"".join(data for _, data in files)
    pieces = fastcdc(stream, CONTENT_BYTES // 4, CONTENT_BYTES, CONTENT_BYTES * 4, fat=True)
    return [bytes(piece.data) for piece in pieces]


def ends(digest: Digest, size_bytes: int, average_bytes: int) -> bool:
    return int(digest[:8], 16) * average_bytes < size_bytes << 32


def compressed_bytes(chunks: Sequence[bytes]) -> int:
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    return sum(len(compressor.compress(chunk)) for chunk in chunks)


def files_of(wheel: Path) -> Files:
    with zipfile.ZipFile(wheel) as archive:
        return [(name, archive.read(name)) for name in sorted(archive.namelist()) if not name.endswith("/")]
