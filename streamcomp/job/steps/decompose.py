"""The step that decomposes a block again, with another damping, from kept moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from streamcomp.job import kept
from streamcomp.job.files import Analysis, Moments
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.analyse import Analysed, decompose_one, decomposing
from streamcomp.job.steps.base import Phase, Step, loading
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["Decompose"]


@dataclass(frozen=True)
class Decompose(Step):
    """All sites of one block, from moments that another job kept; those of one site at a time."""

    label: ClassVar[str] = "decompose"

    @classmethod
    def make(cls, block: int) -> Decompose:
        return cls(f"{cls.label} {block}", block, -1, (Moments(block),), (Analysis(block),))

    @property
    def after_capture(self) -> bool:
        return False

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        block = outline.blocks[self.block]
        for groups in block.passes(levers):
            yield loading(outline, self.block)
            yield from decomposing(outline, block, groups)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        block, unreached, analysed = work.block_plan(self.block), work.unreached, Analysed()
        for groups in block.passes(work.levers):
            with work.block(stage, self.block) as loaded:
                for site in block.others(groups):
                    site.free(loaded)
                for group in groups:
                    least = 0.0
                    for site in group.sites:
                        if site.disk_name in unreached:
                            site.free(loaded)
                            continue
                        moment = kept.read_moment(work.ledger, self.block, group, site, work.device)
                        moment = moment.damped(least)
                        least = decompose_one(work, stage, loaded, site, moment, analysed)
                        del moment
        return analysed.result(self.block, loaded.digest)
