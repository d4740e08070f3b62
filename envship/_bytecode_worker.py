"""Makes byte code that depends on nothing but source and interpreter. Run by the environment's own interpreter.

One JSON object per line on standard input asks for one module; the answer on standard output is four bytes of length
(big-endian), a byte (``C`` compiled, ``R`` reused), and the file; length 0 where there is none. Standard library only,
Python 3.9 and later. See `envship.bytecode`, which starts it.

What varies from one compilation to the next, and why it does not here: the header is the hash of the source (PEP 552);
the file name in code objects is the one asked for; marshal marks an object for later reference if anything else refers
to it when it is written, which depends on what the process has done before: here, all strings are held.
"""

from __future__ import annotations

import _imp
import hashlib
import importlib.util
import json
import marshal
import sys
import types
from typing import Any

Request = dict[str, Any]

RAW_MAGIC = int.from_bytes(importlib.util.MAGIC_NUMBER, "little")
UNCHECKED = (1).to_bytes(4, "little")
# Until 3.10, marshal writes a frozenset in the order of its hash table, which depends on how it came about.
STABLE_SETS = sys.version_info >= (3, 11)


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    greeting = json.dumps({"magic": importlib.util.MAGIC_NUMBER.hex(), "tag": sys.implementation.cache_tag})
    answers.write(greeting.encode() + b"\n")
    answers.flush()
    for line in requests:
        kind, data = answer(json.loads(line))
        answers.write(len(data).to_bytes(4, "big") + (kind + data if data else b""))
        answers.flush()


def answer(request: Request) -> tuple[bytes, bytes]:
    """The kind of result, and the bytes of the file (none if the source cannot be compiled)."""
    with open(request["source"], "rb") as file:
        source = file.read()
    code = reusable(request, source)
    kind = b"R"
    if code is None:
        kind = b"C"
        try:
            code = compile(source, request["name"], "exec", dont_inherit=True, optimize=0)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return kind, b""
        # Written and read once, as code that was found on disk has been, so that both have the same shape.
        code = marshal.loads(marshal.dumps(code))
    return kind, header(source) + canonical(code, request["name"])


def header(source: bytes) -> bytes:
    return importlib.util.MAGIC_NUMBER + UNCHECKED + _imp.source_hash(RAW_MAGIC, source)


def reusable(request: Request, source: bytes) -> types.CodeType | None:
    """The code object of byte code that lies on disk and belongs to the source, or None."""
    try:
        with open(request["cached"], "rb") as file:
            cached = file.read()
    except OSError:
        return None
    if len(cached) < 17 or cached[:4] != importlib.util.MAGIC_NUMBER:
        return None
    flags = int.from_bytes(cached[4:8], "little")
    if flags == 0:
        valid = cached[8:16] == stamp(request["mtime"]) + stamp(len(source))
    else:
        valid = cached[8:16] == _imp.source_hash(RAW_MAGIC, source)
    if not valid and request["cached_digest"] and request["source_digest"]:
        valid = (
            hashlib.sha256(cached).hexdigest() == request["cached_digest"]
            and hashlib.sha256(source).hexdigest() == request["source_digest"]
        )
    if not valid:
        return None
    try:
        code = marshal.loads(memoryview(cached)[16:])
    except (EOFError, ValueError, TypeError):
        return None
    if not isinstance(code, types.CodeType) or not (STABLE_SETS or not has_sets(code)):
        return None
    return code


def stamp(number: int) -> bytes:
    return (int(number) & 0xFFFFFFFF).to_bytes(4, "little")


def canonical(code: types.CodeType, name: str) -> bytes:
    """The bytes of *code* with *name* as its file name."""
    _imp._fix_co_filename(code, name)  # type: ignore[attr-defined]
    held: list[str] = []
    waiting: list[object] = [code]
    while waiting:
        item = waiting.pop()
        if isinstance(item, types.CodeType):
            held += item.co_names
            held += item.co_varnames
            held += item.co_cellvars
            held += item.co_freevars
            held.append(item.co_name)
            held.append(getattr(item, "co_qualname", ""))
            waiting += item.co_consts
        elif isinstance(item, (tuple, frozenset)):
            waiting += item
        elif isinstance(item, str):
            held.append(item)
    del item
    return marshal.dumps(code)


def has_sets(code: types.CodeType) -> bool:
    waiting = list(code.co_consts)
    while waiting:
        item = waiting.pop()
        if isinstance(item, frozenset):
            return True
        if isinstance(item, types.CodeType):
            waiting += item.co_consts
        elif isinstance(item, tuple):
            waiting += item
    return False


if __name__ == "__main__":
    main()
