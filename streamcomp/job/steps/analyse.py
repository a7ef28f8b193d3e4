"""The step that decomposes a block's weights by moments of its inputs or outputs alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from streamcomp.calibration.observe import (
    MomentGroup,
    Observer,
    observing_bytes,
    observing_flops,
)
from streamcomp.job import kept
from streamcomp.job.block_plan import BlockPlan, Pass
from streamcomp.job.files import Analysis, DenseStates, Moments, StepFile
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import AnalysisRow, StepResult
from streamcomp.job.steps.base import Phase, Step, loading
from streamcomp.job.steps.experts import (
    decompose_experts,
    decomposing_experts,
    route,
    routing,
    routing_parts,
    scratch,
)
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.methods import GradientMoment, Moment
from streamcomp.model.sites import LinearSite
from streamcomp.model.streamer import LoadedBlock

__all__ = [
    "Analyse",
    "Analysed",
    "decompose",
    "decompose_one",
    "decomposing",
    "decomposing_one",
    "kept_files",
    "moment_seconds",
    "observing",
]


@dataclass(frozen=True)
class Analyse(Step):
    """Takes moments of one block's inputs or outputs, and decomposes its weights by them.

    In one pass over the windows, or in several passes that each take moments of some groups.
    """

    @classmethod
    def make(cls, block: int, chosen: range, *, keeps_moments: bool) -> Analyse:
        """One of the blocks up to the last of the ``chosen`` ones, which alone are decomposed."""
        below = (DenseStates(block + 1),) if block + 1 < chosen.stop else ()
        kept_here = kept_files(block, chosen, keeps_moments=keeps_moments)
        return cls(f"analyse {block}", block, -1, (DenseStates(block),), (*below, *kept_here))

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        block, dtype = outline.blocks[self.block].chunked(levers), outline.stream.dtype
        for turn, groups in enumerate(block.passes(levers)):
            yield loading(outline, self.block)
            if turn == 0:
                yield from routing(outline, block, levers.batch, dtype)
                yield from decomposing_experts(outline, block, dtype)
            yield observing(outline, block, levers.batch, groups)
            yield from decomposing(outline, block, groups)

    def held(self, outline: Outline) -> Mapping[str, int]:
        return {**super().held(outline), **routing_parts(outline, self.block)}

    def scratch_bytes(self, outline: Outline) -> int:
        return scratch(outline, self.block)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        source, target = DenseStates(self.block), DenseStates(self.block + 1)
        rows, digest, routed = Analysed(), "", None
        block = work.block_plan(self.block)
        with ExitStack() as stack:
            for turn, groups in enumerate(block.passes(work.levers)):
                with work.block(stage, self.block) as loaded:
                    if turn == 0:
                        dtype = work.skeleton.dtype
                        routed = stack.enter_context(route(work, stage, loaded, source, dtype))
                        digest = loaded.digest
                    if turn == 0 and routed is not None:
                        rows.rows += decompose_experts(work, stage, loaded, routed)
                    with Observer(loaded, groups, work.device) as observer:
                        keeps = target if turn == 0 and target in self.writes else None
                        work.propagate(stage, "observing", loaded, source, keeps, routed)
                    decompose(work, stage, loaded, observer, groups, rows, self.writes)
        return rows.result(self.block, digest)


@dataclass
class Analysed:
    """Figures of the sites of a block that were decomposed, and names of the unreached ones."""

    rows: list[AnalysisRow] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def result(self, block: int, digest: str) -> StepResult:
        analysis, unreached = tuple(self.rows), tuple(self.unreached)
        return StepResult(block=block, digest=digest, analysis=analysis, unreached=unreached)


def observing(
    outline: Outline, block: BlockPlan, batch: int, groups: Pass, factors: int = 0
) -> Phase:
    """All windows through ``block``, ``batch`` at a time, into the moments of ``groups``."""
    parts = {
        "weights": block.weight_bytes,
        "moments": block.moment_bytes(groups),
        "factors": factors,
        "activations": block.activations(batch)
        + observing_bytes(block.groups, block.stream, batch),
    }
    seconds = outline.forward_seconds(block.number) + moment_seconds(outline, groups)
    return Phase("observing", parts, seconds)


def moment_seconds(outline: Outline, groups: Pass) -> float:
    """Seconds that summing up the moments of ``groups`` and of their gradients takes."""
    moments, products = observing_flops(groups, outline.tokens)
    return moments / outline.rates.moment_flops + products / outline.rates.model_flops


def decomposing(outline: Outline, block: BlockPlan, groups: Pass) -> Iterator[Phase]:
    """Decompositions, each of which drops the weight and the moments that it needed."""
    moments, dropped = block.moment_bytes(groups), block.site_bytes(block.others(groups))
    for group in groups:
        for site in group.sites:
            yield decomposing_one(outline, block, group, site, moments, dropped)
            dropped += block.site_bytes([site])
        moments -= block.moment_bytes([group])


def decomposing_one(
    outline: Outline,
    block: BlockPlan,
    group: MomentGroup[LinearSite],
    site: LinearSite,
    moments: int,
    dropped: int,
) -> Phase:
    """One decomposition; ``moments`` bytes of them are there, ``dropped`` bytes of weights not."""
    working = outline.method.working_bytes(
        site, group.side, group.tokens(outline.tokens), block.stream.dtype, outline.recipe
    )
    parts = {
        "weights": block.weight_bytes - dropped,
        "moments": moments,
        "decomposition": working,
    }
    rates = outline.rates
    seconds = rates.eigh_seconds(min(site.rows, site.columns))
    seconds += rates.seconds(outline.method.flops(site, group.side))
    return Phase("decomposing", parts, seconds, site.name)


def kept_files(block: int, chosen: range, *, keeps_moments: bool) -> tuple[StepFile, ...]:
    """Files in which a sweep keeps a block's decompositions."""
    if block not in chosen:
        return ()
    return (Analysis(block), Moments(block)) if keeps_moments else (Analysis(block),)


