"""Makes byte code that depends on nothing but source and interpreter. Run by the environment's own interpreter.

A JSON object on a line of standard input, and the text of the module after it, ask for one module: its file may have
changed by now. With ``cached``, for what lies on disk already; without, for what the compiler makes. The answer on
standard output is four bytes of length (big-endian), and the file; length 0 where there is none. Standard library only,
Python 3.9 and later. See `envship.bytecode`, which starts it.

What varies from one compilation to the next, and why it does not here: the header is the hash of the source (PEP 552);
the file name in code objects is the one asked for; marshal writes an object once, and refers to it afterwards, if more
than one refers to it when it is written, which for constants depends on who wrote it before, and for interned strings
on what else the process has done. Here no two constants are one, and all names have another holder.
"""

from __future__ import annotations

import _imp
import gc
import hashlib
import importlib.util
import json
import marshal
import sys
import types
from collections.abc import Iterator
from typing import Any

Request = dict[str, Any]

RAW_MAGIC = int.from_bytes(importlib.util.MAGIC_NUMBER, "little")
UNCHECKED = (1).to_bytes(4, "little")
VALUES_ONLY = 2
"""The version of marshal without references between objects: what it writes is read as objects of their own."""
# Until 3.10, marshal writes a frozenset in the order of its hash table, which depends on how it came about.
STABLE_SETS = sys.version_info >= (3, 11)


def main() -> None:
    gc.disable()  # code objects are no cycles
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    greeting = json.dumps({"magic": importlib.util.MAGIC_NUMBER.hex(), "tag": sys.implementation.cache_tag})
    answers.write(greeting.encode() + b"\n")
    answers.flush()
    for line in requests:
        request = json.loads(line)
        data = answer(request, requests.read(request["size_bytes"]))
        answers.write(len(data).to_bytes(4, "big") + data)
        answers.flush()


def answer(request: Request, source: bytes) -> bytes:
    """The bytes of the file; none if the source cannot be compiled, or what lies on disk cannot be reused."""
    # Interned, as some versions of the compiler do by themselves with names of files.
    name = sys.intern(request["name"])
    code = reusable(request, source) if "cached" in request else compiled(source, name)
    return b"" if code is None else header(source) + canonical(code, name)


def compiled(source: bytes, name: str) -> types.CodeType | None:
    """The code object of *source*, or None."""
    try:
        code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None
    # Written and read once, as code that was found on disk has been, so that both have the same shape.
    read: types.CodeType = marshal.loads(marshal.dumps(code))
    return read


def header(source: bytes) -> bytes:
    return importlib.util.MAGIC_NUMBER + UNCHECKED + _imp.source_hash(RAW_MAGIC, source)


def reusable(request: Request, source: bytes) -> types.CodeType | None:
    """The code object of byte code that lies on disk and belongs to the source, or None."""
    try:
        with open(request["cached"].encode("latin-1"), "rb") as file:
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
    """The bytes of *code*, which is changed, with *name*, an interned string, as its file name."""
    try:
        _imp._fix_co_filename(code, "")  # type: ignore[attr-defined]  # as importlib does
        copy = marshal.loads(marshal.dumps(code, VALUES_ONLY))
    except ValueError:
        # A slice as a constant (from 3.14 on), for which marshal has a later version only.
        return canonical_with_references(code, name)
    # What the copy shares with anybody is what is interned: with *code*, above all. Its file names become one.
    _imp._fix_co_filename(copy, name)  # type: ignore[attr-defined]
    return marshal.dumps(copy)


def canonical_with_references(code: types.CodeType, name: str) -> bytes:
    """The bytes of *code*, with references: equal strings become one object, which has one more holder than the code.

    Names come first: they are interned already, which the code object would otherwise do to them, splitting them from
    equal constants or not according to what had been interned in the process before.
    """
    strings: dict[str, str] = {}
    for inner in codes_in(code):
        names = (*inner.co_names, *inner.co_varnames, *inner.co_cellvars, *inner.co_freevars, inner.co_name)
        for text in (*names, getattr(inner, "co_qualname", inner.co_name)):
            strings.setdefault(text, text)
    return marshal.dumps(rebuilt(code, name, strings, {}))


def rebuilt(value: Any, name: str, strings: dict[str, str], done: dict[int, Any]) -> Any:
    """*value*, a constant or a code object, with its strings taken from *strings*; what was one object stays one."""
    kind = type(value)
    if kind is str:
        return strings.setdefault(value, value)
    if kind is tuple or kind is types.CodeType:
        made = done.get(id(value))
        if made is None:
            if kind is tuple:
                made = tuple([rebuilt(item, name, strings, done) for item in value])
            else:
                constants = tuple([rebuilt(item, name, strings, done) for item in value.co_consts])
                made = value.replace(co_consts=constants, co_filename=name)
            done[id(value)] = made
        return made
    if kind is frozenset:
        strings.update((item, strings.get(item, item)) for item in value if isinstance(item, str))
    return value


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    waiting = [code]
    while waiting:
        inner = waiting.pop()
        yield inner
        waiting += [item for item in inner.co_consts if isinstance(item, types.CodeType)]


def has_sets(code: types.CodeType) -> bool:
    return any(isinstance(item, frozenset) for inner in codes_in(code) for item in inner.co_consts)


if __name__ == "__main__":
    main()
