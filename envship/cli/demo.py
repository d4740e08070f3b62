"""``envship demo``: the whole of it, on this machine, in a minute."""

from __future__ import annotations

import click


@click.command()
def demo() -> None:
    """Start a cluster that lacks a package, move it into an environment that has it, and back."""
    click.echo("coming")
