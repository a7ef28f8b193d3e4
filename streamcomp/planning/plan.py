"""What a job will do: its steps, their bytes and seconds, and the levers that make it fit.

A plan is made from headers. The one lever that it pulls is the number of windows per
forward (*micro-batch*): large enough for fast products, halved until every step fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, group_moments, moment_dtype
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.errors import BudgetError, RecipeError, UnsupportedModelError
from streamcomp.linalg.allocation import stored_numbers, uniform_ranks
from streamcomp.modeling.linears import BlockLinears, Linear, find_linears
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.modeling.tracing import BlockTrace, trace_block
from streamcomp.planning import cost
from streamcomp.planning.meter import resident_bytes
from streamcomp.recipe import Recipe
from streamcomp.units import format_bytes

__all__ = [
    "BlockPlan",
    "MachineRates",
    "Plan",
    "StepPlan",
    "make_evaluation_plan",
    "make_plan",
    "measure_rates",
]

# Rows per forward above which products get no faster.
_ENOUGH_TOKENS = 8192
# Share added to what the formulas count, for what the allocator rounds up.
_SLACK = 1.05
_NOTHING = "(?!)"  # a regular expression that matches no name
# Disk for what is written beside the tensors: the plugin, the report, and their lines in it.
_TEXT_BYTES, _TEXT_BYTES_PER_TENSOR = 256 * 2**10, 2 * 2**10
_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# By which the baseline differs from one process to the next.
_DRIFT_BYTES = 2 * 2**20


@dataclass(frozen=True)
class MachineRates:
    """Measured speed of this machine, operations per second."""

    model_flops: float  # products in the model's dtype
    moment_flops: float  # products in the moments' dtype
    solve_flops: float  # eigh in fp64, counted as 9 n^3


@dataclass(frozen=True)
class StepPlan:
    """One step: what it is called, the most it holds, how long it takes."""

    name: str
    peak_bytes: int  # resident at the peak, interpreter and libraries included
    peak_phase: str
    parts: dict[str, int]  # the peak by what it is for
    seconds: float
    written_bytes: int


@dataclass(frozen=True)
class BlockPlan:
    """One block: its linears, the moments that serve them, and the rank of each."""

    number: int
    name: str
    linears: BlockLinears
    groups: tuple[MomentGroup, ...]
    ranks: dict[str, int | None]  # by full name; None = dense
    trace: BlockTrace
    cost: cost.BlockCost


@dataclass(frozen=True)
class Plan:
    """The whole job."""

    blocks: tuple[BlockPlan, ...]
    steps: tuple[StepPlan, ...]
    batch: int  # windows per forward
    budget_bytes: int
    minimum_bytes: int  # the least budget that some plan fits
    baseline_bytes: int  # resident before the first step
    stream: StreamShape
    output_bytes: int
    disk_bytes: int  # output, streams and journal together, at most
    ratio: float  # share of the eligible numbers that is removed

    @property
    def peak_bytes(self) -> int:
        return max(step.peak_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @cached_property
    def ranks(self) -> dict[str, int | None]:
        return {name: rank for block in self.blocks for name, rank in block.ranks.items()}

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears.eligible]

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
            "batch": self.batch,
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
                    "peak_phase": step.peak_phase,
                    "parts": step.parts,
                    "seconds": round(step.seconds, 2),
                    "written_bytes": step.written_bytes,
                }
                for step in self.steps
            ],
            "ranks": self.ranks,
            "left": self.left,
        }


def make_plan(
    skeleton: Skeleton,
    recipe: Recipe,
    budget_bytes: int,
    rates: MachineRates,
    *,
    batch: int | None = None,
    memory_backed: bool = False,
) -> Plan:
    """Plan a compression within ``budget_bytes``; BudgetError with the least that would do.

    ``batch`` fixes the micro-batch, as a resumed job does; else the recipe's, or where that
    is 0 the largest useful one that fits. ``memory_backed`` says that the work folder lies
    in memory, so that the streams count in the budget.
    """
    if skeleton.compressed:
        raise UnsupportedModelError(
            f"{skeleton.index.folder} is already compressed by streamcomp: start from the original"
        )
    check_seq_len(skeleton, recipe.seq_len)
    baseline = resident_bytes()
    stream = StreamShape(recipe.samples, recipe.seq_len, skeleton.hidden_size, skeleton.dtype)
    blocks = plan_blocks(skeleton, recipe, stream)
    planner = _Planner(skeleton, recipe, rates, blocks, stream, baseline, memory_backed)
    fixed = batch or recipe.batch
    least, chosen = _choose_batch(planner, fixed, budget_bytes)
    steps = planner.steps(chosen)
    minimum = _budget_for(max(step.peak_bytes for step in planner.steps(least)))
    peak = max(steps, key=lambda step: step.peak_bytes)
    if peak.peak_bytes > budget_bytes:
        raise BudgetError(
            f"{peak.name} needs {format_bytes(peak.peak_bytes)} to {peak.peak_phase}, the budget "
            f"is {format_bytes(budget_bytes)}: --max-ram {minimum // 2**20}M fits",
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
        )
    return planner.plan(steps, chosen, budget_bytes, minimum)


def make_evaluation_plan(
    skeleton: Skeleton, stream: StreamShape, budget_bytes: int, *, memory_backed: bool = False
) -> tuple[int, int, int]:
    """Windows per forward, tokens per call of the head, and the predicted peak, for ``eval``.

    BudgetError where one window, or the head with one token, does not fit.
    """
    check_seq_len(skeleton, stream.seq_len)
    baseline = resident_bytes() + (2 * stream.nbytes if memory_backed else 0)
    blocks = plan_blocks(skeleton, Recipe(seq_len=stream.seq_len, include=_NOTHING), stream)
    vocabulary = skeleton.embedding_source.shape[0]

    def forward(batch: int) -> int:
        return baseline + _with_slack(
            max(
                max(
                    b.cost.weight_bytes
                    + max(
                        b.cost.merge_bytes,
                        2 * batch * (b.cost.activation_bytes + stream.window_bytes),
                    )
                    for b in blocks
                ),
                cost.embed_bytes(stream, batch, vocabulary),
            )
        )

    def head(tokens: int) -> int:
        return baseline + _with_slack(
            cost.head_bytes(_head_bytes(skeleton), vocabulary, tokens) + stream.window_bytes
        )

    batch, tokens = _largest_batch(stream), stream.seq_len
    while batch > 1 and forward(batch) > budget_bytes:
        batch //= 2
    while tokens > 1 and head(tokens) > budget_bytes:
        tokens = math.ceil(tokens / 2)
    peak = max(forward(batch), head(tokens))
    if peak > budget_bytes:
        minimum = _budget_for(max(forward(1), head(1)))
        raise BudgetError(
            f"evaluation needs {format_bytes(peak)}, the budget is {format_bytes(budget_bytes)}: "
            f"--max-ram {minimum // 2**20}M fits",
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
        )
    return batch, tokens, peak


def plan_blocks(skeleton: Skeleton, recipe: Recipe, stream: StreamShape) -> list[BlockPlan]:
    """Linears, groups and ranks of every block; one trace per kind of block."""
    _, calls = skeleton.dry_record(1, stream.seq_len)
    hidden = torch.empty(1, stream.seq_len, stream.hidden, dtype=stream.dtype, device="meta")
    traces: dict[tuple[Any, ...], BlockTrace] = {}
    found = [
        find_linears(skeleton, number, recipe.include, recipe.exclude)
        for number in range(len(skeleton))
    ]
    linears = [linear for block in found for linear in block.eligible]
    shapes = [(linear.rows, linear.columns) for linear in linears]
    shares = uniform_ranks(shapes, recipe.ratio, recipe.form)
    ranks = {linear.full_name: rank for linear, rank in zip(linears, shares, strict=True)}
    blocks = []
    for number, block in enumerate(found):
        kind = (*skeleton.block_kind(number), tuple(linear.name for linear in block.eligible))
        if kind not in traces:
            modules = {
                linear.name: skeleton.block(number).get_submodule(linear.name)
                for linear in block.eligible
            }
            traces[kind] = trace_block(skeleton.block(number), modules, hidden, calls[number])
        trace = traces[kind]
        factored = [linear for linear in block.eligible if ranks[linear.full_name] is not None]
        groups = group_moments(factored, trace.groups)
        own = {linear.full_name: ranks[linear.full_name] for linear in block.eligible}
        weight_bytes = sum(
            value.numel() * value.element_size()
            for value in skeleton.block(number).state_dict().values()
        )
        blocks.append(
            BlockPlan(
                number,
                skeleton.block_name(number),
                block,
                groups,
                own,
                trace,
                cost.BlockCost(
                    weight_bytes,
                    _merge_bytes(skeleton, number),
                    trace.activation_bytes,
                    stream,
                    groups,
                    own,
                    recipe.form,
                ),
            )
        )
    return blocks


def _merge_bytes(skeleton: Skeleton, number: int) -> int:
    """Bytes of the tensors that are held beside the one parameter that they become."""
    sources = skeleton.block_parameters(number).values()
    return max((sum(i.nbytes for i in infos) for infos in sources if len(infos) > 1), default=0)


def measure_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """Time small products and one eigh; takes about a second."""
    moments = moment_dtype(dtype)

    def product(kind: torch.dtype, size: int) -> float:
        # as a linear does it: a plain product in fp16 takes the CPU twenty times as long
        left = torch.ones(size, size, dtype=kind, device=device)
        run = torch.nn.functional.linear
        return 2.0 * size**3 / _best_seconds(lambda: run(left, left), device)

    solve = torch.eye(384, dtype=torch.float64, device=device)
    return MachineRates(
        product(dtype, 1024),
        product(moments, 1024),
        9.0 * 384**3 / _best_seconds(lambda: torch.linalg.eigh(solve), device),
    )


def check_seq_len(skeleton: Skeleton, seq_len: int) -> None:
    """RecipeError where the model has fewer positions than a window has tokens."""
    longest = getattr(skeleton.text_config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise RecipeError(f"--seq-len {seq_len}: the model has {longest} positions")


class _Planner:
    """Steps of one job for any micro-batch."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        rates: MachineRates,
        blocks: list[BlockPlan],
        stream: StreamShape,
        baseline: int,
        memory_backed: bool,
    ) -> None:
        self.skeleton, self.recipe, self.rates = skeleton, recipe, rates
        self.blocks, self.stream, self.baseline = blocks, stream, baseline
        self.in_memory = 2 * stream.nbytes if memory_backed else 0
        eligible = [linear for block in blocks for linear in block.linears.eligible]
        if not eligible and (recipe.include or recipe.exclude):
            raise RecipeError("--include and --exclude leave no linear: see streamcomp inspect")
        if not any(rank is not None for block in blocks for rank in block.ranks.values()):
            reasons = sorted({why for block in blocks for why in block.linears.left.values()})
            raise UnsupportedModelError(
                f"{skeleton.index.folder}: no linear of its blocks can be factored "
                f"({'; '.join(reasons[:3])})"
            )
        ranks = {name: rank for block in blocks for name, rank in block.ranks.items()}
        kept = sum(_numbers(recipe.form, linear, ranks[linear.full_name]) for linear in eligible)
        total = sum(linear.numel for linear in eligible)
        self.ratio = 1 - kept / total

    def steps(self, batch: int) -> tuple[StepPlan, ...]:
        compressed = self.recipe.statistics == "compressed"
        vocabulary = self.skeleton.embedding_source.shape[0]
        tokenizer = self.skeleton.index.folder / "tokenizer.json"
        steps = [
            self._step(
                "tokenize",
                [
                    cost.Phase(
                        "tokenize",
                        {
                            "tokenizer": cost.tokenize_bytes(
                                tokenizer.stat().st_size if tokenizer.exists() else 0,
                                self.stream.windows,
                                self.stream.seq_len,
                            )
                        },
                    )
                ],
                seconds=1.0,
                written=4 * self.stream.windows * self.stream.seq_len,
            ),
            self._step(
                "embed",
                [
                    cost.Phase(
                        "embed",
                        {"embeddings": cost.embed_bytes(self.stream, batch, vocabulary)},
                    )
                ],
                seconds=0.5,
                written=self.stream.nbytes,
            ),
        ]
        for block in self.blocks:
            steps.append(
                self._step(
                    f"block {block.number}",
                    block.cost.phases(batch, propagates_factors=compressed),
                    seconds=self._block_seconds(block, passes=2 if compressed else 1),
                    written=self.stream.nbytes + self._block_bytes(block),
                )
            )
        other = sum(info.nbytes for info in self.skeleton.other_tensors())
        steps.append(
            self._step(
                "copy the rest",
                [cost.Phase("copy", {"buffers": 2 * COPY_BYTES})],
                seconds=other / 500e6,
                written=other,
            )
        )
        return tuple(steps)

    def plan(self, steps: tuple[StepPlan, ...], batch: int, budget: int, minimum: int) -> Plan:
        output = sum(map(self._block_bytes, self.blocks)) + steps[-1].written_bytes
        return Plan(
            tuple(self.blocks),
            steps,
            batch,
            budget,
            minimum,
            self.baseline,
            self.stream,
            output,
            output
            + 2 * self.stream.nbytes
            + 4 * self.stream.windows * self.stream.seq_len
            + self._text_bytes(),
            self.ratio,
        )

    def _text_bytes(self) -> int:
        """What lies beside tensors at most: headers, journal, report, tokenizer."""
        index = self.skeleton.index
        companions = sum(
            path.stat().st_size
            for path in index.folder.iterdir()
            if path.suffix in _COMPANIONS and path.is_file()
        )
        return companions + _TEXT_BYTES + _TEXT_BYTES_PER_TENSOR * len(index.tensors)

    def _step(
        self, name: str, phases: Sequence[cost.Phase], seconds: float, written: int
    ) -> StepPlan:
        peak = max(phases, key=lambda phase: phase.nbytes)
        total = self.baseline + self.in_memory + _with_slack(peak.nbytes)
        return StepPlan(name, total, peak.name, dict(peak.parts), seconds, written)

    def _block_seconds(self, block: BlockPlan, passes: int) -> float:
        tokens = self.stream.windows * self.stream.seq_len
        forward = passes * self.stream.windows * block.trace.flops / self.rates.model_flops
        moments = sum(2.0 * tokens * group.size**2 for group in block.groups)
        solve = sum(
            cost.decomposition_flops(linear.rows, linear.columns, rank, group.side)
            for group in block.groups
            for linear in group.linears
            if (rank := block.ranks[linear.full_name]) is not None
        )
        return forward + moments / self.rates.moment_flops + solve / self.rates.solve_flops

    def _block_bytes(self, block: BlockPlan) -> int:
        """Bytes of a block's shard in the output."""
        total = sum(info.nbytes for info in self.skeleton.block_tensors(block.number))
        for linear in block.linears.eligible:
            rank = block.ranks[linear.full_name]
            if rank is not None:
                item = linear.source.nbytes // linear.numel
                total += item * _numbers(self.recipe.form, linear, rank) - linear.source.nbytes
                total += 4 * linear.rows if self.recipe.form == "pivot" else 0
        return total


