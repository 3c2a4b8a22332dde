"""The command `mpidl`."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from mpidl.cli.app import app  # typer and rich are needed by nobody else

    app()
