"""As much of the ELF format as a relocatable interpreter needs: the search path for shared libraries (RPATH).

Source: System V ABI, chapter 5 (dynamic section); ``$ORIGIN`` as in ld.so(8). 64-bit little-endian files only, as on
all of conda's Linux platforms; others are left as they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

_MAGIC = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 5, 14, 15, 29


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size_bytes: int


def is_elf(data: bytes) -> bool:
    """Whether *data* is an ELF file of the kind that this module reads."""
    return data.startswith(_MAGIC)


def rpath(data: bytes) -> str | None:
    """The search path in an ELF file (RPATH or RUNPATH), or None."""
    return _string(data, _place_of(data, _DT_RUNPATH, _DT_RPATH))


def soname(data: bytes) -> str | None:
    """The name by which others ask for the shared library *data*, or None."""
    return _string(data, _place_of(data, _DT_SONAME))


def with_relative_rpath(data: bytes, path: str, prefixes: Collection[str]) -> bytes:
    """*data* with the RPATH entries that lie below *prefixes* made relative to the file, whose place is *path*.

    The new path is written over the old one; where it is longer, *data* comes back unchanged (see `names_prefix`).
    """
    place = _place_of(data, _DT_RUNPATH, _DT_RPATH)
    if place is None:
        return data
    end = data.index(b"\0", place)
    old = data[place:end].decode("utf-8", "surrogateescape")
    entries = dict.fromkeys(_relative(entry, path, prefixes) for entry in old.split(":"))
    new = ":".join(entries).encode("utf-8", "surrogateescape")
    if len(new) > end - place:
        return data
    return data[:place] + new.ljust(end - place, b"\0") + data[end:]


def names_prefix(data: bytes, prefixes: Collection[str]) -> bool:
    """Whether an entry of the RPATH lies below *prefixes*."""
    return any(_prefix_of(entry, prefixes) is not None for entry in (rpath(data) or "").split(":"))


def _relative(entry: str, path: str, prefixes: Collection[str]) -> str:
    prefix = _prefix_of(entry, prefixes)
    if prefix is None:
        return entry
    return "$ORIGIN/" + os.path.relpath(os.path.relpath(entry, prefix), os.path.dirname(path) or ".")


def _prefix_of(entry: str, prefixes: Collection[str]) -> str | None:
    for prefix in sorted(prefixes, key=len, reverse=True):
        if entry == prefix or entry.startswith(prefix.rstrip("/") + "/"):
            return prefix
    return None


def _string(data: bytes, place: int | None) -> str | None:
    return None if place is None else data[place : data.index(b"\0", place)].decode("utf-8", "surrogateescape")


def _place_of(data: bytes, *names: int) -> int | None:
    """Where the text of the first of these tags stands that there is."""
    try:
        segments = list(_segments(data))
        tags = dict(_dynamic(data, segments))
        wanted = next((tags[name] for name in names if name in tags), None)
        if wanted is None:
            return None
        place = _file_offset(tags[_DT_STRTAB], segments) + wanted
        data.index(b"\0", place)
        return place
    except (struct.error, KeyError, ValueError):
        return None


def _segments(data: bytes) -> Iterator[_Segment]:
    if not is_elf(data):
        return
    (table,) = struct.unpack_from("<Q", data, 32)
    size_bytes, count = struct.unpack_from("<HH", data, 54)
    for number in range(count):
        kind, _, offset, address, _, in_file, _, _ = struct.unpack_from("<IIQQQQQQ", data, table + number * size_bytes)
        yield _Segment(kind, offset, address, in_file)


def _dynamic(data: bytes, segments: list[_Segment]) -> Iterator[tuple[int, int]]:
    section = next((segment for segment in segments if segment.kind == _PT_DYNAMIC), None)
    if section is None:
        return
    for offset in range(section.offset, section.offset + section.size_bytes, 16):
        tag, value = struct.unpack_from("<QQ", data, offset)
        if tag == _DT_NULL:
            return
        yield tag, value


def _file_offset(address: int, segments: list[_Segment]) -> int:
    for segment in segments:
        if segment.kind == _PT_LOAD and segment.address <= address < segment.address + segment.size_bytes:
            return address - segment.address + segment.offset
    raise ValueError(f"no segment holds {address:#x}")
