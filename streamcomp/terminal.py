"""Writing for a person who may have gone: a closed pipe or a full disk is an OSError, no more."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO

from rich.console import Console

__all__ = ["OpenConsole", "drop"]


class OpenConsole(Console):
    """A console that raises BrokenPipeError as others raise OSError, and exits from nothing."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - called where the error is handled; rich would end the process


def drop(stream: TextIO | None) -> None:
    """Discard what ``stream`` cannot write, or the interpreter tries again at its exit."""
    if stream is not None:
        with suppress(OSError, ValueError):  # it has no descriptor, or is closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
