"""Which conda environments are measured where none is named: those of the laboratory, else the active one."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prefixes(prefix: Path | None, changed: Path | None) -> tuple[Path, Path | None]:
    """The environment to measure, and the same one with another version of one package, if there is such a one."""
    if prefix is not None:
        return prefix.resolve(), changed.resolve() if changed else None
    lab = Path(os.environ.get("ENVSHIP_CONDA_LAB") or Path.home() / ".cache/envship-conda-lab") / "envs"
    if (lab / "big311/conda-meta").is_dir():
        return lab / "big311", lab / "big311b" if (lab / "big311b/conda-meta").is_dir() else None
    if "CONDA_PREFIX" in os.environ:
        return Path(os.environ["CONDA_PREFIX"]), None
    raise SystemExit(f"name a conda environment: python {sys.argv[0]} PREFIX (--help says more)")
