"""What a job will do: its steps, their bytes and seconds, and the levers that make it fit.

A plan is made from headers. The levers that it pulls are sizes of what runs at a time: windows per
forward (*micro-batch*), windows per forward and backward, tokens per call of the head and of a
feed-forward, linears per reading of a block, and groups of linears per pass over the windows. Each
is as large as is of use, and halved while that makes a step smaller that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import (
    MomentGroup,
    group_moments,
    moment_dtype,
)
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.errors import BudgetError, RecipeError, UnsupportedModelError
from streamcomp.linalg.symmetric import solve_dtype
from streamcomp.modeling.linears import BlockLinears, Linear, find_linears
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.modeling.tracing import BlockTrace, trace_block
from streamcomp.planning import cost
from streamcomp.planning.cost import BlockCost
from streamcomp.planning.meter import CONTEXT_BYTES, release, resident_bytes
from streamcomp.planning.outputs import (
    OutputPlan,
    Ranks,
    asked_ratios,
    block_saving,
    can_be_factored,
    plan_output,
)
from streamcomp.planning.rates import MachineRates
from streamcomp.planning.schedule import Step, hidden_key, live_after, schedule
from streamcomp.recipe import Recipe, chosen_blocks
from streamcomp.units import format_bytes

__all__ = [
    "BlockPlan",
    "Levers",
    "Plan",
    "StepPlan",
    "can_be_analysed",
    "gradient_dtype",
    "make_evaluation_plan",
    "make_plan",
    "passes_of_step",
]

# Rows per forward above which products get no faster, and below which they are slow.
_ENOUGH_TOKENS, _FEW_TOKENS = 8192, 256
# Share added to what the formulas count, for what the allocator rounds up.
_SLACK = 1.05
_NOTHING = "(?!)"  # a regular expression that matches no name
# Disk for what is written beside the tensors: the plugin, the report, and their lines in it.
_TEXT_BYTES, _TEXT_BYTES_PER_TENSOR = 256 * 2**10, 2 * 2**10
_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# By which the baseline differs from one process to the next.
_DRIFT_BYTES = 2 * 2**20
# A backward, in forwards.
_REVERSE_PASSES = 2
# What a step without a block takes.
_FEW_SECONDS = 0.5
# Kinds of steps that never use a GPU.
_ON_HOST = ("tokenize", "ranks", "copy")
# Windows that a step of refinement runs, one at a time.
_WINDOWS_PER_STEP = 1


@dataclass(frozen=True)
class Levers:
    """What runs at a time; a job keeps those that it began with, for they change rounding.

    All but ``linears`` and ``groups``, which cost time alone: a block is read once for every so
    many of its linears where they are factored from kept decompositions, and read and run once
    for every so many of its groups where their moments are taken.
    """

    batch: int  # windows per forward
    reverse_batch: int  # windows per forward and backward
    head_tokens: int  # tokens per call of the head
    feed_forward_tokens: int  # tokens of each window per call of a block's feed-forward
    linears: int  # linears per reading of a block, where no window runs
    groups: int  # moment groups of a block per pass over the windows

    @classmethod
    def of_journal(cls, held: Mapping[str, Any]) -> Levers:
        """Those that a job began with, among what its journal's header holds."""
        return cls(**{field.name: held[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class StepPlan:
    """One step: what it is called, the most it holds, how long it takes."""

    step: Step
    peak_bytes: int  # resident at the peak, interpreter and libraries included
    device_bytes: int  # of the GPU at the peak, its driver and libraries included; 0 without one
    peak_phase: str
    parts: dict[str, int]  # the peak by what it is for
    limits: dict[str, float]  # seconds of its stages, at the machine's measured rates
    written_bytes: int

    @property
    def seconds(self) -> float:
        return sum(self.limits.values())

    @property
    def name(self) -> str:
        return self.step.name


@dataclass(frozen=True)
class BlockPlan:
    """One block: its linears, and the moments that serve those to be factored."""

    number: int
    name: str
    linears: BlockLinears
    groups: tuple[MomentGroup, ...]
    trace: BlockTrace
    cost: BlockCost
    retrace: Callable[[int], BlockTrace]  # with so many tokens per call of the feed-forward

    def cost_with(self, levers: Levers) -> BlockCost:
        """``cost`` where the feed-forward runs as many tokens at a time as ``levers`` say."""
        if levers.feed_forward_tokens >= self.cost.stream.seq_len:
            return self.cost
        trace = self.retrace(levers.feed_forward_tokens)
        if not trace.exact:  # an estimate knows of no chunks
            return self.cost
        return replace(
            self.cost,
            activation_bytes=trace.activation_bytes,
            autograd_bytes=trace.autograd_bytes,
        )

    @property
    def targets(self) -> list[Linear]:
        """The linears to factor, in the order in which they are decomposed."""
        return [linear for group in self.groups for linear in group.linears]

    def passes(self, levers: Levers, *, observed: bool = True) -> list[tuple[MomentGroup, ...]]:
        """What a step works on each time that it reads the block: some groups, one time at least.

        ``levers.groups`` at a time where they are ``observed``; else ``levers.linears``, each in a
        group of its own.
        """
        if observed:
            groups, size = self.groups, levers.groups
        else:
            groups = tuple(replace(g, linears=(m,)) for g in self.groups for m in g.linears)
            size = levers.linears
        return [groups[start : start + size] for start in range(0, max(1, len(groups)), size)]

    def others(self, groups: Sequence[MomentGroup]) -> list[Linear]:
        """The linears that are in none of ``groups``: their weights are not needed with them."""
        needed = {linear.name for group in groups for linear in group.linears}
        return [linear for linear in self.linears.eligible if linear.name not in needed]


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
    baseline_bytes: int  # resident before the first step
    stream: StreamShape
    disk_bytes: int  # outputs, streams, analysis and journal together, at most
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
    def ranks(self) -> Ranks:
        """Ranks of the first output."""
        return self.outputs[0].ranks

    @property
    def output_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears.eligible]

    @property
    def chosen(self) -> list[Linear]:
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
        }


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a backward runs in: fp16 is too narrow for gradients, they take fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


def make_plan(
    skeleton: Skeleton,
    recipe: Recipe,
    budget_bytes: int,
    rates: MachineRates,
    *,
    levers: Levers | None = None,
    ranks: Sequence[Ranks] | None = None,
    analysis: bool = False,
    keep_work: bool = False,
    baseline: int | None = None,
    memory_backed: bool = False,
    device_budget: int = 0,
) -> Plan:
    """Plan a compression within ``budget_bytes``; BudgetError with the least that would do.

    ``device_budget`` is the same of the GPU, 0 for a job on the CPU. A GPU holds weights, moments,
    activations and decompositions; the host's budget has room for them too.

    ``levers`` fixes them, as a resumed job does; else the recipe's micro-batch, or where that
    is 0 the largest useful one that fits. ``ranks``, one mapping per output, are those that the
    spectra have led to. ``analysis`` keeps decompositions also where one output alone needs none,
    ``keep_work`` keeps them and the moments behind the end. ``memory_backed`` says that the work
    folder lies in memory, so that what is in it counts in the budget.
    """
    if skeleton.compressed:
        raise UnsupportedModelError(
            f"{skeleton.index.folder} is already compressed by streamcomp: start from the original"
        )
    check_seq_len(skeleton, recipe.seq_len)
    release()
    baseline = resident_bytes() if baseline is None else baseline
    stream = StreamShape(recipe.samples, recipe.seq_len, skeleton.hidden_size, skeleton.dtype)
    blocks = plan_blocks(skeleton, recipe, stream)
    analysis = analysis or needs_analysis(recipe)
    planner = _Planner(
        skeleton,
        recipe,
        rates,
        blocks,
        stream,
        baseline,
        memory_backed,
        ranks,
        analysis,
        keep_work,
        on_device=device_budget > 0,
    )
    least, chosen = _choose_levers(planner, levers, recipe.batch, budget_bytes, device_budget)
    steps, smallest = planner.steps(chosen), planner.steps(least)
    host = _Budget("--max-ram", budget_bytes, max(step.peak_bytes for step in smallest))
    device = _Budget("--max-vram", device_budget, max(step.device_bytes for step in smallest))
    for step in sorted(steps, key=lambda step: -step.peak_bytes):
        host.check(step.peak_bytes, step.name, f" to {step.peak_phase}")
        device.check(step.device_bytes, step.name, f" of the GPU to {step.peak_phase}")
    return planner.plan(steps, chosen, host, device)


def can_be_analysed(recipe: Recipe) -> bool:
    """Whether decompositions depend on the dense model alone, and one serves every output."""
    return recipe.statistics == "dense" and recipe.method != "swsc" and not recipe.centred


def passes_of_step(
    step: Step, block: BlockPlan, recipe: Recipe, analysis: bool, levers: Levers
) -> list[tuple[MomentGroup, ...]]:
    """The groups that ``step`` works on each time that it reads its ``block``.

    All at once where its factors run together on the compressed stream.
    """
    if step.kind == "block" and recipe.compressed_stream:
        return [block.groups]
    return block.passes(levers, observed=step.kind != "block" or not analysis)


def needs_analysis(recipe: Recipe) -> bool:
    """Whether decompositions have to be kept before any factor is written."""
    several = len(recipe.ratios) > 1
    return recipe.two_sided or recipe.allocation == "loss" or (several and can_be_analysed(recipe))


def make_evaluation_plan(
    skeleton: Skeleton,
    stream: StreamShape,
    budget_bytes: int,
    *,
    memory_backed: bool = False,
    device_budget: int = 0,
) -> tuple[int, int, int]:
    """Windows per forward, tokens per call of the head, and the predicted peak, for ``eval``.

    BudgetError where one window, or the head with one token, does not fit.
    """
    check_seq_len(skeleton, stream.seq_len)
    release()
    baseline = resident_bytes() + (2 * stream.nbytes if memory_backed else 0)
    blocks = plan_blocks(skeleton, Recipe(seq_len=stream.seq_len, include=_NOTHING), stream)
    vocabulary = skeleton.embedding_source.shape[0]

    def forward(batch: int) -> int:
        return _with_slack(
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
        return _with_slack(
            cost.head_bytes(_head_bytes(skeleton), vocabulary, tokens) + stream.window_bytes
        )

    least = max(forward(1), head(1))
    budgets = [_Budget("--max-ram", budget_bytes, baseline + least)]
    room = budget_bytes - baseline
    if device_budget:
        budgets.append(_Budget("--max-vram", device_budget, CONTEXT_BYTES + least))
        room = min(room, device_budget - CONTEXT_BYTES)
    for budget in budgets:
        budget.check(budget.least, "evaluation")
    batch, tokens = _largest_batch(stream), stream.seq_len
    while batch > 1 and forward(batch) > room:
        batch //= 2
    while tokens > 1 and head(tokens) > room:
        tokens = math.ceil(tokens / 2)
    return batch, tokens, baseline + max(forward(batch), head(tokens))


def plan_blocks(skeleton: Skeleton, recipe: Recipe, stream: StreamShape) -> list[BlockPlan]:
    """Linears and groups of every block; one trace per kind of block."""
    _, calls = skeleton.dry_record(1, stream.seq_len)
    hidden = torch.empty(1, stream.seq_len, stream.hidden, dtype=stream.dtype, device="meta")
    traces: dict[tuple[Any, ...], Callable[[int], BlockTrace]] = {}
    chosen = chosen_blocks(recipe.blocks, len(skeleton))
    blocks = []
    for number in range(len(skeleton)):
        block = find_linears(skeleton, number, recipe.include, recipe.exclude)
        kind = (*skeleton.block_kind(number), tuple(linear.name for linear in block.eligible))
        if kind not in traces:
            modules = {
                linear.name: skeleton.block(number).get_submodule(linear.name)
                for linear in block.eligible
            }
            traces[kind] = cache(
                partial(trace_block, skeleton.block(number), modules, hidden, calls[number])
            )
        trace = traces[kind](0)
        groups = _groups(recipe, block, trace, stream) if number in chosen else ()
        weight_bytes = sum(
            value.numel() * value.element_size()
            for value in skeleton.block(number).state_dict().values()
        )
        known = BlockCost(
            weight_bytes,
            _merge_bytes(skeleton, number),
            trace.activation_bytes,
            trace.autograd_bytes,
            stream,
            groups,
        )
        name = skeleton.block_name(number)
        blocks.append(BlockPlan(number, name, block, groups, trace, known, traces[kind]))
    return blocks


def _groups(
    recipe: Recipe, block: BlockLinears, trace: BlockTrace, stream: StreamShape
) -> tuple[MomentGroup, ...]:
    narrow = solve_dtype(stream.dtype) != torch.float64
    factored = [linear for linear in block.eligible if can_be_factored(linear, recipe.form)]
    return group_moments(
        factored,
        trace.groups,
        gradients=recipe.two_sided,
        inputs_only=recipe.method == "swsc" or recipe.statistics == "none",
        tokens=stream.windows * stream.seq_len if narrow else 0,
    )


def _merge_bytes(skeleton: Skeleton, number: int) -> int:
    """Bytes of the tensors that are held beside the one parameter that they become."""
    sources = skeleton.block_parameters(number).values()
    return max((sum(i.nbytes for i in infos) for infos in sources if len(infos) > 1), default=0)


def check_seq_len(skeleton: Skeleton, seq_len: int) -> None:
    """RecipeError where the model has fewer positions than a window has tokens."""
    longest = getattr(skeleton.text_config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise RecipeError(f"--seq-len {seq_len}: the model has {longest} positions")


@dataclass(frozen=True)
class _Budget:
    """Bytes allowed, the option that says so, and the least that some plan needs."""

    option: str
    nbytes: int
    least: int

    @property
    def minimum(self) -> int:
        """Whole MiB, enough also for a process that begins a little larger."""
        return -(-(self.least + _DRIFT_BYTES) // 2**20) * 2**20

    def check(self, needed: int, what: str, purpose: str = "") -> None:
        """BudgetError where the ``needed`` bytes of ``what`` do not fit."""
        if needed > self.nbytes:
            raise BudgetError(
                f"{what} needs {format_bytes(needed)}{purpose}, the budget is "
                f"{format_bytes(self.nbytes)}: {self.option} {self.minimum // 2**20}M fits",
                budget_bytes=self.nbytes,
                minimum_bytes=self.minimum,
            )


class _Planner:
    """Steps of one job for any levers."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        rates: MachineRates,
        blocks: list[BlockPlan],
        stream: StreamShape,
        baseline: int,
        memory_backed: bool,
        ranks: Sequence[Ranks] | None,
        analysis: bool,
        keep_work: bool,
        *,
        on_device: bool,
    ) -> None:
        self.skeleton, self.recipe, self.rates = skeleton, recipe, rates
        self.on_device = on_device
        self.blocks, self.stream, self.baseline = blocks, stream, baseline
        self.analysis = analysis
        eligible = [linear for block in blocks for linear in block.linears.eligible]
        chosen = [linear for block in blocks for linear in block.targets]
        if not eligible and (recipe.include or recipe.exclude):
            raise RecipeError("--include and --exclude leave no linear: see streamcomp inspect")
        if not chosen:
            reasons = sorted({why for block in blocks for why in block.linears.left.values()})
            raise UnsupportedModelError(
                f"{skeleton.index.folder}: no linear of its blocks can be factored "
                f"({'; '.join(reasons[:3])})"
            )
        self.outputs = [
            plan_output(skeleton, recipe, asked, eligible, chosen, ranks[i] if ranks else None)
            for i, asked in enumerate(asked_ratios(skeleton, recipe, eligible))
        ]
        numbers = chosen_blocks(recipe.blocks, len(blocks))
        self.schedule = schedule(recipe, len(blocks), numbers, analysis)
        self.kept = self._moment_files() if keep_work else 0
        self.work_bytes = self._work_bytes(keep_work)
        self.in_memory = self.work_bytes if memory_backed else 0
        self.most_groups = max([1, *(len(block.groups) for block in blocks)])
        self.most_linears = max([1, *(len(block.targets) for block in blocks)])

    def steps(self, levers: Levers) -> tuple[StepPlan, ...]:
        """Every step with its phases; the names of kinds are methods here and in the job."""
        made = []
        for step in self.schedule:
            peak = self._peak(step, levers)
            made.append(
                StepPlan(
                    step,
                    *self._bytes(step, peak),
                    peak.name,
                    dict(peak.parts),
                    self._limits(step, levers),
                    sum(map(self._file_bytes, step.writes)) + self._shard_bytes(step),
                )
            )
        return tuple(made)

    def seconds(self, levers: Levers) -> float:
        return sum(sum(self._limits(step, levers).values()) for step in self.schedule)

    def passes(self, step: Step, levers: Levers) -> list[tuple[MomentGroup, ...]]:
        """The groups of each time that a step reads its block."""
        return passes_of_step(step, self.blocks[step.block], self.recipe, self.analysis, levers)

    def excess(
        self, steps: Sequence[Step], levers: Levers, budget: int, device_budget: int
    ) -> dict[Step, int]:
        """Those of ``steps`` that do not fit, and by how many bytes, of host and GPU together."""
        found = {}
        for step in steps:
            host, device = self._bytes(step, self._peak(step, levers))
            found[step] = max(0, host - budget) + max(0, device - device_budget)
        return {step: nbytes for step, nbytes in found.items() if nbytes}

    def all_bytes(self, levers: Levers) -> int:
        """What all steps take, of host and GPU together."""
        return sum(sum(self._bytes(step, self._peak(step, levers))) for step in self.schedule)

    def _peak(self, step: Step, levers: Levers) -> cost.Phase:
        phases = getattr(self, f"_{step.kind}")(step, levers)
        peak: cost.Phase = max(phases, key=lambda phase: phase.nbytes)
        return peak

    def _bytes(self, step: Step, peak: cost.Phase) -> tuple[int, int]:
        """What is resident at ``peak``, and what the GPU holds."""
        counted = _with_slack(peak.nbytes)
        on_device = self.on_device and step.kind not in _ON_HOST
        host = self.baseline + self.in_memory + counted
        return host, CONTEXT_BYTES + counted if on_device else 0

    def plan(
        self, steps: tuple[StepPlan, ...], levers: Levers, host: _Budget, device: _Budget
    ) -> Plan:
        disk = sum(output.nbytes + self._text_bytes() for output in self.outputs)
        at_once = replace(
            levers,
            feed_forward_tokens=self.stream.seq_len,
            linears=self.most_linears,
            groups=self.most_groups,
        )
        more = sum(step.seconds for step in steps) - self.seconds(at_once)
        return Plan(
            tuple(self.blocks),
            tuple(self.outputs),
            steps,
            levers,
            self.analysis,
            host.nbytes,
            host.minimum,
            device.nbytes,
            device.minimum if self.on_device else 0,
            self.baseline,
            self.stream,
            disk + self.work_bytes,
            more,
        )

    # -- phases of each kind of step -----------------------------------------------------

    def _tokenize(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        tokenizer = self.skeleton.index.folder / "tokenizer.json"
        size = tokenizer.stat().st_size if tokenizer.exists() else 0
        tokens = cost.tokenize_bytes(size, self.stream.windows, self.stream.seq_len)
        yield cost.Phase("tokenize", {"tokenizer": tokens})

    def _embed(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        vocabulary = self.skeleton.embedding_source.shape[0]
        held = cost.embed_bytes(self.stream, levers.batch, vocabulary)
        yield cost.Phase("embed", {"embeddings": held})

    def _forward(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        block = self.blocks[step.block].cost_with(levers)
        yield block.load()
        yield block.forward(levers.batch)

    def _loss(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        vocabulary = self.skeleton.embedding_source.shape[0]
        held = cost.head_gradient_bytes(
            _head_bytes(self.skeleton), vocabulary, levers.head_tokens, self.stream.window_bytes
        )
        wider = gradient_dtype(self.stream.dtype).itemsize / self.stream.dtype.itemsize
        yield cost.Phase("loss", {"head and logits": int(wider * held)})

    def _reverse(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        block = self.blocks[step.block]
        yield block.cost.load()
        if any(key.startswith("hidden") for key in step.writes):
            yield from (
                self.blocks[k].cost_with(levers).forward(levers.reverse_batch)
                for k in range(step.block - len(step.writes), step.block)
                if k >= 0
            )
        dtype = gradient_dtype(self.stream.dtype)
        outgoing, known = block.cost.output_gradient_bytes, block.cost_with(levers)
        for groups in self.passes(step, levers):
            moments = outgoing + self._moment_bytes(groups)
            yield known.reverse(levers.reverse_batch, dtype, moments)
            yield from self._decompositions(block, groups)
            outgoing = 0

    def _analyse(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        block = self.blocks[step.block]
        yield block.cost.load()
        for groups in self.passes(step, levers):
            known = block.cost_with(levers)
            yield known.observe(levers.batch, self._moment_bytes(groups))
            yield from self._decompositions(block, groups)

    def _decompositions(
        self, block: BlockPlan, groups: tuple[MomentGroup, ...]
    ) -> Iterator[cost.Phase]:
        """Those of an analysis, each of which drops the weight and the moments that it needed."""
        dtype = self.stream.dtype
        moments, dropped = self._moment_bytes(groups), self._other_bytes(block, groups)
        for group in groups:
            for linear in group.linears:
                yield block.cost.decompose(linear, group, moments, dropped)
                dropped += linear.numel * dtype.itemsize
            moments -= group.nbytes(dtype)

    def _ranks(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        numbers = sum(min(m.rows, m.columns) for block in self.blocks for m in block.targets)
        yield cost.Phase("allocate", {"spectra": 12 * 8 * numbers})

    def _block(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        block, recipe = self.blocks[step.block], self.recipe
        known, again = block.cost_with(levers), recipe.compressed_stream
        ranks, factors = self._most_ranks(step), 0
        for groups in self.passes(step, levers):
            yield known.load(factors)
            yield from self._factorizations(block, groups, ranks, factors, levers)
            factors += sum(
                self._factor_bytes(linear, ranks[linear])
                for group in groups
                for linear in group.linears
                if linear in ranks
            )
        if recipe.follows:
            yield known.forward(levers.batch, factors)
        if recipe.update:
            yield block.cost.update(levers.batch, ranks, factors)
        if recipe.refine:
            yield from block.cost.refine(ranks, recipe.form, factors)
        if again:
            yield known.forward(levers.batch, factors)
        yield known.write(factors)

    def _factorizations(
        self,
        block: BlockPlan,
        groups: tuple[MomentGroup, ...],
        ranks: Mapping[Linear, int],
        factors: int,
        levers: Levers,
    ) -> Iterator[cost.Phase]:
        """One pass of a writing sweep, beside the ``factors`` bytes of the passes before it."""
        known, recipe = block.cost_with(levers), self.recipe
        observes = not self.analysis and recipe.statistics != "none"
        moments = self._moment_bytes(groups) if observes else 0
        if observes:
            yield known.observe(levers.batch, moments, factors)
        drops = not recipe.compressed_stream
        dropped = self._other_bytes(block, groups) if drops else 0
        for group in groups:
            for linear in (linear for linear in group.linears if linear in ranks):
                if not self.analysis:
                    swsc = recipe.method == "swsc"
                    held = moments + factors
                    yield known.decompose(linear, group, held, dropped, swsc=swsc)
                kind = moment_dtype if self.analysis else solve_dtype  # as kept, or just made
                kept = kind(self.stream.dtype)
                bases = cost.analysis_bytes(linear.rows, linear.columns, group.gradients, kept)
                held = moments + bases
                yield known.factorize(linear, ranks[linear], recipe.form, held, factors, dropped)
                factors += self._factor_bytes(linear, ranks[linear])
                dropped += drops * linear.numel * self.stream.dtype.itemsize
            moments -= group.nbytes(self.stream.dtype) if observes else 0

    def _copy(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        yield cost.Phase("copy", {"buffers": 2 * COPY_BYTES})

    # -- what they are made of -----------------------------------------------------------

    def _most_ranks(self, step: Step) -> dict[Linear, int]:
        output, form = self.outputs[step.output], self.recipe.form
        found = {m: output.most_rank(m, form) for m in self.blocks[step.block].targets}
        return {linear: rank for linear, rank in found.items() if rank is not None}

    def _moment_bytes(self, groups: Sequence[MomentGroup]) -> int:
        return sum(group.nbytes(self.stream.dtype) for group in groups)

    def _other_bytes(self, block: BlockPlan, groups: Sequence[MomentGroup]) -> int:
        """The weights that a pass over ``groups`` drops before it decomposes anything."""
        return sum(m.numel for m in block.others(groups)) * self.stream.dtype.itemsize

    def _factor_bytes(self, linear: Linear, rank: int) -> int:
        """What a factored linear holds at most while its block is at work."""
        side = linear.rows + linear.columns
        less = rank if self.recipe.form == "pivot" else 0
        return self.stream.dtype.itemsize * rank * (side - less) + 8 * side

    def _limits(self, step: Step, levers: Levers) -> dict[str, float]:
        """Seconds that the stages of a step take at the machine's rates, by the stages' names."""
        rates = self.rates
        if step.kind == "copy":
            return {"copying": self._shard_bytes(step) / rates.disk_bytes}
        if step.kind == "loss":
            tokens = self.stream.windows * self.stream.seq_len
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
        passes = len(self.passes(step, levers))
        limits["loading"] *= passes
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
        limits["factorizing"] = self._factor_seconds(block)
        if not self.analysis:
            limits["factorizing"] += self._solve_seconds(block)
        if any(key.startswith("compressed") for key in (*step.reads, *step.writes)):
            limits["propagating"] = forward
        if recipe.follows:
            limits["forward"] = forward
            limits["updating"] = 2 * forward if recipe.update else 0.0
            limits["refining"] = recipe.refine * self._refining_seconds(block)
        return limits | {"writing": self._shard_bytes(step) / rates.disk_bytes}

    def _moment_seconds(self, block: BlockPlan) -> float:
        """The moments of a block's inputs or outputs, and of its gradients."""
        tokens = self.stream.windows * self.stream.seq_len
        if self.recipe.statistics == "none":
            return 0.0
        back = [m for g in block.groups if g.gradients for m in g.linears if m.rows > m.columns]
        products = 2.0 * tokens * sum(linear.numel for linear in back)
        moments = tokens * sum(map(cost.moment_products, block.groups))
        return moments / self.rates.moment_flops + products / self.rates.model_flops

    def _solve_seconds(self, block: BlockPlan) -> float:
        """Eigenvectors, and the products around them."""
        seconds = 0.0
        for group in block.groups:
            for m in group.linears:
                flops = cost.decomposition_flops(m.rows, m.columns, group.side, group.gradients)
                seconds += self.rates.eigh_seconds(min(m.rows, m.columns))
                seconds += self.rates.seconds(flops)
        return seconds

    def _factor_seconds(self, block: BlockPlan) -> float:
        half = {m: min(m.rows, m.columns) // 2 for m in block.targets}
        form = self.recipe.form
        flops = (cost.factorization_flops(m.rows, m.columns, r, form) for m, r in half.items())
        return sum(map(self.rates.seconds, flops))

    def _refining_seconds(self, block: BlockPlan) -> float:
        """One step of refinement: windows forward and back, and the optimizer."""
        half = {m: min(m.rows, m.columns) // 2 for m in block.targets}
        flops = sum(cost.muon_flops(m.rows, m.columns, r) for m, r in half.items())
        return (3 * _WINDOWS_PER_STEP * block.trace.flops + flops) / self.rates.model_flops

    def _file_bytes(self, key: str) -> int:
        """Bytes of the files that ``key`` of the schedule stands for."""
        kind = key.partition("-")[0]
        if kind == "windows":
            return 4 * self.stream.windows * self.stream.seq_len
        if kind == "gradient":
            wider = gradient_dtype(self.stream.dtype).itemsize
            return self.stream.nbytes * wider // self.stream.dtype.itemsize
        if kind == "analysis":
            block = self.blocks[int(key.partition("-")[2])]
            kept = moment_dtype(self.stream.dtype)
            gradient = block.cost.output_gradient_bytes if self.recipe.two_sided else 0
            return gradient + sum(
                cost.analysis_bytes(m.rows, m.columns, group.gradients, kept)
                + _TEXT_BYTES_PER_TENSOR
                for group in block.groups
                for m in group.linears
            )
        return self.stream.nbytes

    def _moment_files(self) -> int:
        return sum(block.cost.moment_bytes for block in self.blocks)

    def _work_bytes(self, keep_work: bool) -> int:
        """The most that lies in the work folder at a time."""
        most, forever = 0, 0
        for number, step in enumerate(self.schedule):
            there = live_after(self.schedule, number) | set(step.writes)
            if keep_work:
                kept = {k for k in step.writes if k.startswith("analysis") or k == hidden_key(0)}
                forever += sum(map(self._file_bytes, kept))
                there = {k for k in there if not (k.startswith("analysis") or k == hidden_key(0))}
            most = max(most, forever + sum(map(self._file_bytes, there)))
        return most + self.kept

    def _shard_bytes(self, step: Step) -> int:
        """Bytes of the shard that a step writes."""
        if step.kind == "copy":
            return sum(info.nbytes for info in self.skeleton.other_tensors())
        if step.kind != "block":
            return 0
        numbers = self.outputs[step.output].numbers
        saved = sum(
            block_saving(self.recipe, linear, numbers)
            for linear in self.blocks[step.block].linears.eligible
        )
        return saved + sum(info.nbytes for info in self.skeleton.block_tensors(step.block))

    def _text_bytes(self) -> int:
        """What lies beside tensors at most: headers, journal, report, tokenizer."""
        index = self.skeleton.index
        companions = sum(
            path.stat().st_size
            for path in index.folder.iterdir()
            if path.suffix in _COMPANIONS and path.is_file()
        )
        return companions + _TEXT_BYTES + _TEXT_BYTES_PER_TENSOR * len(index.tensors)


def _choose_levers(
    planner: _Planner, fixed: Levers | None, batch: int, budget: int, device_budget: int
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


def _with_slack(counted: int) -> int:
    return int(_SLACK * counted) + cost.LATE_BYTES


def _head_bytes(skeleton: Skeleton) -> int:
    """The head as it runs, and as it is read where that is another dtype."""
    numbers = skeleton.head.weight.numel()
    read = skeleton.embedding_source.torch_dtype
    other = read.itemsize if read != skeleton.dtype else 0
    return int(numbers * (skeleton.dtype.itemsize + other))
