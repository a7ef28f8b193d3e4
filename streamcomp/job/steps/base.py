"""A step: the files it reads and writes, memory and seconds of each phase, and its work.

A phase has one name, which the plan, the progress bar, the journal and the report share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from streamcomp.job.block_plan import BlockPlan
from streamcomp.job.files import States, StepFile
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["Phase", "Step", "capturing", "loading", "running"]

# Name of the part of a phase's bytes that layer inputs take.
_CAPTURED = "masks and positions"


@dataclass(frozen=True)
class Phase:
    """A part of a step: the bytes alive in it, by what they are for, and its seconds."""

    name: str
    parts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # at the machine's measured rates; no code can be faster
    site: str = ""  # the site that it works on, if only one

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def title(self) -> str:
        return f"{self.name} {self.site}" if self.site else self.name

    def next_to(self, others: Mapping[str, int]) -> Phase:
        """This phase with more bytes in memory, by what they are for."""
        more = {name: nbytes + self.parts.get(name, 0) for name, nbytes in others.items()}
        return replace(self, parts={**self.parts, **more})


@dataclass(frozen=True)
class Step(ABC):
    """One step of a job, durable as a whole. Each kind is a subclass, in a separate file."""

    name: str
    block: int = -1  # number of the block that it works on
    output: int = -1  # number of the output that it writes to
    reads: tuple[StepFile, ...] = ()
    writes: tuple[StepFile, ...] = ()

    @abstractmethod
    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        """All phases in the order of :meth:`run`, repeated ones each time."""

    @abstractmethod
    def run(self, work: Workspace, stage: Stage) -> StepResult:
        """Do it, and leave durable files."""

    @property
    def runs_windows(self) -> bool:
        """Whether windows run through its block."""
        return self.block >= 0 and any(isinstance(file, States) for file in self.reads)

    @property
    def on_host(self) -> bool:
        """Whether it does not use the GPU."""
        return False

    @property
    def after_capture(self) -> bool:
        """Whether masks and positions are in memory when it begins."""
        return True

    def held(self, outline: Outline) -> Mapping[str, int]:
        """Bytes alive in all its phases, by what they are for."""
        if not self.after_capture:
            return {}
        return {_CAPTURED: outline.blocks[0].inputs.nbytes}

    def shard(self, blocks: int) -> int | None:
        """Number of the shard that it writes for a model of so many ``blocks``, if any."""
        return None

    def shard_bytes(self, outline: Outline) -> int:
        """Size of that shard."""
        return 0

    def scratch_bytes(self, outline: Outline) -> int:
        """Size of the nameless files that it has in the work folder while it runs."""
        return 0

    def written_bytes(self, outline: Outline) -> int:
        return sum(file.nbytes(outline) for file in self.writes) + self.shard_bytes(outline)


def capturing(block: BlockPlan, batch: int) -> Phase:
    """Masks and positions of ``batch`` windows are made before a block is read.

    Those of one window are kept; equal ones of other windows are views of them.
    """
    return Phase("capturing", {_CAPTURED: batch * block.inputs.peak_bytes})


def loading(outline: Outline, number: int, factors: int = 0) -> Phase:
    """Reading a block, next to ``factors`` bytes of factors that an earlier pass has made."""
    block = outline.blocks[number]
    parts = {"weights": block.weight_bytes, "merging": block.merge_bytes, "factors": factors}
    return Phase("loading", parts, outline.read_seconds(number))


def running(name: str, outline: Outline, block: BlockPlan, batch: int, factors: int = 0) -> Phase:
    """All windows through ``block``, ``batch`` at a time, with ``factors`` bytes of factors in it.

    A pivoted linear concatenates and permutes its output: then activations count twice.
    """
    twice = 2 if factors or outline.skeleton.compressed else 1
    parts = {
        "weights": block.weight_bytes,
        "factors": factors,
        "activations": twice * block.activations(batch),
    }
    return Phase(name, parts, outline.forward_seconds(block.number))
