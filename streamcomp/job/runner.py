"""Runs the steps of a plan, one after the other, each durable before the next begins.

It depends on no kind of step. The line of a step in the journal is written after its files. A job
that is killed anywhere does at most one step a second time.
"""

from __future__ import annotations

from collections.abc import Callable

from streamcomp.checkpoint.index import TensorInfo
from streamcomp.errors import JobMismatchError
from streamcomp.job.plan import Plan
from streamcomp.job.progress import JobProgress
from streamcomp.job.rows import StepRow
from streamcomp.job.schedule import live_after
from streamcomp.job.workspace import Stage, Workspace, work_files
from streamcomp.machine.addresses import within_memory
from streamcomp.machine.allocator import release
from streamcomp.machine.device import within_device
from streamcomp.machine.memory import PeakMeter

__all__ = ["run_again", "run_steps"]


def run_steps(
    title: str,
    plan: Plan,
    work: Workspace,
    progress: JobProgress,
    *,
    replanned: Callable[[StepRow], Plan] | None = None,
) -> Plan:
    """Do every step of ``plan`` that the journal does not list; the plan in the end.

    ``replanned`` gives the plan to go on with after a step has shared ranks. Raises
    JobMismatchError where the journal lists other steps than the plan.
    """
    journal, done = work.journal, len(work.journal.steps)
    if [row.step for row in journal.steps] != [planned.name for planned in plan.steps[:done]]:
        raise JobMismatchError(f"{journal.path} lists other steps", field="steps")
    meter = PeakMeter(work.device)
    progress.begin(title, [planned.seconds for planned in plan.steps], done, plan.budget_bytes)
    try:
        for number in range(done, len(plan.steps)):
            meter.restart()
            work.read_ahead = _next_block(plan, number)
            row = _run_step(plan, number, work, meter, progress)
            journal.commit(row)
            _drop(plan, number + 1, work)
            release()
            for note in row.notes:
                progress.note(note)
            progress.finish_step(number, row.step, row.seconds, row.detail)
            if row.ranks and replanned is not None:
                plan = replanned(row)
                work.outline = plan.outline
    finally:
        progress.end()
        meter.close()
    return plan


def run_again(plan: Plan, number: int, work: Workspace, progress: JobProgress) -> StepRow:
    """Do a step that the journal lists a second time; the row that it would get now."""
    meter = PeakMeter(work.device)
    try:
        return _run_step(plan, number, work, meter, progress)
    finally:
        meter.close()


def _run_step(
    plan: Plan, number: int, work: Workspace, meter: PeakMeter, progress: JobProgress
) -> StepRow:
    planned, on_device = plan.steps[number], plan.device_budget_bytes > 0
    stage = Stage(progress, number, planned.name)
    with (
        within_memory(planned.name, plan.budget_bytes),
        within_device(planned.name, plan.device_budget_bytes),
    ):
        if planned.step.runs_windows:
            work.capture()
        work.ledger.written.clear()
        result = planned.step.run(work, stage)
    return StepRow(
        **vars(result),
        files=dict(work.ledger.written),
        sources=work.new_sources(),
        fetched=work.skeleton.index.store.take_fetched() if work.skeleton.index.store else {},
        step=planned.name,
        seconds=round(stage.total(), 3),
        stages={phase: round(seconds, 3) for phase, seconds in stage.seconds.items()},
        limits={phase: round(seconds, 3) for phase, seconds in planned.limits.items()},
        peak_bytes=meter.peak(),
        predicted_bytes=planned.peak_bytes,
        device_peak_bytes=meter.device_peak() if on_device else None,
        device_predicted_bytes=planned.device_bytes if on_device else None,
    )


def _next_block(plan: Plan, number: int) -> list[TensorInfo]:
    """Tensors of the next step's block, where the budget has room for them in the page cache.

    Shards that are fetched only go to disk.
    """
    here, after = plan.steps[number], plan.steps[number + 1 : number + 2]
    block = after[0].step.block if after else -1
    if block in (-1, here.step.block):
        return []
    nbytes = plan.outline.blocks[block].read_bytes
    skeleton = plan.outline.skeleton
    fits = skeleton.index.store is not None or here.peak_bytes + nbytes <= plan.budget_bytes
    return skeleton.block_tensors(block) if fits else []


def _drop(plan: Plan, done: int, work: Workspace) -> None:
    """Delete the files that no step to come reads, except those that last longer."""
    steps = [planned.step for planned in plan.steps]
    live, keeps_work = live_after(steps, done), work.journal.header.levers.keep_work
    dead = {
        file.key
        for step in steps
        for file in step.writes
        if file not in live and not file.lasts(keeps_work=keeps_work)
    }
    for path in work_files(work.folder):
        if path.name.partition(".")[0] in dead:
            path.unlink(missing_ok=True)
