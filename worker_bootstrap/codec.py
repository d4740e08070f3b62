"""Compression of chunks: zstd where it can be had, zlib and raw elsewhere.

A chunk's name is the digest of its *uncompressed* bytes, so the same chunk may lie in one store as zstd and in another
as zlib. Sizes are bounded by what the manifest says, never by what a compressed frame claims.
"""

from __future__ import annotations

import importlib
import os
import threading
import zlib
from collections.abc import Collection
from typing import Any

ZSTD_LEVEL = 3
ZLIB_LEVEL = 1

SUFFIXES = {"zstd": ".zst", "zlib": ".zlib", "raw": ".raw"}
"""File suffix of each codec, best codec first."""
CODECS_VARIABLE = "ENVSHIP_CODECS"
"""Tells a process that was re-executed what `accepted` was before."""


class CodecError(ValueError):
    """The payload does not decode to the announced size, or its codec is not available here."""


def _load_zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


_zstandard = _load_zstandard()
_thread = threading.local()


def available() -> tuple[str, ...]:
    """Codecs that this process can decode, best first."""
    return tuple(name for name in SUFFIXES if name != "zstd" or _zstandard is not None)


def accepted() -> tuple[str, ...]:
    """Codecs of the chunks that this process may put into its store, best first.

    Fewer than `available` in a process that was re-executed, from an interpreter that had fewer: others of its machine,
    such as nannies, stay in that one and read the same store.
    """
    told = os.environ.get(CODECS_VARIABLE)
    return tuple(name for name in available() if told is None or name in told.split(","))


def choose(accept: Collection[str]) -> str:
    """The best codec that this process has and that *accept* (codec names) lists; ``raw`` is always accepted."""
    return next((name for name in available() if name in accept), "raw")


def encode(data: bytes | memoryview, codec: str, level: int = ZSTD_LEVEL) -> bytes:
    """Compress *data* with *codec*. *level* applies to zstd. Releases the GIL.

    Raises
    ------
    CodecError
        If the codec is not available in this process.
    """
    if codec == "raw":
        return bytes(data)
    if codec == "zlib":
        return zlib.compress(data, ZLIB_LEVEL)
    if codec == "zstd" and _zstandard is not None:
        compressed: bytes = _compressor(level).compress(data)
        return compressed
    raise CodecError(f"codec {codec!r} is not available here")


def _compressor(level: int) -> Any:
    """This thread's compressor: its tables take as long to set up as a tenth of a chunk to compress."""
    kept: dict[str, Any] = _thread.__dict__
    name = f"level{level}"
    if name not in kept:
        kept[name] = _zstandard.ZstdCompressor(level=level)
    return kept[name]


def decode(payload: bytes | memoryview, codec: str, max_bytes: int) -> bytes:
    """Decompress *payload*, refusing to produce more than *max_bytes*.

    Raises
    ------
    CodecError
        If the payload is damaged, holds more than *max_bytes*, or the codec is not available here.
    """
    if codec == "raw":
        data = bytes(payload)
    elif codec == "zlib":
        data = _inflate(payload, max_bytes)
    elif codec == "zstd" and _zstandard is not None:
        data = _decode_zstd(payload, max_bytes)
    else:
        raise CodecError(f"codec {codec!r} is not available here")
    if len(data) > max_bytes:
        raise CodecError(f"more than {max_bytes} bytes")
    return data


def _inflate(payload: bytes | memoryview, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(payload, max_bytes + 1)
    except zlib.error as error:
        raise CodecError(str(error)) from error
    if len(data) <= max_bytes and not inflater.eof:
        raise CodecError("the payload is cut short")
    return data


def _decode_zstd(payload: bytes | memoryview, max_bytes: int) -> bytes:
    try:
        # A frame may claim any size in a few bytes, so the claim is checked before memory is reserved for it.
        claimed = _zstandard.frame_content_size(payload)
        if claimed > max_bytes:
            raise CodecError(f"the frame claims {claimed} bytes, at most {max_bytes} are allowed")
        data: bytes = _zstandard.ZstdDecompressor().decompress(payload, max_output_size=max_bytes)
        return data
    except _zstandard.ZstdError as error:
        raise CodecError(str(error)) from error
