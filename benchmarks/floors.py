"""How fast the file system lets anybody be: making the same files, or linking them, with two processes and no more.

The floor of building an environment is to create its files with the same bytes, from memory; that of sharing one, to
link as many files. Folders and symbolic links are part of both. What a floor does not do: read, decompress, verify,
relocate, set modes or times.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

PROCESSES = 2


class Tree(NamedTuple):
    """What lies below a prefix: paths relative to it."""

    folders: list[str]
    files: list[tuple[str, int]]
    links: list[tuple[str, str]]


def tree_of(prefix: Path) -> Tree:
    """The folders (each after the one that it lies in), files (with sizes in bytes) and links of *prefix*."""
    tree = Tree([], [], [])
    for folder, names, files in os.walk(prefix):
        below = os.path.relpath(folder, prefix)
        for name in (*names, *files):
            path = os.path.normpath(os.path.join(below, name))
            full = os.path.join(folder, name)
            if os.path.islink(full):
                tree.links.append((path, os.readlink(full)))
            elif name in names:
                tree.folders.append(path)
            else:
                tree.files.append((path, os.lstat(full).st_size))
    return tree


def create(tree: Tree, prefix: Path, destination: Path) -> float:
    """Seconds to create everything of *prefix* at *destination* from memory."""

    def prepared(files: Sequence[str]) -> Callable[[], None]:
        contents = [(path, (prefix / path).read_bytes()) for path in files]

        def work() -> None:
            for path, content in contents:
                handle = os.open(f"{destination}/{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(handle, rest) :]
                os.close(handle)

        return work

    return _timed(tree, destination, prepared)


def link(tree: Tree, prefix: Path, destination: Path) -> float:
    """Seconds to link everything of *prefix* to *destination*."""

    def prepared(files: Sequence[str]) -> Callable[[], None]:
        def work() -> None:
            for path in files:
                os.link(f"{prefix}/{path}", f"{destination}/{path}")

        return work

    return _timed(tree, destination, prepared)


def _timed(tree: Tree, destination: Path, prepared: Callable[[Sequence[str]], Callable[[], None]]) -> float:
    """Seconds for the folders, then files and links in two processes, that have made ready what they need before."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES + 1)
    shares = _shares(tree)
    links = [tree.links[number::PROCESSES] for number in range(PROCESSES)]
    workers = [
        context.Process(target=_run, args=(prepared, share, own, destination, barrier))
        for share, own in zip(shares, links, strict=True)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    os.sync()
    began = time.perf_counter()
    os.mkdir(destination)
    for folder in tree.folders:
        os.mkdir(destination / folder)
    barrier.wait()
    barrier.wait()
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a process of the floor ended with {worker.exitcode}")
    return seconds


def _run(
    prepared: Callable[[Sequence[str]], Callable[[], None]],
    files: Sequence[str],
    links: Sequence[tuple[str, str]],
    destination: Path,
    barrier: Barrier,
) -> None:
    work = prepared(files)
    barrier.wait()  # ready
    barrier.wait()  # the folders are there
    work()
    for path, target in links:
        os.symlink(target, f"{destination}/{path}")
    barrier.wait()


def _shares(tree: Tree) -> list[list[str]]:
    """The files, folder by folder, dealt out so that each process has as much to do."""
    by_folder: dict[str, list[tuple[str, int]]] = {}
    for path, size_bytes in tree.files:
        by_folder.setdefault(path.rpartition("/")[0], []).append((path, size_bytes))

    def cost(files: list[tuple[str, int]]) -> int:
        return sum(size_bytes + (64 << 10) for _, size_bytes in files)

    shares: list[list[str]] = [[] for _ in range(PROCESSES)]
    loads = [0] * PROCESSES
    for files in sorted(by_folder.values(), key=cost, reverse=True):
        least = loads.index(min(loads))
        shares[least] += [path for path, _ in files]
        loads[least] += cost(files)
    return shares
