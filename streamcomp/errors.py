"""All errors that streamcomp raises, as one tree.

::

    StreamcompError (1)
      +-- RecipeError (2)             a setting is invalid
      +-- SourceError (3)             the checkpoint cannot be read
      |     +-- MissingShardError
      |     +-- CorruptShardError
      |     +-- NonFiniteError
      +-- UnsupportedModelError (4)   the checkpoint is valid, but not supported
      +-- BudgetError (5)             the memory allowed is too small
      +-- OutputError (6)             a folder cannot be written
      |     +-- DamagedFileError
      +-- JobMismatchError (7)        the folder holds another job
      +-- JobLockedError (8)          another process works on this job
      +-- CalibrationError (9)        the text cannot be used
      +-- UnsupportedSystemError (10) the operating system lacks calls that jobs need

The number in brackets is the exit code of the command line. A message says what is
wrong, with its numbers, and how to fix it; it can be understood without a traceback.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CorruptShardError",
    "DamagedFileError",
    "JobLockedError",
    "JobMismatchError",
    "MissingShardError",
    "NonFiniteError",
    "OutputError",
    "RecipeError",
    "SourceError",
    "StreamcompError",
    "UnsupportedModelError",
    "UnsupportedSystemError",
]


class StreamcompError(Exception):
    """Base of all errors that the caller can fix."""

    exit_code = 1


class RecipeError(StreamcompError):
    """A setting is out of range, unknown, or contradicts another."""

    exit_code = 2


class SourceError(StreamcompError):
    """The model folder cannot be read as a checkpoint."""

    exit_code = 3


class MissingShardError(SourceError):
    """The index names a shard or a tensor that does not exist."""


class CorruptShardError(SourceError):
    """A shard's header is invalid, or does not match the file's length."""


class NonFiniteError(SourceError):
    """A weight or a hidden state is NaN or infinite."""


class UnsupportedModelError(StreamcompError):
    """A valid checkpoint that streamcomp does not support."""

    exit_code = 4


class BudgetError(StreamcompError):
    """No plan fits the memory allowed.

    ``minimum_bytes`` is the smallest sufficient budget, ``budget_bytes`` the one given.
    """

    exit_code = 5

    def __init__(self, message: str, *, budget_bytes: int, minimum_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes


class OutputError(StreamcompError):
    """A folder cannot be written, or its disk is full."""

    exit_code = 6


class DamagedFileError(OutputError):
    """A file of an unfinished job is missing, or is not what the job wrote.

    ``path`` is that file.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}: run the same command again, or remove the work folder")
        self.path, self.what = path, what


class JobMismatchError(StreamcompError):
    """The folder holds a job with other inputs; ``field`` names the first that differs."""

    exit_code = 7

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class JobLockedError(StreamcompError):
    """Another process works on this job."""

    exit_code = 8


class CalibrationError(StreamcompError):
    """The calibration text is missing, unreadable or too short."""

    exit_code = 9


class UnsupportedSystemError(StreamcompError):
    """The operating system lacks system calls that jobs need; Linux has them."""

    exit_code = 10
