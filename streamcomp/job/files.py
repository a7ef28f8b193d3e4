"""Files that the steps of a job hand to each other, in its work folder.

A file has a typed name here, and steps say which ones they read and write: that decides when a
file is deleted, how many bytes of disk a job needs, and which files in a folder belong to a job.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.job.outline import Outline
from streamcomp.linalg.dtypes import gradient_dtype, moment_dtype

__all__ = [
    "Analysis",
    "CompressedStates",
    "DenseStates",
    "Gradients",
    "Moments",
    "States",
    "StepFile",
    "Windows",
    "compressed_states",
    "is_step_file",
]

# Of a name, what a file's key is followed by; a name has at most 255 bytes.
_PART = r"[^/\0]{1,200}"
# Disk for a tensor's line in a header.
_HEADER_BYTES = 2 * 2**10


@dataclass(frozen=True)
class StepFile(ABC):
    """A file, or several whose names begin with ``key`` and a dot."""

    pattern: ClassVar[str]  # of its names on disk

    @property
    @abstractmethod
    def key(self) -> str:
        """Its name up to the first dot."""

    @abstractmethod
    def nbytes(self, outline: Outline) -> int:
        """Its size, at most."""

    def lasts(self, *, keeps_work: bool) -> bool:
        """Whether it stays after the last step that reads it, given if the job ``keeps_work``."""
        return False


@dataclass(frozen=True)
class Windows(StepFile):
    """The calibration tokens, (windows, seq) int32."""

    pattern = r"windows\.safetensors"

    @property
    def key(self) -> str:
        return "windows"

    def lasts(self, *, keeps_work: bool) -> bool:
        """Keep them to the end of the job, because every step needs their shape."""
        return True

    def nbytes(self, outline: Outline) -> int:
        return 4 * outline.tokens


@dataclass(frozen=True)
class States(StepFile):
    """One vector for each token of each window, where ``block`` begins."""

    block: int

    def shape(self, stream: StreamShape) -> StreamShape:
        """Its windows, tokens, channels and dtype, given those of the dense stream."""
        return stream

    def nbytes(self, outline: Outline) -> int:
        return self.shape(outline.stream).nbytes


@dataclass(frozen=True)
class DenseStates(States):
    """Hidden states that enter ``block`` of the dense model."""

    pattern = r"hidden-\d{5}\.bin"

    @property
    def key(self) -> str:
        return f"hidden-{self.block:05d}"

    def lasts(self, *, keeps_work: bool) -> bool:
        """Keep the embeddings for other ratios: every compressed stream begins with them."""
        return keeps_work and self.block == 0


@dataclass(frozen=True)
class CompressedStates(States):
    """Hidden states that enter ``block`` behind the compressed blocks of one output."""

    output: int
    pattern = r"compressed-\d+-\d{5}\.bin"

    @property
    def key(self) -> str:
        return f"compressed-{self.output}-{self.block:05d}"


@dataclass(frozen=True)
class Gradients(States):
    """Gradient of the loss with regard to the states that enter ``block``."""

    pattern = r"gradient-\d{5}\.bin"

    @property
    def key(self) -> str:
        return f"gradient-{self.block:05d}"

    def shape(self, stream: StreamShape) -> StreamShape:
        return replace(stream, dtype=gradient_dtype(stream.dtype))


@dataclass(frozen=True)
class Analysis(StepFile):
    """Decompositions of the linears of ``block``, and the moment of its output's gradient."""

    block: int
    pattern = rf"analysis-\d{{5}}\.{_PART}\.safetensors"

    @property
    def key(self) -> str:
        return f"analysis-{self.block:05d}"

    def lasts(self, *, keeps_work: bool) -> bool:
        """Jobs with other ratios read them."""
        return keeps_work

    def nbytes(self, outline: Outline) -> int:
        block, dtype = outline.blocks[self.block], moment_dtype(outline.stream.dtype)
        gradient = block.output_gradient_bytes if outline.method.needs_gradients else 0
        return gradient + sum(
            outline.method.analysis_bytes(site, dtype) + _HEADER_BYTES for site in block.targets
        )


@dataclass(frozen=True)
class Moments(StepFile):
    """Moments of the sites of ``block``, which a job with another damping decomposes again."""

    block: int
    pattern = rf"moments-\d{{5}}\.{_PART}\.safetensors"

    @property
    def key(self) -> str:
        return f"moments-{self.block:05d}"

    def lasts(self, *, keeps_work: bool) -> bool:
        """Only jobs that keep their work write it."""
        return True

    def nbytes(self, outline: Outline) -> int:
        block = outline.blocks[self.block]
        return block.moment_bytes(block.groups)


def compressed_states(block: int, output: int) -> States:
    """The compressed stream of ``output``; both streams begin with the same embeddings."""
    return CompressedStates(block, output) if block else DenseStates(0)


_FILES = (Windows, DenseStates, CompressedStates, Gradients, Analysis, Moments)
_NAME = re.compile("|".join(kind.pattern for kind in _FILES))


def is_step_file(name: str) -> bool:
    """Whether a file of that name is one that steps write."""
    return _NAME.fullmatch(name) is not None
