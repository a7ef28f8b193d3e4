"""A compression from its source to finished shards: plan, folders, lock, journal, steps.

Each step leaves durable files and then one line in the journal. A job that is killed anywhere and
started again does at most one step a second time, and with the same levers and threads writes the
same bytes as one that was never killed. (On a GPU the same within rounding: its kernels add
gradients of long windows up in no fixed order.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from streamcomp.checkpoint.atomic import make_folder, output_errors
from streamcomp.checkpoint.digests import FileDigest, digest_of_file
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.errors import BudgetError, DamagedFileError, JobLockedError, OutputError
from streamcomp.job.damage import finds_inputs, steps_in_order, steps_that_stand
from streamcomp.job.fetching import allow_shards
from streamcomp.job.files import is_step_file
from streamcomp.job.folders import JobFolders
from streamcomp.job.journal import (
    Journal,
    check_fingerprint,
    fingerprint,
    locked,
    same_analysis,
    same_job,
    same_moments,
)
from streamcomp.job.ledger import file_of
from streamcomp.job.plan import Plan, make_plan
from streamcomp.job.planner import Conditions
from streamcomp.job.progress import JobProgress
from streamcomp.job.rows import JobLevers, StepRow
from streamcomp.job.runner import run_again, run_steps
from streamcomp.job.schedule import can_keep_analysis
from streamcomp.job.steps.decompose import Decompose
from streamcomp.job.steps.ranks import ShareRanks
from streamcomp.job.workspace import Workspace
from streamcomp.machine.session import Machine, probe
from streamcomp.methods import find_method
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Recipe, Resources

__all__ = ["Job", "rows_of_output"]

_MOST_TIMES = 4  # that a job begins again by itself before it gives up on a machine


class Job:
    """One compression of ``source`` into ``out`` on the machine ``here``; use inside :meth:`open`.

    Several ratios give several outputs, a folder each inside of ``out``.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        out: Path,
        recipe: Recipe,
        resources: Resources,
        here: Machine,
        progress: JobProgress,
    ) -> None:
        self.index, self.out, self.recipe, self.resources = index, out, recipe, resources
        self.here, self.progress = here, progress
        self.fingerprint = fingerprint(index, recipe)
        self._steps_before = 0  # that earlier runs did, and that still stand

    @property
    def work_folder(self) -> Path:
        return self.folders.work_folder

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Plan, make the folders, take the lock, and begin or continue the journal."""
        self.skeleton = Skeleton(self.index)
        gradients = find_method(self.recipe.method).needs_gradients
        self.skeleton.check_tensors(head=gradients)
        self._kernel_bytes = self.here.kernel_bytes(
            self.skeleton.dtype, gradients=gradients, training=self.recipe.refine > 0
        )
        self._shard_bytes = allow_shards(self.skeleton, self.resources)
        if self.index.store is not None:
            self.index.store.tell = self.progress.note
        self.folders = JobFolders(
            self.index.folder, self.out, self.resources.work_dir, self.recipe, len(self.skeleton)
        )
        begun = self._journal()
        self.folders.refuse_foreign(begun)
        if begun is not None:
            holder = self.out if self.folders.works_inside else self.work_folder
            with locked(holder):  # a job that runs there is no "other job" to be removed
                check_fingerprint(begun.header.fingerprint, self.fingerprint, holder)
        for note in self.skeleton.notes:
            self.progress.note(note)
        if unused := self.skeleton.blocks_unused:
            self.progress.note(
                f"config.json has {len(self.skeleton)} blocks: {len(unused)} tensors of others are "
                f"copied as they are, {unused[0]} first"
            )
        self.conditions = self._conditions(begun)
        self.plan = self._plan(begun)
        self.here.limit_device()
        done = self.plan.steps[: len(begun.steps)] if begun else ()
        self.folders.check_shards([planned.step for planned in done])
        self.folders.check_disk(self.plan)
        make_folder(self.out)
        with locked(self.out):
            self.folders.refuse_foreign(begun)
            make_folder(self.work_folder)
            with locked(self.work_folder):
                self._check_unchanged(begun)
                for folder in self.folders.outputs:
                    make_folder(folder)
                self._resume(begun)
                yield

    def run(self) -> None:
        """Do every step that is not done yet, and again those whose files are damaged."""
        for times_left in reversed(range(_MOST_TIMES)):
            try:
                self._check_earlier_shards(digests=False)
                self._run_steps()
                self._check_earlier_shards(digests=True)
                return
            except DamagedFileError as error:
                if not times_left:
                    raise
                damage = error.with_traceback(None)  # its frames hold tensors
            self._repair(damage)

    def _run_steps(self) -> None:
        self.plan = run_steps(
            str(self.out), self.plan, self._workspace(), self.progress, replanned=self._with_ranks
        )

    def _workspace(self) -> Workspace:
        return Workspace(
            self.plan.outline,
            self.plan.levers,
            self.here.device,
            self.work_folder,
            self.journal,
            self.folders.shards,
        )

    def _check_earlier_shards(self, *, digests: bool) -> None:
        """DamagedFileError where a shard of an earlier run is not what it wrote.

        Sizes tell that at once, digests only after all is read.
        """
        for row in self.journal.steps[: self._steps_before]:
            for path, expected in self._files(row).items():
                if is_step_file(path.name):
                    continue  # it may be gone by now, and is checked when it is read
                if not path.is_file() or path.stat().st_size != expected.bytes:
                    raise DamagedFileError(path, "is missing, or has another size")
                if digests and digest_of_file(path) != expected:
                    raise DamagedFileError(path, "has other bytes than when it was written")

    def _files(self, row: StepRow) -> dict[Path, FileDigest]:
        """The files that a step left, each with what it, or a part of it, has to be."""
        out = self.out if row.output is None else self.folders.outputs[row.output]
        return {
            (self.work_folder if is_step_file(file_of(name)) else out) / file_of(name): digest
            for name, digest in row.files.items()
        }

    def _repair(self, damage: DamagedFileError) -> None:
        """Delete a damaged file, and do the step that wrote it again, or go back to it."""
        rows, what = self.journal.steps, f"{damage.path} {damage.what}"
        makers = [number for number, row in enumerate(rows) if damage.path in self._files(row)]
        with output_errors(damage.path):
            damage.path.unlink(missing_ok=True)
        if makers and self._is_made_again(makers[-1]):
            self.progress.note(f"{what}: step {rows[makers[-1]].step!r} was done again")
        else:
            self._go_back(makers[-1] if makers else len(rows), what)

    def _is_made_again(self, number: int) -> bool:
        """Do step ``number`` again, where it can be; whether its files are as they were."""
        steps = [planned.step for planned in self.plan.steps]
        if not finds_inputs(steps, self.journal, number):
            return False
        try:
            row = run_again(self.plan, number, self._workspace(), self.progress)
        except DamagedFileError:
            return False
        return row.files == self.journal.steps[number].files

    def _go_back(self, most: int, why: str) -> None:
        """Count no more than ``most`` steps as done, fewer where they find no inputs."""
        steps = [planned.step for planned in self.plan.steps]
        done = steps_that_stand(steps, self.journal, most)
        again = f"step {steps[done].name!r}" if done < len(steps) else "the end"
        self.progress.note(f"{why}: going back to {again}")
        self.journal.cut(done)
        self._steps_before = min(self._steps_before, done)
        self.plan = self._plan(self.journal)

    def shard_digests(self, output: int) -> dict[str, FileDigest]:
        """What the finished shards of an output have to be, by name."""
        names = [shard.name for shard in self.folders.shards(output)]
        rows = rows_of_output(self.journal.steps, output)
        files = {name: digest for row in rows for name, digest in row.files.items()}
        return {name: files[name] for name in names}

    def _journal(self) -> Journal | None:
        """The journal of what was done; a job with no finished step may begin anew.

        A finished job that kept its work hands its decompositions on to one that differs in its
        output alone, and its moments to one that decomposes them with another damping; of
        experts it keeps none.
        """
        begun = Journal.read(self.work_folder) if self.work_folder.is_dir() else None
        if begun is None or not (begun.steps or begun.lost):
            return None
        held, levers = begun.header.fingerprint, begun.header.levers
        if same_job(held, self.fingerprint):
            return begun
        if begun.lost:  # what it had finished, and whether it kept its work, is not known
            raise OutputError(f"{begun.path} is damaged: remove {self.work_folder} and start again")
        if not (levers.keep_work and begun.finished):
            return begun
        if same_analysis(held, self.fingerprint):
            return begun.inherit(self.fingerprint, (ShareRanks.label,))
        routed = any(r.tokens is not None for step in begun.steps for r in step.analysis)
        if levers.analysis and not routed and same_moments(held, self.fingerprint):
            before = (Decompose.label, ShareRanks.label)
            return begun.inherit(self.fingerprint, before, from_moments=True)
        return begun

    def _check_unchanged(self, begun: Journal | None) -> None:
        """Nobody worked here between the first look and the lock."""
        now = self._journal()
        if (now.steps if now else []) != (begun.steps if begun else []):
            raise JobLockedError(f"another process has just worked on {self.out}: try again")

    def _conditions(self, begun: Journal | None) -> Conditions:
        """Conditions of the job; whether it keeps its work was fixed when it began."""
        keep, from_moments = self.resources.keep_work, False
        analysis = keep and can_keep_analysis(self.recipe)
        if begun is not None:
            levers = begun.header.levers
            if keep and not levers.keep_work:
                self.progress.note(
                    "--keep-work comes too late: this job began without it, and removes its work"
                )
            keep, analysis = levers.keep_work, levers.analysis
            from_moments = levers.from_moments
        return Conditions(
            budget_bytes=self.here.budget_bytes,
            addresses=self.here.addresses,
            rates=self.here.rates(self.skeleton.dtype, self.work_folder),
            device_budget=self.here.device_budget,
            kernel_bytes=self._kernel_bytes,
            shard_bytes=self._shard_bytes,
            work_in_memory=probe().is_memory_backed(self.work_folder),
            outputs_in_memory=probe().is_memory_backed(self.out),
            keeps_work=keep,
            keeps_analysis=analysis,
            from_moments=from_moments,
        )

    def _plan(self, begun: Journal | None) -> Plan:
        """With the levers that the job began with, where they still fit."""
        if begun is None:
            return make_plan(self.skeleton, self.recipe, self.conditions)
        ranked, levers = begun.find(ShareRanks.label), begun.header.levers.planned
        ranks = ranked.ranks if ranked else None
        if ranks and len(ranks) != len(self.folders.outputs):
            raise OutputError(
                f"{begun.path} was altered, it lists ranks of {len(ranks)} outputs instead of "
                f"{len(self.folders.outputs)}: remove {self.work_folder} and start again"
            )
        try:
            return make_plan(
                self.skeleton, self.recipe, self.conditions, levers=levers, ranks=ranks
            )
        except BudgetError:
            plan = make_plan(self.skeleton, self.recipe, self.conditions, ranks=ranks)
            before, now = asdict(levers), asdict(plan.levers)
            changed = [
                f"{lever} {before[lever]} -> {now[lever]}"
                for lever in before
                if lever not in ("linears", "groups") and before[lever] != now[lever]
            ]
            if changed:
                self.progress.note(
                    f"this budget asks for other levers than the job began with "
                    f"({', '.join(changed)}): the result is the same within rounding"
                )
            return plan

    def _with_ranks(self, row: StepRow) -> Plan:
        """The plan with the ranks in ``row``; the levers stay."""
        self.plan = make_plan(
            self.skeleton, self.recipe, self.conditions, ranks=row.ranks, before=self.plan
        )
        return self.plan

    def _resume(self, begun: Journal | None) -> None:
        levers = JobLevers(
            **asdict(self.plan.levers),
            threads=torch.get_num_threads(),
            device=str(self.here.device),
            analysis=self.plan.outline.analysis,
            keep_work=self.conditions.keeps_work,
            from_moments=self.conditions.from_moments,
        )
        seconds = tuple(round(step.seconds, 3) for step in self.plan.steps)
        if begun is not None and begun.inherited:
            begun.header = replace(begun.header, total=len(seconds), planned_seconds=seconds)
        self.journal = begun or Journal.begin(self.work_folder, self.fingerprint, levers, seconds)
        self._steps_before = len(self.journal.steps)
        steps = [planned.step for planned in self.plan.steps]
        in_order = steps_in_order(steps, self.journal, self.folders.shard_of)
        if self.journal.lost or in_order < self._steps_before:
            self._go_back(in_order, f"{self.journal.path} is damaged")
        self.journal.trim()


def rows_of_output(rows: Iterable[StepRow], output: int) -> list[StepRow]:
    """Rows of the steps that ``output`` is made by, including those that all outputs share."""
    return [row for row in rows if row.output in (None, output)]