def decompose(
    work: Workspace,
    stage: Stage,
    loaded: LoadedBlock,
    observer: Observer,
    groups: Pass,
    analysed: Analysed,
    writes: Collection[StepFile],
) -> None:
    """Decompose the sites of ``groups``, one at a time, and keep that in the work folder.

    All other weights are freed before; its moments and its weight after each. ``analysed`` takes
    the figures of each, and the names of those that no token reached. Moments are kept too where
    ``writes`` says so.
    """
    keeps_moments = Moments(loaded.number) in writes
    for site in work.block_plan(loaded.number).others(groups):
        site.free(loaded)
    for group in groups:
        moment = observer.take(group)
        if moment.is_empty:
            for site in group.sites:
                analysed.unreached.append(site.disk_name)
                site.free(loaded)
            continue
        gradients: dict[LinearSite, GradientMoment] = {}
        for site in group.sites:
            if group.gradients:
                gradients[site] = observer.take_gradient(site)
            complete = replace(moment, gradient=gradients.get(site))
            moment = moment.damped(decompose_one(work, stage, loaded, site, complete, analysed))
            del complete
            if not keeps_moments:
                gradients.clear()
        if keeps_moments:
            kept.write_moment(work.ledger, loaded.number, group, moment, gradients)


def decompose_one(
    work: Workspace,
    stage: Stage,
    loaded: LoadedBlock,
    site: LinearSite,
    moment: Moment,
    analysed: Analysed,
) -> float:
    """Decompose one site into the work folder and free its weight; return the damping used."""
    stage(f"decomposing {site.leaf}")
    analysis = work.method.analyse(site.weight(loaded), moment, work.recipe)
    kept.write_decomposition(work.ledger, loaded.number, site, analysis)
    analysed.rows.append(kept.figures(site, analysis))
    site.free(loaded)
    return analysis.min_damping
