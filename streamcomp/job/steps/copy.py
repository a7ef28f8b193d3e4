"""The step that copies the tensors outside of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.checkpoint.writer import Entry
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["Copy"]


@dataclass(frozen=True)
class Copy(Step):
    """Copies all tensors outside of blocks, byte for byte, ``COPY_BYTES`` at a time."""

    @classmethod
    def make(cls, output: int, prefix: str) -> Copy:
        return cls(f"{prefix}copy the rest", output=output)

    @property
    def on_host(self) -> bool:
        return True

    def shard(self, blocks: int) -> int | None:
        return blocks

    def shard_bytes(self, outline: Outline) -> int:
        return sum(info.nbytes for info in outline.skeleton.other_tensors())

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        seconds = self.shard_bytes(outline) / outline.rates.disk_bytes
        yield Phase("copying", {"buffers": 2 * COPY_BYTES}, seconds)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        stage("copying")
        entries = [Entry(info.name, info) for info in work.skeleton.other_tensors()]
        work.write_shard(self.output, len(work.skeleton), entries)
        return StepResult(output=self.output)