def _choose_batch(planner: _Planner, fixed: int, budget: int) -> tuple[int, int]:
    """The least micro-batch that is allowed, and the largest that fits (or the least)."""
    if fixed:
        return fixed, fixed
    batch = _largest_batch(planner.stream)
    while batch > 1 and max(step.peak_bytes for step in planner.steps(batch)) > budget:
        batch //= 2
    return 1, batch


def _largest_batch(stream: StreamShape) -> int:
    """The largest power of two of windows that is useful."""
    useful = max(1, min(stream.windows, _ENOUGH_TOKENS // stream.seq_len))
    return 1 << (useful.bit_length() - 1)


def _numbers(form: str, linear: Linear, rank: int | None) -> int:
    return linear.numel if rank is None else stored_numbers(form, linear.rows, linear.columns, rank)


def _with_slack(counted: int) -> int:
    return int(_SLACK * counted) + cost.LATE_BYTES


def _budget_for(peak: int) -> int:
    """Whole MiB above ``peak``, enough also for a process that begins a little larger."""
    return -(-(peak + _DRIFT_BYTES) // 2**20) * 2**20


def _head_bytes(skeleton: Skeleton) -> int:
    return skeleton.head.weight.numel() * skeleton.dtype.itemsize


def _best_seconds(work: Any, device: torch.device, repeats: int = 3) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
