"""The command line: options made from settings, commands, and the tables that they print."""

from streamcomp.cli.commands import cli, main

__all__ = ["cli", "main"]
