"""How far a job goes back when a file of it is missing or damaged.

A step is done again where its inputs are still there. If it writes what it wrote before, nothing
else has to be done. Else all steps after it are done again, because each line of the journal builds
on those before it. Inputs that no step was to read any more have been deleted: then the job goes
back further, at most to its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from streamcomp.job.files import StepFile, is_step_file
from streamcomp.job.journal import Journal
from streamcomp.job.ledger import file_of
from streamcomp.job.rows import StepRow
from streamcomp.job.schedule import live_after
from streamcomp.job.steps.base import Step

__all__ = ["finds_inputs", "steps_in_order", "steps_that_stand"]


def steps_in_order(
    steps: Sequence[Step], journal: Journal, shard_of: Callable[[Step], Path | None]
) -> int:
    """How many lines of the journal are those of the planned ``steps``.

    ``shard_of`` tells the shard that a step writes.
    """
    pairs = zip(journal.steps, steps, strict=False)
    return [*(_is_of(row, step, shard_of(step)) for row, step in pairs), False].index(False)


def _is_of(row: StepRow, step: Step, shard: Path | None) -> bool:
    """Whether a line tells of ``step``, and of files that it may have written."""
    output = step.output if step.output >= 0 else None
    files = {file_of(name) for name in row.files} - {shard.name if shard else ""}
    return (row.step, row.output) == (step.name, output) and all(map(is_step_file, files))


def steps_that_stand(steps: Sequence[Step], journal: Journal, most: int) -> int:
    """How many steps, at most ``most``, can count as done: the next ones find what they read.

    Only names are looked at: bytes are checked when they are read.
    """
    sound = (
        done
        for done in range(most, 0, -1)
        if all(_is_there(file, steps[:done], journal) for file in live_after(steps, done))
    )
    return next(sound, 0)


def finds_inputs(steps: Sequence[Step], journal: Journal, number: int) -> bool:
    """Whether all files that step ``number`` reads are there."""
    return all(_is_there(file, steps[:number], journal) for file in steps[number].reads)


def _is_there(file: StepFile, done: Sequence[Step], journal: Journal) -> bool:
    """Whether ``file`` is there as the last of the steps ``done`` that writes it left it."""
    makers = [number for number, step in enumerate(done) if file in step.writes]
    if not makers:
        return False
    names = {file_of(name) for name in journal.steps[makers[-1]].files}
    of_file = (name for name in names if name.partition(".")[0] == file.key)
    return all((journal.path.parent / name).is_file() for name in of_file)
