"""The interpreter of a conda environment as that of a venv: what conda recorded of its files holds there as well.

Its libraries hold the prefix, with room for a longer one: that in OpenSSL is where ``ssl`` looks for certificates.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from envship.canonical import Treatment
from envship.sources.conda import treatment_of
from envship.sources.interpreter import Interpreter
from envship.sources.items import Collector
from envship.sources.locate import is_conda, is_exported

OPENSSL = "ssl"
"""Where conda's OpenSSL has its settings, and where conda's ``ca-certificates`` puts what it trusts."""


def has_openssl(interpreter: Interpreter) -> bool:
    """Whether conda's OpenSSL belongs to the interpreter: it lies in a conda environment, or was exported of one."""
    prefix = Path(interpreter.base_prefix)
    return is_conda(prefix) or is_exported(prefix)


def treatments(interpreter: Interpreter, collector: Collector) -> dict[str, Treatment]:
    """By absolute path: how files of the interpreter's prefix are treated that name it. Empty if conda has none of it.

    A record that cannot be read is as none: the venv is not to blame for what is wrong with its interpreter's packages.
    """
    base = os.path.realpath(interpreter.base_prefix)
    found: dict[str, Treatment] = {}
    for path in sorted(Path(base, "conda-meta").glob("*.json")):
        try:
            entries = [dict(entry) for entry in json.loads(path.read_bytes())["paths_data"]["paths"]]
            named = {str(entry["_path"]): entry for entry in entries if "prefix_placeholder" in entry}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for name, entry in named.items():
            treatment = treatment_of(entry, collector, f"lib/python{interpreter.short_version}")
            if treatment is not None:
                # Found by either spelling of the prefix.
                found[f"{base}/{name}"] = found[f"{interpreter.base_prefix}/{name}"] = treatment
    return found
