"""The steps of a job, each with its bytes at the peak, its seconds and what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import MomentGroup, moment_dtype
from streamcomp.checkpoint.reader import COPY_BYTES
from streamcomp.errors import RecipeError, UnsupportedModelError
from streamcomp.linalg.symmetric import solve_dtype
from streamcomp.modeling.sites import Site
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.planning import cost
from streamcomp.planning.blocks import BlockPlan, passes_of_step
from streamcomp.planning.cost import gradient_dtype
from streamcomp.planning.levers import Levers
from streamcomp.planning.meter import CONTEXT_BYTES, WORKSPACE_BYTES
from streamcomp.planning.outputs import Ranks, asked_ratios, block_saving, plan_output
from streamcomp.planning.rates import MachineRates
from streamcomp.planning.schedule import (
    Step,
    hidden_key,
    live_after,
    redo_schedule,
    runs_windows,
    schedule,
)
from streamcomp.planning.seconds import Timing
from streamcomp.recipe import Recipe, chosen_blocks

__all__ = ["StepPlan", "StepPlanner", "head_weight_bytes", "with_slack"]

# Share added to what the formulas count, for what the allocator rounds up.
_SLACK = 1.05
# Disk for what is written beside the tensors: the plugin, the report, and their lines in it.
_TEXT_BYTES, _TEXT_BYTES_PER_TENSOR = 256 * 2**10, 2 * 2**10
_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# Kinds of steps in which no block's masks and positions are known.
_WITHOUT_CALLS = ("tokenize", "redo")
# Kinds of steps that never use a GPU.
_ON_HOST = ("tokenize", "ranks", "copy")


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


class StepPlanner:
    """Steps of one job for any levers."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        rates: MachineRates,
        blocks: Sequence[BlockPlan],
        stream: StreamShape,
        baseline: int,
        memory_backed: bool,
        output_in_memory: bool,
        ranks: Sequence[Ranks] | None,
        analysis: bool,
        keep_work: bool,
        *,
        on_device: bool,
        redo: Sequence[int],
    ) -> None:
        self.skeleton, self.recipe, self.on_device = skeleton, recipe, on_device
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
        self.timing = Timing(skeleton, recipe, rates, blocks, stream, self.outputs, analysis)
        numbers = chosen_blocks(recipe.blocks, len(blocks))
        self.schedule = schedule(recipe, len(blocks), numbers, analysis)
        self.kept = self._moment_files() if keep_work else 0
        self.work_bytes = self._work_bytes(keep_work, finished=bool(redo))
        if redo:
            self.schedule = redo_schedule(redo)
        self.in_memory = self.work_bytes if memory_backed else 0
        self.in_memory += self.disk_bytes - self.work_bytes if output_in_memory else 0
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
        phases, known = list(getattr(self, f"_{step.kind}")(step, levers)), self.blocks[0].cost
        if runs_windows(step):
            phases.append(known.record(max(levers.batch, levers.reverse_batch)))
        peak: cost.Phase = max(phases, key=lambda phase: phase.nbytes)
        return peak if step.kind in _WITHOUT_CALLS else known.beside_calls(peak)

    def _bytes(self, step: Step, peak: cost.Phase) -> tuple[int, int]:
        """What is resident at ``peak``, and what the GPU holds."""
        counted = with_slack(peak.nbytes)
        on_device = self.on_device and step.kind not in _ON_HOST
        host = self.baseline + self.in_memory + counted
        return host, CONTEXT_BYTES + WORKSPACE_BYTES + counted if on_device else 0

    @property
    def disk_bytes(self) -> int:
        """Outputs, streams, analysis and journal together, at most."""
        outputs = sum(output.nbytes + self._text_bytes() for output in self.outputs)
        return outputs + self.work_bytes

    # -- phases of each kind of step -----------------------------------------------------

    def _tokenize(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        tokenizer = self.skeleton.index.folder / "tokenizer.json"
        size = tokenizer.stat().st_size if tokenizer.exists() else 0
        tokens = cost.tokenize_bytes(size, self.stream.windows, self.stream.seq_len)
        yield cost.Phase("tokenize", {"tokenizer": tokens})

    def _embed(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        vocabulary = self.skeleton.embedding_source.shape[0]
        made = self.blocks[0].cost.record_bytes
        held = cost.embed_bytes(self.stream, levers.batch, vocabulary, made)
        yield cost.Phase("embed", {"embeddings": held})

    def _forward(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        block = self.blocks[step.block].cost_with(levers)
        yield block.load()
        yield block.forward(levers.batch)

    def _loss(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        vocabulary = self.skeleton.embedding_source.shape[0]
        run_dtype = gradient_dtype(self.stream.dtype)
        held = cost.head_gradient_bytes(
            head_weight_bytes(self.skeleton, run_dtype),
            vocabulary,
            levers.head_tokens,
            self.stream.window_bytes * run_dtype.itemsize // self.stream.dtype.itemsize,
        )
        made = self.blocks[0].cost.record_again_bytes(levers.head_tokens)
        yield cost.Phase("loss", {"head and logits": held + made})

    def _reverse(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        block = self.blocks[step.block]
        yield block.cost.load()
        if any(key.startswith("hidden") for key in step.writes):
            yield from (
                self.blocks[k].cost_with(levers).forward(levers.batch)
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
            for linear in group.sites:
                yield self._decompose(block, linear, group, moments, dropped)
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
                for linear in group.sites
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
        ranks: Mapping[Site, int],
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
            for linear in (linear for linear in group.sites if linear in ranks):
                if not self.analysis:
                    yield self._decompose(block, linear, group, moments + factors, dropped)
                kind = moment_dtype if self.analysis else solve_dtype  # as kept, or just made
                kept = kind(self.stream.dtype)
                bases = cost.analysis_bytes(linear.rows, linear.columns, group.gradients, kept)
                held = moments + bases
                yield known.factorize(linear, ranks[linear], recipe.form, held, factors, dropped)
                factors += self._factor_bytes(linear, ranks[linear])
                dropped += drops * linear.numel * self.stream.dtype.itemsize
            moments -= group.nbytes(self.stream.dtype) if observes else 0

    def _redo(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        """As if all linears were done again: each from its own moments, beside factors so far."""
        block, ranks, factors = self.blocks[step.block], self._most_ranks_of_any(step), 0
        kept = moment_dtype(self.stream.dtype)
        for groups in self.passes(step, levers):
            yield block.cost.load(factors)
            dropped = self._other_bytes(block, groups)
            for group in groups:
                moments = self._moment_bytes([group])
                for linear in (linear for linear in group.sites if linear in ranks):
                    yield self._decompose(block, linear, group, moments + factors, dropped)
                    bases = cost.analysis_bytes(linear.rows, linear.columns, group.gradients, kept)
                    held, form = moments + bases, self.recipe.form
                    yield block.cost.factorize(linear, ranks[linear], form, held, factors, dropped)
                    factors += self._factor_bytes(linear, ranks[linear])
                    dropped += linear.numel * self.stream.dtype.itemsize
        yield block.cost.write(factors)

    def _copy(self, step: Step, levers: Levers) -> Iterator[cost.Phase]:
        yield cost.Phase("copy", {"buffers": 2 * COPY_BYTES})

    # -- what they are made of -----------------------------------------------------------

    def _decompose(
        self, block: BlockPlan, linear: Site, group: MomentGroup, moments: int, dropped: int
    ) -> cost.Phase:
        recipe = self.recipe
        observed = recipe.statistics != "none"
        return block.cost.decompose(
            linear,
            group,
            moments,
            dropped,
            swsc=recipe.method == "swsc",
            metric=observed,
            damped=recipe.damping > 0 and not group.gradients,
            centred=recipe.centred and observed,
        )

    def _most_ranks(self, step: Step) -> dict[Site, int]:
        output, form = self.outputs[step.output], self.recipe.form
        found = {m: output.most_rank(m, form) for m in self.blocks[step.block].targets}
        return {linear: rank for linear, rank in found.items() if rank is not None}

    def _most_ranks_of_any(self, step: Step) -> dict[Site, int]:
        """The same over all outputs."""
        found: dict[Site, int] = {}
        for output in range(len(self.outputs)):
            for linear, rank in self._most_ranks(replace(step, output=output)).items():
                found[linear] = max(rank, found.get(linear, 0))
        return found

    def _moment_bytes(self, groups: Sequence[MomentGroup]) -> int:
        return sum(group.nbytes(self.stream.dtype) for group in groups)

    def _other_bytes(self, block: BlockPlan, groups: Sequence[MomentGroup]) -> int:
        """The weights that a pass over ``groups`` drops before it decomposes anything."""
        return sum(m.numel for m in block.others(groups)) * self.stream.dtype.itemsize

    def _limits(self, step: Step, levers: Levers) -> dict[str, float]:
        return self.timing.limits(step, levers, self._shard_bytes(step))

    def _factor_bytes(self, linear: Site, rank: int) -> int:
        """What a factored linear holds at most while its block is at work."""
        side = linear.rows + linear.columns
        less = rank if self.recipe.form == "pivot" else 0
        return self.stream.dtype.itemsize * rank * (side - less) + 8 * side

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
                for m in group.sites
            )
        return self.stream.nbytes

    def _moment_files(self) -> int:
        return sum(block.cost.moment_bytes for block in self.blocks)

    def _work_bytes(self, keep_work: bool, *, finished: bool) -> int:
        """The most that lies in the work folder at a time, or once the job is ``finished``."""
        most, forever = 0, 0
        for number, step in enumerate(self.schedule):
            there = live_after(self.schedule, number) | set(step.writes)
            if keep_work:
                kept = {k for k in step.writes if k.startswith("analysis") or k == hidden_key(0)}
                forever += sum(map(self._file_bytes, kept))
                there = {k for k in there if not (k.startswith("analysis") or k == hidden_key(0))}
            most = max(most, forever + sum(map(self._file_bytes, there)))
        return (forever if finished else most) + self.kept

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


def with_slack(counted: int) -> int:
    return int(_SLACK * counted) + cost.LATE_BYTES


def head_weight_bytes(skeleton: Skeleton, run_dtype: torch.dtype | None = None) -> int:
    """The head as it is read, in the model's dtype, and in ``run_dtype``: each that is another."""
    dtypes = {skeleton.embedding_source.torch_dtype, skeleton.dtype, run_dtype or skeleton.dtype}
    return int(skeleton.head.weight.numel() * sum(dtype.itemsize for dtype in dtypes))
