"""The step that runs the windows through a dense block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streamcomp.job.files import DenseStates
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step, loading, running
from streamcomp.job.steps.experts import route, routing, routing_parts, scratch
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["Forward"]


@dataclass(frozen=True)
class Forward(Step):
    """All windows through one dense block."""

    @classmethod
    def make(cls, block: int) -> Forward:
        return cls(
            f"forward {block}", block, reads=(DenseStates(block),), writes=(DenseStates(block + 1),)
        )

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        yield loading(outline, self.block)
        block = outline.blocks[self.block].chunked(levers)
        yield from routing(outline, block, levers.batch, outline.stream.dtype)
        yield running("forward", outline, block, levers.batch)

    def held(self, outline: Outline) -> Mapping[str, int]:
        return {**super().held(outline), **routing_parts(outline, self.block)}

    def scratch_bytes(self, outline: Outline) -> int:
        return scratch(outline, self.block)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        source, target = DenseStates(self.block), DenseStates(self.block + 1)
        with (
            work.block(stage, self.block) as loaded,
            route(work, stage, loaded, source, work.skeleton.dtype) as routed,
        ):
            work.propagate(stage, "forward", loaded, source, target, routed)
            return StepResult(block=self.block, digest=loaded.digest)
