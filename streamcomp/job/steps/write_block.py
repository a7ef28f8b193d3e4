"""The step that writes one block of one output: a shard of factors and dense tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from streamcomp.calibration.observe import Observer
from streamcomp.calibration.routing import Routing
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.checkpoint.writer import Entry
from streamcomp.forms import Allowance
from streamcomp.job import kept
from streamcomp.job.block_plan import BlockPlan, Pass
from streamcomp.job.files import Analysis, DenseStates, States, StepFile, compressed_states
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.outputs import block_saving
from streamcomp.job.rows import LinearRow, Refined, StepResult
from streamcomp.job.steps.analyse import decomposing_one, observing
from streamcomp.job.steps.base import Phase, Step, loading, running
from streamcomp.job.steps.experts import (
    StoredExperts,
    factorize_experts,
    factorizing_experts,
    route,
    routing,
    routing_parts,
    scratch,
)
from streamcomp.job.steps.follow import Factored, refine, refining, update, updating
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.linalg.dtypes import moment_dtype, solve_dtype
from streamcomp.methods import Factors, Moment
from streamcomp.model.sites import LinearSite
from streamcomp.model.streamer import LoadedBlock
from streamcomp.recipe import Recipe

__all__ = ["WriteBlock"]


@dataclass(frozen=True)
class WriteBlock(Step):
    """Factors one block for one output, on the streams that it needs, and writes its shard.

    From kept decompositions, or from moments taken now. In one pass, or in several, each with the
    moments and weights of some sites alone; in one on the compressed stream, where all factors run
    together.
    """

    from_analysis: bool = False  # decompositions were kept

    @classmethod
    def make(
        cls, block: int, output: int, prefix: str, chosen: range, recipe: Recipe, *, analysis: bool
    ) -> WriteBlock:
        """For a job that compresses the ``chosen`` blocks; others are copied."""
        reads: list[StepFile] = []
        writes: list[StepFile] = []
        if analysis and block in chosen:
            reads.append(Analysis(block))
        if block < chosen.stop:
            last = block + 1 == chosen.stop
            if recipe.follows or (recipe.statistics == "dense" and not analysis):
                reads.append(DenseStates(block))
                writes += [DenseStates(block + 1)] if recipe.refine or not last else []
            if recipe.compressed_stream:
                reads.append(compressed_states(block, output))
                writes += [compressed_states(block + 1, output)] if not last else []
        name = f"{prefix}block {block}"
        return cls(name, block, output, tuple(reads), tuple(writes), from_analysis=analysis)

    def shard(self, blocks: int) -> int | None:
        return self.block

    def shard_bytes(self, outline: Outline) -> int:
        block, output = outline.blocks[self.block], outline.outputs[self.output]
        saved = sum(block_saving(outline.form, m, output.allowances) for m in block.sites.eligible)
        return block.read_bytes + saved

    def held(self, outline: Outline) -> Mapping[str, int]:
        routing = routing_parts(outline, self.block) if self._observes else {}
        return {**super().held(outline), **routing}

    def scratch_bytes(self, outline: Outline) -> int:
        factors = self.shard_bytes(outline) if outline.blocks[self.block].experts else 0
        return factors + (scratch(outline, self.block) if self._observes else 0)

    @property
    def _dense_target(self) -> States | None:
        """File of the dense block's output."""
        target = DenseStates(self.block + 1)
        return target if target in self.writes else None

    @property
    def _compressed_target(self) -> States | None:
        """File of the compressed block's output."""
        target = compressed_states(self.block + 1, self.output)
        return target if target in self.writes else None

    # -- bytes and seconds -------------------------------------------------------------------

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        recipe, factors = outline.recipe, 0
        block = outline.blocks[self.block].chunked(levers)
        most = outline.ranks(self.block, self.output, most=True)
        for turn, groups in enumerate(self._passes(outline, levers)):
            yield loading(outline, self.block, factors)
            if turn == 0:
                yield from self._experts_first(outline, block, levers)
            yield from self._factorizing(outline, block, levers, groups, factors)
            factors += _factor_bytes(outline, groups, most)
        if recipe.follows and self._dense_target:
            yield running("forward", outline, block, levers.batch, factors)
        if recipe.update and most:
            yield updating(outline, block, levers.batch, most, factors)
        if recipe.refine and most:
            ranks = outline.ranks(self.block, self.output)
            yield from refining(outline, block, most, ranks, factors)
        if self._compressed_target:
            yield running("propagating", outline, block, levers.batch, factors)
        seconds = self.shard_bytes(outline) / outline.rates.disk_bytes
        yield Phase("writing", {"factors": factors, "buffers": COPY_BYTES}, seconds)

    def _experts_first(self, outline: Outline, block: BlockPlan, levers: Levers) -> Iterator[Phase]:
        if self._observes:
            yield from routing(outline, block, levers.batch, outline.stream.dtype)
        if block.experts:
            yield from factorizing_experts(outline, block, from_analysis=self.from_analysis)

    @property
    def _observes(self) -> bool:
        """Whether it runs windows through the dense block for their moments."""
        return not self.from_analysis and bool(self.reads)

    def _passes(self, outline: Outline, levers: Levers) -> list[Pass]:
        block = outline.blocks[self.block]
        if outline.recipe.compressed_stream:
            return [block.groups]
        return block.passes(levers, observed=not self.from_analysis)

    def _factorizing(
        self, outline: Outline, block: BlockPlan, levers: Levers, groups: Pass, factors: int
    ) -> Iterator[Phase]:
        """One pass, next to the ``factors`` bytes of the passes before it."""
        recipe = outline.recipe
        observes = self._observes
        moments = block.moment_bytes(groups) if observes else 0
        if observes:
            yield observing(outline, block, levers.batch, groups, factors)
        frees = not recipe.compressed_stream
        freed = block.site_bytes(block.others(groups)) if frees else 0
        most = outline.ranks(self.block, self.output, most=True)
        for group in groups:
            for site in (site for site in group.sites if site in most):
                if not self.from_analysis:
                    held = moments + factors
                    phase = decomposing_one(outline, block, group, site, held, freed)
                    yield replace(phase, name="factorizing")
                yield self._encoding(outline, block, site, moments, factors, freed)
                factors += _factor_bytes(outline, (replace(group, sites=(site,)),), most)
                freed += frees * block.site_bytes([site])
            moments -= block.moment_bytes([group]) if observes else 0

    def _encoding(
        self,
        outline: Outline,
        block: BlockPlan,
        site: LinearSite,
        moments: int,
        factors: int,
        freed: int,
    ) -> Phase:
        """Factors of one site, from a decomposition as it was kept, or just made.

        Next to ``moments`` bytes, and ``factors`` bytes of other sites; ``freed`` bytes of weights
        are gone before.
        """
        most = outline.ranks(self.block, self.output, most=True)[site]
        rank = outline.ranks(self.block, self.output).get(site, 0)
        dtype, form = block.stream.dtype, outline.form
        bases = moment_dtype(dtype) if self.from_analysis else solve_dtype(dtype)
        parts = {
            "weights": block.weight_bytes - freed,
            "moments": moments + outline.method.analysis_bytes(site, bases),
            "factors": factors,
            "decomposition": form.encoding_bytes(site.rows, site.columns, most, dtype),
        }
        seconds = outline.rates.seconds(form.encoding_flops(site.rows, site.columns, rank))
        return Phase("factorizing", parts, seconds, site.name)

    # -- doing it ------------------------------------------------------------------------

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        factored: Factored = {}
        refined, digest, routed = None, None, None
        with ExitStack() as stack:
            for turn, groups in enumerate(self._passes(work.outline, work.levers)):
                with work.block(stage, self.block) as loaded:
                    if turn == 0:
                        routed, experts = self._experts(work, stage, loaded, stack)
                        whole = work.block_plan(self.block).bank is None or routed or experts
                        digest = loaded.digest if whole else None  # else experts were not read
                    self._factorize(work, stage, loaded, groups, factored, routed)
                    if work.recipe.compressed_stream:
                        factored, refined = self._follow(work, stage, loaded, factored)
            stage("writing")
            work.write_shard(self.output, self.block, self._entries(work, factored, experts))
        rows = tuple(
            LinearRow(**vars(factors.figures), spec=factors.spec) for factors in factored.values()
        )
        rows += tuple(experts.rows) if experts else ()
        loss = sum(row.relative_loss for row in rows) / max(1, len(rows))
        detail = f"loss {loss:.2%}" if rows else ""
        if refined:
            detail += f", refined {refined.before:.3g} -> {refined.after:.3g}"
        return StepResult(
            block=self.block,
            output=self.output,
            digest=digest,
            linears=rows,
            experts=experts.row if experts else None,
            unreached=self._unreached(work, factored),
            detail=detail,
            notes=tuple(f"{row.name}: {row.fallback}" for row in rows if row.fallback),
            refined=refined,
        )

    def _experts(
        self, work: Workspace, stage: Stage, loaded: LoadedBlock, stack: ExitStack
    ) -> tuple[Routing | None, StoredExperts | None]:
        """What experts that are loaded apart give, where windows run, and their factors."""
        routed = None
        if self._observes:
            source, dtype = DenseStates(self.block), work.skeleton.dtype
            routed = stack.enter_context(route(work, stage, loaded, source, dtype))
        stored = factorize_experts(
            work, stage, loaded, self.output, routed, from_analysis=self.from_analysis
        )
        if stored is not None:
            stack.callback(stored.close)
        return routed, stored

    def _factorize(
        self,
        work: Workspace,
        stage: Stage,
        loaded: LoadedBlock,
        groups: Pass,
        factored: Factored,
        routed: Routing | None,
    ) -> None:
        """Add the sites of ``groups`` that this output factors to those of earlier passes."""
        allowances = work.outline.outputs[self.output].allowances
        runs_again = work.recipe.compressed_stream
        observer = None
        if not self.from_analysis:
            observer = self._observe(work, stage, loaded, groups, routed, first=not factored)
        for site in () if runs_again else work.block_plan(self.block).others(groups):
            site.free(loaded)
        spare = sum(
            factors.spare(allowance)
            for site, factors in factored.items()
            if (allowance := allowances[site.full_name])
        )
        for group in groups:
            moment = observer.take(group) if observer else None
            if moment is not None and moment.is_empty:
                for site in () if runs_again else group.sites:
                    site.free(loaded)
                continue
            for site in group.sites:
                allowance = allowances[site.full_name]
                if allowance is None:
                    continue
                stage(f"factorizing {site.leaf}")
                allowance = replace(allowance, numbers=allowance.numbers + spare)
                factors = self._factors(work, loaded, site, moment, allowance)
                spare = factors.spare(allowance)
                moment = None if moment is None else moment.damped(factors.min_damping)
                factored[site] = factors
                if not runs_again:
                    site.free(loaded)
                elif not work.recipe.follows:
                    site.install(loaded, factors.tensors, factors.spec)

    def _factors(
        self,
        work: Workspace,
        loaded: LoadedBlock,
        site: LinearSite,
        moment: Moment | None,
        allowance: Allowance,
    ) -> Factors:
        weight = site.weight(loaded)
        if not self.from_analysis:
            return work.method.compress(site, weight, moment, allowance, work.recipe)
        row = work.analysis_row(self.block, site)
        analysis = kept.read_decomposition(work.ledger, self.block, site, row, work.device)
        return work.method.factors(site, weight, analysis, allowance, work.recipe)

    def _observe(
        self,
        work: Workspace,
        stage: Stage,
        loaded: LoadedBlock,
        groups: Pass,
        routed: Routing | None,
        *,
        first: bool,
    ) -> Observer | None:
        """Run the stream whose statistics the recipe wants; None where it wants none.

        Its output is kept by the ``first`` pass, if a step to come reads it.
        """
        if not self.reads:
            return None
        target = self._dense_target if first and not work.recipe.compressed_stream else None
        source: States = DenseStates(self.block)
        if work.recipe.statistics == "compressed":
            source = compressed_states(self.block, self.output)
        with Observer(loaded, groups, work.device) as observer:
            if groups or target:
                work.propagate(stage, "observing", loaded, source, target, routed)
        return observer

    def _follow(
        self, work: Workspace, stage: Stage, loaded: LoadedBlock, factored: Factored
    ) -> tuple[Factored, Refined | None]:
        """The factors after update and refinement, and the windows through them."""
        recipe, number = work.recipe, self.block
        for site, factors in factored.items():
            site.install(loaded, factors.tensors, factors.spec)
        refined = None
        if recipe.follows and DenseStates(number) in self.reads:
            if self._dense_target:
                with loaded.dense():
                    work.propagate(
                        stage, "forward", loaded, DenseStates(number), self._dense_target
                    )
            if factored and recipe.update:
                factored = update(work, stage, loaded, self.output, factored)
            if factored and recipe.refine:
                factored, refined = refine(work, stage, loaded, self.output, factored)
        if self._compressed_target:
            source = compressed_states(number, self.output)
            work.propagate(stage, "propagating", loaded, source, self._compressed_target)
        return factored, refined

    def _entries(
        self, work: Workspace, factored: Factored, experts: StoredExperts | None
    ) -> list[Entry]:
        """Tensors of the shard: factors, and whatever they do not replace."""
        entries = [
            Entry(f"{site.disk_name}.{leaf}", tensor.cpu())
            for site, factors in factored.items()
            for leaf, tensor in factors.tensors.items()
        ]
        names = {entry.name for entry in entries}
        if experts is not None:
            entries += experts.entries()
            names |= experts.bank.names_on_disk
        rest = work.skeleton.block_tensors(self.block)
        return entries + [Entry(info.name, info) for info in rest if info.name not in names]

    def _unreached(self, work: Workspace, factored: Factored) -> tuple[str, ...]:
        """Sites to factor that stay dense, because no calibration token reached them."""
        allowances = work.outline.outputs[self.output].allowances
        return tuple(
            site.disk_name
            for group in work.block_plan(self.block).groups
            for site in group.sites
            if allowances[site.full_name] is not None and site not in factored
        )


def _factor_bytes(outline: Outline, groups: Pass, ranks: Mapping[LinearSite, int]) -> int:
    """Factors of the sites of ``groups``, while their block is at work."""
    form, dtype = outline.form, outline.stream.dtype
    return sum(
        form.running_bytes(site.rows, site.columns, ranks[site], dtype)
        for group in groups
        for site in group.sites
        if site in ranks
    )
