"""ELF files made by hand: as much as the search for shared libraries needs."""

from __future__ import annotations

import struct


def elf_file(text: str, tag: int = 29) -> bytes:
    """The least that has an RUNPATH, or another text: header, two segments, dynamic section, string table."""
    strings = b"\0" + text.encode() + b"\0"
    dynamic_at, strings_at = 64 + 2 * 56, 64 + 2 * 56 + 3 * 16
    size = strings_at + len(strings)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, 0x1000, 0x1000, size, size, 0x1000)
    dynamic = struct.pack("<IIQQQQQQ", 2, 4, dynamic_at, 0x1000 + dynamic_at, 0x1000 + dynamic_at, 48, 48, 8)
    tags = struct.pack("<6Q", 5, 0x1000 + strings_at, tag, 1, 0, 0)
    return header + load + dynamic + tags + strings
