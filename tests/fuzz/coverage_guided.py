"""A coverage-guided fuzzer on the readers of manifests, listings, chunks and bundles. Optional: needs ``atheris``.

    pip install --editable ".[fuzz]"
    python tests/fuzz/coverage_guided.py manifest|listing|chunk|bundle [CORPUS] -max_total_time=60 -rss_limit_mb=1024

What follows the target are libFuzzer's own arguments: a folder for what it finds, and its limits. It ends with a
traceback, and the input in a file ``crash-…``, when a reader raises what is none of our errors, or takes more time or
memory than the limits allow. `tests/test_fuzz.py` runs each target for a while, from sound inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(include=["envship", "worker_bootstrap"]):
    from tests.fuzzing import TARGETS


def main() -> None:
    """Fuzz the target that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(__doc__)
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
