"""What a job will do: its steps, their bytes and seconds, and the levers that make it fit.

A plan is made from headers. The levers that it pulls are sizes of what runs at a time: windows per
forward (*micro-batch*), windows per forward and backward, tokens per call of the head and of a
feed-forward, linears per reading of a block, and groups of linears per pass over the windows. Each
is as large as is of use, and halved while that makes a step smaller that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.errors import RecipeError, UnsupportedModelError
from streamcomp.modeling.sites import Site
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.planning import cost
from streamcomp.planning.blocks import BlockPlan, plan_blocks
from streamcomp.planning.levers import Budget, Levers
from streamcomp.planning.meter import CONTEXT_BYTES, WORKSPACE_BYTES, release, resident_bytes
from streamcomp.planning.outputs import OutputPlan, Ranks
from streamcomp.planning.rates import MachineRates
from streamcomp.planning.schedule import needs_analysis
from streamcomp.planning.steps import StepPlan, StepPlanner, head_weight_bytes, with_slack
from streamcomp.recipe import Recipe

__all__ = ["Plan", "make_evaluation_plan", "make_plan"]

# Rows per forward above which products get no faster, and below which they are slow.
_ENOUGH_TOKENS, _FEW_TOKENS = 8192, 256
_NOTHING = "(?!)"  # a regular expression that matches no name


@dataclass(frozen=True)
class Plan:
    """The whole job."""

    blocks: tuple[BlockPlan, ...]
    outputs: tuple[OutputPlan, ...]
    steps: tuple[StepPlan, ...]
    levers: Levers
    analysis: bool  # decompositions are kept in the work folder before any factor is written
    budget_bytes: int
    minimum_bytes: int  # the least budget that some plan fits
    device_budget_bytes: int  # the same two of the GPU; 0 without one
    device_minimum_bytes: int
    baseline_bytes: int  # resident before the first step, and what products take for a while
    stream: StreamShape
    disk_bytes: int  # outputs, streams, analysis and journal together, at most
    work_bytes: int  # those of them that lie in the work folder
    levers_seconds: float  # what levers cost that compute or read anything again
    notes: tuple[str, ...]  # what of the source is not followed

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
    def ranks(self) -> Ranks:
        """Ranks of the first output."""
        return self.outputs[0].ranks

    @property
    def output_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def linears(self) -> list[Site]:
        return [linear for block in self.blocks for linear in block.linears.eligible]

    @property
    def chosen(self) -> list[Site]:
        """The linears to factor, block after block."""
        return [linear for block in self.blocks for linear in block.targets]

    @property
    def left(self) -> dict[str, str]:
        return {name: why for block in self.blocks for name, why in block.linears.left.items()}

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
            "windows": self.stream.windows,
            "seq_len": self.stream.seq_len,
            "seconds": round(self.seconds, 1),
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "ratio": self.ratio,
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
            "left": self.left,
            "notes": list(self.notes),
        }


def make_plan(
    skeleton: Skeleton,
    recipe: Recipe,
    budget_bytes: int,
    rates: MachineRates,
    *,
    levers: Levers | None = None,
    ranks: Sequence[Ranks] | None = None,
    blocks: Sequence[BlockPlan] | None = None,
    analysis: bool = False,
    keep_work: bool = False,
    baseline: int | None = None,
    kernel_bytes: int = 0,
    memory_backed: bool = False,
    output_in_memory: bool = False,
    device_budget: int = 0,
    redo: Sequence[int] = (),
) -> Plan:
    """Plan a compression within ``budget_bytes``; BudgetError with the least that would do.

    ``device_budget`` is the same of the GPU, 0 for a job on the CPU. A GPU holds weights, moments,
    activations and decompositions; the host's budget has room for them too.

    ``levers`` fixes them, as a resumed job does; else the recipe's micro-batch, or where that
    is 0 the largest useful one that fits. ``ranks``, one mapping per output, are those that the
    spectra have led to, ``blocks`` those of an earlier plan: they are traced on the CPU, which
    takes seconds, and outer weights that are not on a GPU yet. ``analysis`` keeps decompositions
    also where one output alone needs none, ``keep_work`` keeps them and the moments behind the
    end. ``kernel_bytes`` are what :func:`~streamcomp.planning.meter.warm_up` measured.
    ``memory_backed`` says that the work folder lies in memory, so that what is in it counts
    in the budget, ``output_in_memory`` the same of OUT. ``redo`` plans no compression but new
    factors for those blocks, from kept moments.
    """
    if skeleton.compressed:
        raise UnsupportedModelError(
            f"{skeleton.index.folder} is already compressed by streamcomp: start from the original"
        )
    check_seq_len(skeleton, recipe.seq_len)
    release()
    baseline = resident_bytes() + kernel_bytes if baseline is None else baseline
    stream = StreamShape(recipe.samples, recipe.seq_len, skeleton.hidden_size, skeleton.dtype)
    if blocks is None:
        blocks = plan_blocks(skeleton, recipe, stream, on_device=device_budget > 0)
    analysis = analysis or needs_analysis(recipe)
    planner = StepPlanner(
        skeleton,
        recipe,
        rates,
        blocks,
        stream,
        baseline,
        memory_backed,
        output_in_memory,
        ranks,
        analysis,
        keep_work,
        on_device=device_budget > 0,
        redo=redo,
    )
    least, chosen = _choose_levers(planner, levers, recipe.batch, budget_bytes, device_budget)
    steps, smallest = planner.steps(chosen), planner.steps(least)
    host = Budget("--max-ram", budget_bytes, max(step.peak_bytes for step in smallest))
    device = Budget("--max-vram", device_budget, max(step.device_bytes for step in smallest))
    for step in sorted(steps, key=lambda step: -step.peak_bytes):
        purpose = f" to {step.peak_phase}" if step.peak_phase != step.name else ""
        host.check(step.peak_bytes, step.name, purpose)
        device.check(step.device_bytes, step.name, f" of the GPU{purpose}")
    return _assembled(planner, steps, chosen, host, device)


def _assembled(
    planner: StepPlanner,
    steps: tuple[StepPlan, ...],
    levers: Levers,
    host: Budget,
    device: Budget,
) -> Plan:
    """The plan of those ``steps``, and what its levers cost over a plan that pulls none."""
    at_once = replace(
        levers,
        feed_forward_tokens=planner.stream.seq_len,
        linears=planner.most_linears,
        groups=planner.most_groups,
    )
    return Plan(
        tuple(planner.blocks),
        tuple(planner.outputs),
        steps,
        levers,
        planner.analysis,
        host.nbytes,
        host.minimum,
        device.nbytes,
        device.minimum if planner.on_device else 0,
        planner.baseline,
        planner.stream,
        planner.disk_bytes,
        planner.work_bytes,
        sum(step.seconds for step in steps) - planner.seconds(at_once),
        planner.skeleton.notes,
    )


def make_evaluation_plan(
    skeleton: Skeleton,
    stream: StreamShape,
    budget_bytes: int,
    *,
    kernel_bytes: int = 0,
    memory_backed: bool = False,
    device_budget: int = 0,
) -> tuple[int, int, int]:
    """Windows per forward, tokens per call of the head, and the predicted peak, for ``eval``.

    BudgetError where one window, or the head with one token, does not fit.
    """
    check_seq_len(skeleton, stream.seq_len)
    release()
    baseline = resident_bytes() + kernel_bytes + (2 * stream.nbytes if memory_backed else 0)
    recipe = Recipe(seq_len=stream.seq_len, include=_NOTHING)
    blocks = plan_blocks(skeleton, recipe, stream, on_device=device_budget > 0)
    vocabulary, known = skeleton.embedding_source.shape[0], blocks[0].cost
    twice = 1 + skeleton.compressed  # pivoted linears put their outputs in order

    def forward(batch: int) -> int:
        running = max(
            b.cost.weight_bytes
            + max(
                b.cost.merge_bytes,
                twice * batch * (b.cost.activation_bytes + stream.window_bytes),
            )
            for b in blocks
        )
        embedding = cost.embed_bytes(stream, batch, vocabulary, known.record_bytes)
        return with_slack(max(running, embedding) + known.call_bytes)

    def head(tokens: int) -> int:
        return with_slack(
            cost.head_bytes(head_weight_bytes(skeleton), vocabulary, tokens)
            + stream.window_bytes
            + known.record_again_bytes(tokens)
            + known.call_bytes
        )

    least = max(forward(1), head(1))
    budgets = [Budget("--max-ram", budget_bytes, baseline + least)]
    room = budget_bytes - baseline
    if device_budget:
        libraries = CONTEXT_BYTES + WORKSPACE_BYTES
        budgets.append(Budget("--max-vram", device_budget, libraries + least))
        room = min(room, device_budget - libraries)
    for budget in budgets:
        budget.check(budget.least, "evaluation")
    batch, tokens = _largest_batch(stream), stream.seq_len
    while batch > 1 and forward(batch) > room:
        batch //= 2
    while tokens > 1 and head(tokens) > room:
        tokens = math.ceil(tokens / 2)
    return batch, tokens, baseline + max(forward(batch), head(tokens))


def check_seq_len(skeleton: Skeleton, seq_len: int) -> None:
    """RecipeError where the model has fewer positions than a window has tokens."""
    longest = getattr(skeleton.text_config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise RecipeError(f"--seq-len {seq_len}: the model has {longest} positions")


def _choose_levers(
    planner: StepPlanner, fixed: Levers | None, batch: int, budget: int, device_budget: int
) -> tuple[Levers, Levers]:
    """The least levers that are allowed, and the largest that fit (or the least).

    Halved one at a time, in their order, where that takes bytes off the steps that do not fit.
    What a pass has made lies beside the next: the most passes need not be the least bytes.
    """
    if fixed is not None:
        return fixed, fixed
    largest = batch or _largest_batch(planner.stream)
    linears, groups = planner.most_linears, planner.most_groups
    seq_len = planner.stream.seq_len
    chosen = Levers(largest, largest, seq_len, seq_len, linears, groups)
    smallest = least = Levers(batch or 1, batch or 1, 1, min(seq_len, _FEW_TOKENS), 1, 1)
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
            again = planner.schedule if passes else list(over)
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
