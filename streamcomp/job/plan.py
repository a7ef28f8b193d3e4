"""The plan of a job: its steps, their bytes and seconds, and the levers that make it fit.

A plan is made from headers. The levers that it pulls are sizes of what runs at a time: windows per
forward (*micro-batch*), windows per forward and backward, tokens per call of the head and of a
feed-forward, sites per reading of a block, and groups of sites per pass over the windows. Each is
as large as is of use, and halved while that makes a step smaller that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.errors import RecipeError, UnsupportedModelError
from streamcomp.job.block_plan import BlockPlan, plan_blocks
from streamcomp.job.fetching import bytes_to_fetch
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.outputs import OutputPlan, Ranks, plan_outputs
from streamcomp.job.planner import Conditions, StepPlan, StepPlanner
from streamcomp.job.schedule import compression_steps, evaluation_steps, needs_analysis
from streamcomp.job.steps.base import Step
from streamcomp.machine.budget import Budget
from streamcomp.machine.session import probe
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Recipe, chosen_blocks

__all__ = ["Plan", "make_evaluation_plan", "make_plan"]

# Rows per forward above which products get no faster, and below which they are slow.
_ENOUGH_TOKENS, _FEW_TOKENS = 8192, 256


@dataclass(frozen=True)
class Plan:
    """The whole job."""

    outline: Outline
    steps: tuple[StepPlan, ...]
    levers: Levers
    budget_bytes: int
    minimum_bytes: int  # the smallest budget that some plan fits
    device_budget_bytes: int  # the same two of the GPU; 0 without one
    device_minimum_bytes: int
    baseline_bytes: int  # resident before the first step, and what products take for a while
    disk_bytes: int  # outputs, streams, analysis, journal and fetched shards together, at most
    work_bytes: int  # those of them that are in the work folder
    shard_bytes: int  # those of them that are fetched shards
    levers_seconds: float  # what levers cost that compute or read anything again

    @property
    def peak_bytes(self) -> int:
        return max(step.peak_bytes for step in self.steps)

    @property
    def device_peak_bytes(self) -> int:
        return max(step.device_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def ratio(self) -> float:
        """Share of the eligible numbers that the first output removes."""
        return self.outputs[0].reached

    @property
    def reach(self) -> float:
        """Share of the model's parameters that is eligible."""
        eligible = sum(site.numel for site in self.outline.eligible)
        return eligible / self.outline.skeleton.index.numel

    @property
    def ranks(self) -> Ranks:
        """Ranks of the first output."""
        return self.outputs[0].ranks

    @property
    def fetched_bytes(self) -> int:
        """Bytes of shards that blocks have fetched in the end; 0 where all are there."""
        steps = (planned.step for planned in self.steps)
        allowed = self.shard_bytes
        return bytes_to_fetch(self.outline.skeleton, steps, allowed) if allowed else 0

    @property
    def output_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def outputs(self) -> Sequence[OutputPlan]:
        return self.outline.outputs

    @property
    def notes(self) -> tuple[str, ...]:
        """Parts of the source's config that are not followed."""
        return self.outline.skeleton.notes

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain values, for JSON."""
        return {
            "budget_bytes": self.budget_bytes,
            "minimum_bytes": self.minimum_bytes,
            "peak_bytes": self.peak_bytes,
            "baseline_bytes": self.baseline_bytes,
            "device_budget_bytes": self.device_budget_bytes,
            "device_minimum_bytes": self.device_minimum_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "batch": self.levers.batch,
            "levers": asdict(self.levers),
            "levers_seconds": round(self.levers_seconds, 1),
            "windows": self.outline.stream.windows,
            "seq_len": self.outline.stream.seq_len,
            "seconds": round(self.seconds, 1),
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "shard_bytes": self.shard_bytes,
            "fetched_bytes": self.fetched_bytes,
            "ratio": self.ratio,
            "reach": self.reach,
            "steps": [
                {
                    "name": step.name,
                    "peak_bytes": step.peak_bytes,
                    "device_bytes": step.device_bytes,
                    "peak_phase": step.peak_phase,
                    "parts": step.parts,
                    "seconds": round(step.seconds, 2),
                    "written_bytes": step.written_bytes,
                }
                for step in self.steps
            ],
            "ranks": dict(self.ranks),
            "outputs": [
                {
                    "asked": output.asked,
                    "ratio": output.reached,
                    "bytes": output.nbytes,
                    "final": output.final,
                    "ranks": dict(output.ranks),
                }
                for output in self.outputs
            ],
            "left": self.outline.left,
            "notes": list(self.notes),
        }


def make_plan(
    skeleton: Skeleton,
    recipe: Recipe,
    conditions: Conditions,
    *,
    levers: Levers | None = None,
    ranks: Sequence[Ranks] | None = None,
    before: Plan | None = None,
) -> Plan:
    """Plan a compression; BudgetError with the smallest budget that would do.

    A GPU holds weights, moments, activations and decompositions; the host's budget has room for
    them too.

    Parameters
    ----------
    levers : Levers or None
        Fixes them, as a resumed job does; else the recipe's micro-batch, or where that is 0 the
        largest useful one that fits.
    ranks : sequence of mappings or None
        One per output: those that the spectra have led to.
    before : Plan or None
        An earlier plan of this job, whose blocks, levers and baseline are taken over. Blocks are
        traced on the CPU, which takes seconds, and while outer weights are not on a GPU yet.
    """
    if skeleton.compressed:
        raise UnsupportedModelError(
            f"{skeleton.index.folder} is already compressed by streamcomp: start from the original"
        )
    _check_seq_len(skeleton, recipe.seq_len)
    stream = StreamShape(recipe.samples, recipe.seq_len, skeleton.hidden_size, skeleton.dtype)
    if before is None:
        baseline = probe().baseline_bytes() + conditions.kernel_bytes
        on_device = conditions.device_budget > 0
        blocks: Sequence[BlockPlan] = plan_blocks(skeleton, recipe, stream, on_device=on_device)
    else:
        baseline, levers = before.baseline_bytes, before.levers
        blocks = before.outline.blocks
    analysis = conditions.keeps_analysis or needs_analysis(recipe)
    chosen = chosen_blocks(recipe.blocks, len(blocks))
    _check_sites(skeleton, recipe, blocks)
    outputs = plan_outputs(skeleton, recipe, blocks, ranks)
    outline = Outline(skeleton, recipe, stream, blocks, outputs, analysis, conditions.rates)
    steps = compression_steps(
        recipe,
        len(blocks),
        chosen,
        analysis=analysis,
        keeps_moments=conditions.keeps_work,
        from_moments=conditions.from_moments,
    )
    return _fitting(StepPlanner(outline, steps, conditions, baseline), levers)


def make_evaluation_plan(skeleton: Skeleton, stream: StreamShape, conditions: Conditions) -> Plan:
    """Plan an evaluation on windows of the shape ``stream``; BudgetError as above."""
    _check_seq_len(skeleton, stream.seq_len)
    recipe = Recipe(samples=stream.windows, seq_len=stream.seq_len)
    on_device = conditions.device_budget > 0
    blocks = plan_blocks(skeleton, recipe, stream, on_device=on_device, runs_only=True)
    outline = Outline(skeleton, recipe, stream, blocks, (), False, conditions.rates)
    baseline = probe().baseline_bytes() + conditions.kernel_bytes
    steps = evaluation_steps(len(blocks))
    return _fitting(StepPlanner(outline, steps, conditions, baseline), None)


def _fitting(planner: StepPlanner, levers: Levers | None) -> Plan:
    """The plan with the largest levers that fit, or with these ``levers``."""
    outline, conditions = planner.outline, planner.conditions
    smallest, levers = _choose_levers(planner, levers)
    steps, least = planner.steps(levers), planner.steps(smallest)
    host = Budget(
        "--max-ram",
        conditions.budget_bytes,
        max(step.peak_bytes for step in least),
        conditions.addresses,
    )
    device = Budget("--max-vram", conditions.device_budget, max(s.device_bytes for s in least))
    for step in sorted(steps, key=lambda step: -step.peak_bytes):
        purpose = f" while {step.peak_phase}"
        host.check(step.peak_bytes, step.name, purpose)
        device.check(step.device_bytes, step.name, f" of the GPU{purpose}")
    at_once = replace(
        levers,
        feed_forward_tokens=outline.stream.seq_len,
        linears=planner.most_linears,
        groups=planner.most_groups,
    )
    return Plan(
        outline,
        steps,
        levers,
        host.nbytes,
        host.minimum,
        device.nbytes,
        device.minimum if conditions.device_budget else 0,
        planner.baseline,
        planner.disk_bytes,
        planner.work_bytes,
        conditions.shard_bytes,
        planner.seconds(levers) - planner.seconds(at_once),
    )


def _check_seq_len(skeleton: Skeleton, seq_len: int) -> None:
    """RecipeError where the model has fewer positions than a window has tokens."""
    longest = getattr(skeleton.text_config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise RecipeError(f"--seq-len {seq_len}: the model has {longest} positions")


def _check_sites(skeleton: Skeleton, recipe: Recipe, blocks: Sequence[BlockPlan]) -> None:
    """RecipeError or UnsupportedModelError where there is nothing to factor."""
    eligible = any(block.sites.eligible for block in blocks)
    if not eligible and (recipe.include or recipe.exclude):
        raise RecipeError("--include and --exclude leave no linear: see streamcomp inspect")
    if not any(block.targets for block in blocks):
        reasons = sorted({why for block in blocks for why in block.sites.left.values()})
        raise UnsupportedModelError(
            f"{skeleton.index.folder}: no linear of its blocks can be factored "
            f"({'; '.join(reasons[:3])})"
        )


def _choose_levers(planner: StepPlanner, fixed: Levers | None) -> tuple[Levers, Levers]:
    """The smallest levers that are allowed, and the largest that fit (or the smallest).

    Halved one at a time, in their order, where that takes bytes off the steps that do not fit.
    Factors of earlier passes stay in memory, so the most passes need not be the smallest peak.
    """
    if fixed is not None:
        return fixed, fixed
    stream, batch = planner.outline.stream, planner.outline.recipe.batch
    budget, device_budget = planner.conditions.usable_bytes, planner.conditions.device_budget
    largest = batch or _largest_batch(stream)
    linears, groups = planner.most_linears, planner.most_groups
    chosen = Levers(largest, largest, stream.seq_len, stream.seq_len, linears, groups)
    smallest = least = Levers(batch or 1, batch or 1, 1, min(stream.seq_len, _FEW_TOKENS), 1, 1)
    for lever, most in (("linears", linears), ("groups", groups)):
        tries = [replace(least, **{lever: number}) for number in range(most, 0, -1)]
        least = min(tries, key=planner.all_bytes)

    def halved(levers: Levers) -> Iterator[Levers]:
        for lever, value in asdict(levers).items():
            while value > getattr(smallest, lever):
                value = math.ceil(value / 2)
                yield replace(levers, **{lever: value})

    over = planner.excess(planner.schedule, chosen, budget, device_budget)
    while over:
        for fewer in halved(chosen):
            # other levers only take bytes away: steps that fit need no second look
            passes = (fewer.linears, fewer.groups) != (chosen.linears, chosen.groups)
            again: Sequence[Step] = planner.schedule if passes else list(over)
            now = planner.excess(again, fewer, budget, device_budget)
            if sum(now.values()) < sum(over.values()):
                chosen, over = fewer, now
                break
        else:
            return least, least
    return least, chosen


def _largest_batch(stream: StreamShape) -> int:
    """The largest power of two of windows that is useful."""
    useful = max(1, min(stream.windows, _ENOUGH_TOKENS // stream.seq_len))
    return 1 << (useful.bit_length() - 1)
