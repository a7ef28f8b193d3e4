"""Bytes and seconds of a job's steps, for any levers: asked of the steps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from streamcomp.checkpoint.fetched import FETCH_BYTES
from streamcomp.checkpoint.files import companions
from streamcomp.job.files import StepFile
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.schedule import live_after
from streamcomp.job.steps.base import Phase, Step, capturing
from streamcomp.machine.addresses import AddressLimit
from streamcomp.machine.device import CONTEXT_BYTES, WORKSPACE_BYTES
from streamcomp.machine.memory import LATE_BYTES
from streamcomp.machine.rates import MachineRates

__all__ = ["Conditions", "StepPlan", "StepPlanner"]

# Share added to what the formulas count, for what the allocator rounds up.
_SLACK = 1.05
# Disk for what is written next to the tensors: the plugin, the report, and their lines in it.
_TEXT_BYTES, _TEXT_BYTES_PER_TENSOR = 256 * 2**10, 2 * 2**10


@dataclass(frozen=True)
class Conditions:
    """Budget, speed and folders of a job, as far as its plan depends on them."""

    budget_bytes: int
    rates: MachineRates
    device_budget: int = 0  # bytes of the GPU; 0 for a job on the CPU
    kernel_bytes: int = 0  # that products take next to their operands, measured
    shard_bytes: int = 0  # of the source's shards that are fetched into the work folder, at most
    work_in_memory: bool = False  # the work folder is on tmpfs, so what is in it counts
    outputs_in_memory: bool = False  # OUT is
    keeps_work: bool = False  # decompositions and moments stay behind the end, for other jobs
    from_moments: bool = False  # decompositions are made again, from moments of another job
    keeps_analysis: bool = False  # they are kept also where one output alone needs no analysis
    addresses: AddressLimit | None = None  # where ulimit -v sets a limit

    @property
    def usable_bytes(self) -> int:
        """The budget, or what the limit of addresses leaves of it."""
        limited = [self.addresses.budget] if self.addresses else []
        return min([self.budget_bytes, *limited])


@dataclass(frozen=True)
class StepPlan:
    """One step: the most it holds, how long it takes, what it writes."""

    step: Step
    peak_bytes: int  # resident at the peak, interpreter and libraries included
    device_bytes: int  # of the GPU at the peak, its driver and libraries included; 0 without one
    peak_phase: str
    parts: dict[str, int]  # the peak by what it is for
    limits: dict[str, float]  # seconds of its phases, at the machine's measured rates
    written_bytes: int

    @property
    def seconds(self) -> float:
        return sum(self.limits.values())

    @property
    def name(self) -> str:
        return self.step.name


class StepPlanner:
    """The steps of one job; ``baseline`` is resident before the first of them."""

    def __init__(
        self, outline: Outline, steps: Sequence[Step], conditions: Conditions, baseline: int
    ) -> None:
        self.outline, self.schedule = outline, steps
        self.conditions, self.baseline = conditions, baseline
        self.work_bytes = self._work_bytes() + conditions.shard_bytes
        self._decoding = outline.skeleton.index.decoding_bytes  # a step may read any tensor
        self._in_memory = conditions.work_in_memory * self.work_bytes
        self._in_memory += conditions.outputs_in_memory * self._output_bytes
        blocks = outline.blocks
        self.most_groups = max([1, *(len(block.groups) for block in blocks)])
        self.most_linears = max([1, *(sum(len(g.sites) for g in b.groups) for b in blocks)])

    def steps(self, levers: Levers) -> tuple[StepPlan, ...]:
        """Every step with its peak and seconds."""
        return tuple(self._planned(step, levers) for step in self.schedule)

    def seconds(self, levers: Levers) -> float:
        return sum(phase.seconds for step in self.schedule for phase in self._phases(step, levers))

    def excess(
        self, steps: Sequence[Step], levers: Levers, budget: int, device_budget: int
    ) -> dict[Step, int]:
        """Steps that do not fit, and by how many bytes, of host and GPU together."""
        over = {}
        for step in steps:
            host, device = self._resident(step, levers)
            over[step] = max(0, host - budget) + max(0, device - device_budget)
        return {step: nbytes for step, nbytes in over.items() if nbytes}

    def all_bytes(self, levers: Levers) -> int:
        """Peaks of all steps together, of host and GPU."""
        return sum(sum(self._resident(step, levers)) for step in self.schedule)

    @property
    def disk_bytes(self) -> int:
        """Outputs, streams, analysis, journal and fetched shards together, at most."""
        return self._output_bytes + self.work_bytes

    def _planned(self, step: Step, levers: Levers) -> StepPlan:
        phases = self._phases(step, levers)
        peak = max(phases, key=lambda phase: phase.nbytes)
        limits: dict[str, float] = {}
        for phase in phases:
            limits[phase.name] = limits.get(phase.name, 0.0) + phase.seconds
        written = step.written_bytes(self.outline)
        resident = self._bytes(step, peak)
        return StepPlan(step, *resident, peak.title, dict(peak.parts), limits, written)

    def _phases(self, step: Step, levers: Levers) -> list[Phase]:
        """Phases of the step, each with what is in memory in all of them."""
        phases, first = list(step.phases(self.outline, levers)), self.outline.blocks[0]
        if step.runs_windows:
            phases.insert(0, capturing(first, max(levers.batch, levers.reverse_batch)))
        held = step.held(self.outline)
        return [phase.next_to(held) for phase in phases]

    def _resident(self, step: Step, levers: Levers) -> tuple[int, int]:
        peak = max(self._phases(step, levers), key=lambda phase: phase.nbytes)
        return self._bytes(step, peak)

    def _bytes(self, step: Step, peak: Phase) -> tuple[int, int]:
        """Bytes resident at ``peak``, and bytes that the GPU holds."""
        counted = int(_SLACK * peak.nbytes) + LATE_BYTES + self._decoding
        on_device = self.conditions.device_budget > 0 and not step.on_host
        fetching = FETCH_BYTES if self.conditions.shard_bytes else 0
        host = self.baseline + self._in_memory + counted + fetching
        return host, CONTEXT_BYTES + WORKSPACE_BYTES + counted if on_device else 0

    def _work_bytes(self) -> int:
        """The most that steps leave in the work folder at a time."""
        most, stays = 0, set[StepFile]()
        for number, step in enumerate(self.schedule):
            there = live_after(self.schedule, number) | set(step.writes)
            lasting = {file for file in there if file.lasts(keeps_work=self.conditions.keeps_work)}
            stays |= lasting
            held = sum(file.nbytes(self.outline) for file in there | stays)
            most = max(most, held + step.scratch_bytes(self.outline))
        return most

    @cached_property
    def _output_bytes(self) -> int:
        """All outputs: shards, and at most what is next to tensors: report, tokenizer, headers."""
        index = self.outline.skeleton.index
        beside = sum(path.stat().st_size for path in companions(index.folder))
        text = beside + _TEXT_BYTES + _TEXT_BYTES_PER_TENSOR * len(index.tensors)
        return sum(output.nbytes + text for output in self.outline.outputs)
