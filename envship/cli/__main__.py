"""``python -m envship.cli``, where the ``envship`` script is not on the path."""

from __future__ import annotations

from envship.cli import main

main(prog_name="envship")
