"""Packing what cannot be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from envship.environment import Environment
from envship.pack import pack
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.store import Store

_MOUNTED = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
if touch "$1/probe" 2> /dev/null; then exit 9; fi
exec "$2" -c 'import sys; from pathlib import Path; from envship.pack import pack
from worker_bootstrap.store import Store; print(pack(sys.argv[1], store=Store(Path(sys.argv[2]))).id)' "$1" "$3"
"""


def pack_read_only(prefix: Path, store: Store) -> Environment:
    """Pack *prefix* on a file system that is mounted read-only where we may mount; else without the right to write."""
    if os.getuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-m", "sh", "-c", _MOUNTED, "sh", prefix, sys.executable, store.layout.root]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Environment(store.read_manifest(EnvironmentId(done.stdout.strip())), store)
    folders = [prefix, *(path for path in prefix.rglob("*") if path.is_dir() and not path.is_symlink())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        return pack(prefix, store=store)
    finally:
        for folder in folders:
            folder.chmod(0o755)
