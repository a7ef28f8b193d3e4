"""The step that shares ranks among all sites of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from streamcomp.job import kept
from streamcomp.job.files import Analysis
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.outputs import allocate
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["ShareRanks"]

_SECONDS = 0.5
_ONE_SIDED = (
    "allocation loss compares energies across linears, which only those of method two-sided bear: "
    "ranks shared evenly (--allocation uniform) are better here"
)
_SPECTRUM_BYTES = 12 * 8  # of a direction, with its place on the hulls


@dataclass(frozen=True)
class ShareRanks(Step):
    """Ranks of every output, from the spectra of the whole model where allocation asks for them.

    Holds what each site loses at each of its ranks, and the hulls of these.
    """

    label: ClassVar[str] = "ranks"

    @classmethod
    def make(cls, chosen: range) -> ShareRanks:
        return cls(cls.label, reads=tuple(Analysis(block) for block in chosen))

    @property
    def on_host(self) -> bool:
        return True

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        numbers = sum(min(s.rows, s.columns) // s.rank_step for s in outline.chosen)
        yield Phase("sharing", {"spectra": _SPECTRUM_BYTES * numbers}, _SECONDS)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        stage("sharing")
        outline, recipe, unreached = work.outline, work.recipe, work.unreached
        if recipe.allocation == "uniform" or unreached >= {m.disk_name for m in outline.chosen}:
            dense = {m.full_name: None for m in outline.chosen if m.disk_name in unreached}
            return StepResult(ranks=tuple({**output.ranks, **dense} for output in outline.outputs))
        eligible, chosen = (
            [site for site in sites if site.disk_name not in unreached]
            for sites in (outline.eligible, outline.chosen)
        )
        places = [(block.number, site) for block in outline.blocks for site in block.targets]
        reached = [place for place in places if place[1].disk_name not in unreached]
        ranks = tuple(
            allocate(
                recipe,
                output.asked,
                eligible,
                chosen,
                (kept.read_spectrum(work.ledger, *place) for place in reached),
            )
            for output in outline.outputs
        )
        notes = () if work.method.losses_compare else (_ONE_SIDED,)
        return StepResult(ranks=ranks, notes=notes)
