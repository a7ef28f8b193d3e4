"""How long the stages of a step take, at the machine's measured rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.modeling.sites import Site
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.planning import cost
from streamcomp.planning.blocks import BlockPlan, passes_of_step
from streamcomp.planning.levers import Levers
from streamcomp.planning.outputs import OutputPlan
from streamcomp.planning.rates import MachineRates
from streamcomp.planning.schedule import Step
from streamcomp.recipe import Recipe

__all__ = ["Timing"]

# A backward, in forwards.
_REVERSE_PASSES = 2
# What a step without a block takes.
_FEW_SECONDS = 0.5
# Windows that a step of refinement runs, one at a time.
_WINDOWS_PER_STEP = 1


@dataclass(frozen=True)
class Timing:
    """Counts operations and bytes of the steps of one job; the limits that no code can beat."""

    skeleton: Skeleton
    recipe: Recipe
    rates: MachineRates
    blocks: Sequence[BlockPlan]
    stream: StreamShape
    outputs: Sequence[OutputPlan]
    analysis: bool  # whether decompositions are kept for the steps that write

    def limits(self, step: Step, levers: Levers, shard_bytes: int) -> dict[str, float]:
        """Seconds of the stages of ``step``, by their names, of which it writes ``shard_bytes``."""
        rates = self.rates
        if step.kind == "copy":
            return {"copying": shard_bytes / rates.disk_bytes}
        if step.kind == "loss":
            tokens = self.stream.tokens
            head = self.skeleton.head.weight.numel()
            return {"differentiating": 3 * 2.0 * tokens * head / rates.model_flops}
        if step.block < 0:
            return {step.kind: _FEW_SECONDS}
        block, recipe = self.blocks[step.block], self.recipe
        forward = self.stream.windows * block.trace.flops / rates.model_flops
        read = sum(info.nbytes for info in self.skeleton.block_tensors(step.block))
        limits = {"loading": read / rates.disk_bytes}
        if step.kind == "forward":
            return limits | {"forward": forward}
        passes = len(passes_of_step(step, block, recipe, self.analysis, levers))
        limits["loading"] *= passes
        if step.kind == "redo":
            factors = (self._factor_seconds(block, n) for n in range(len(self.outputs)))
            return limits | {"decomposing": self._solve_seconds(block), "factorizing": sum(factors)}
        if step.kind in ("reverse", "analyse"):
            limits["decomposing"] = self._solve_seconds(block)
            moments = self._moment_seconds(block)
            if step.kind == "analyse":
                return limits | {"observing": passes * forward + moments}
            again = len([key for key in step.writes if key.startswith("hidden")])
            twice = levers.feed_forward_tokens < self.stream.seq_len  # most of a forward
            reverse = passes * (1 + twice + _REVERSE_PASSES) * forward + moments
            return limits | {"forward": again * forward, "reverse": reverse}
        if not self.analysis:
            limits["observing"] = self._moment_seconds(block)
            if step.reads:
                limits["observing"] += passes * forward
        limits["factorizing"] = self._factor_seconds(block, step.output)
        if not self.analysis:
            limits["factorizing"] += self._solve_seconds(block)
        if any(key.startswith("compressed") for key in (*step.reads, *step.writes)):
            limits["propagating"] = forward
        if recipe.follows:
            limits["forward"] = forward
            limits["updating"] = 2 * forward if recipe.update else 0.0
            limits["refining"] = recipe.refine * self._refining_seconds(block, step.output)
        return limits | {"writing": shard_bytes / rates.disk_bytes}

    def _moment_seconds(self, block: BlockPlan) -> float:
        """The moments of a block's inputs or outputs, and of its gradients."""
        tokens = self.stream.tokens
        if self.recipe.statistics == "none":
            return 0.0
        back = [m for g in block.groups if g.gradients for m in g.sites if m.rows > m.columns]
        products = 2.0 * sum(site.tokens(tokens) * site.numel for site in back)
        moments = sum(g.tokens(tokens) * cost.moment_products(g) for g in block.groups)
        return moments / self.rates.moment_flops + products / self.rates.model_flops

    def _solve_seconds(self, block: BlockPlan) -> float:
        """Eigenvectors, and the products around them."""
        seconds = 0.0
        for group in block.groups:
            for m in group.sites:
                flops = cost.decomposition_flops(m.rows, m.columns, group.side, group.gradients)
                seconds += self.rates.eigh_seconds(min(m.rows, m.columns))
                seconds += self.rates.seconds(flops)
        return seconds

    def _factor_seconds(self, block: BlockPlan, output: int) -> float:
        form, ranks = self.recipe.form, self._ranks_so_far(block, output)
        flops = (cost.factorization_flops(m.rows, m.columns, r, form) for m, r in ranks.items())
        return sum(map(self.rates.seconds, flops))

    def _refining_seconds(self, block: BlockPlan, output: int) -> float:
        """One step of refinement: windows forward and back, and the optimizer."""
        ranks = self._ranks_so_far(block, output)
        flops = sum(cost.muon_flops(m.rows, m.columns, r) for m, r in ranks.items())
        return (3 * _WINDOWS_PER_STEP * block.trace.flops + flops) / self.rates.model_flops

    def _ranks_so_far(self, block: BlockPlan, output: int) -> dict[Site, int]:
        """Those of one output; evenly shared ones until all spectra are known."""
        ranks = self.outputs[output].ranks
        found = {linear: ranks[linear.full_name] for linear in block.targets}
        return {linear: rank for linear, rank in found.items() if rank is not None}
