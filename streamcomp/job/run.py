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

from streamcomp.checkpoint.atomic import make_folder
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.errors import BudgetError, JobLockedError
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
from streamcomp.job.plan import Plan, make_plan
from streamcomp.job.planner import Conditions
from streamcomp.job.progress import JobProgress
from streamcomp.job.rows import JobLevers, StepRow
from streamcomp.job.runner import run_steps
from streamcomp.job.schedule import can_keep_analysis
from streamcomp.job.steps.decompose import Decompose
from streamcomp.job.steps.ranks import ShareRanks
from streamcomp.job.workspace import Workspace
from streamcomp.machine.session import Machine, probe
from streamcomp.methods import find_method
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Recipe, Resources

__all__ = ["Job", "rows_of_output"]


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

    @property
    def work(self) -> Path:
        return self.folders.work

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Plan, make the folders, take the lock, and begin or continue the journal."""
        self.skeleton = Skeleton(self.index)
        gradients = find_method(self.recipe.method).needs_gradients
        self.skeleton.check_tensors(head=gradients)
        self._kernel_bytes = self.here.kernel_bytes(
            self.skeleton.dtype, gradients=gradients, training=self.recipe.refine > 0
        )
        self.folders = JobFolders(
            self.index.folder, self.out, self.resources.work_dir, self.recipe, len(self.skeleton)
        )
        begun = self._journal()
        self.folders.refuse_foreign(begun)
        if begun is not None:
            holder = self.out if self.folders.works_inside else self.work
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
            make_folder(self.work)
            with locked(self.work):
                self._check_unchanged(begun)
                for folder in self.folders.outputs:
                    make_folder(folder)
                self._resume(begun)
                yield

    def run(self) -> None:
        """Do every step that is not done yet."""
        space = Workspace(
            self.plan.outline,
            self.plan.levers,
            self.here.device,
            self.work,
            self.journal,
            self.folders.shards,
        )
        self.plan = run_steps(
            str(self.out), self.plan, space, self.progress, replanned=self._with_ranks
        )

    def _journal(self) -> Journal | None:
        """The journal of what was done; a job with no finished step may begin anew.

        A finished job that kept its work hands its decompositions on to one that differs in its
        output alone, and its moments to one that decomposes them with another damping.
        """
        begun = Journal.read(self.work) if self.work.is_dir() else None
        if begun is None or not begun.steps:
            return None
        held, levers = begun.header.fingerprint, begun.header.levers
        if same_job(held, self.fingerprint) or not (levers.keep_work and begun.finished):
            return begun
        if same_analysis(held, self.fingerprint):
            return begun.inherit(self.fingerprint, (ShareRanks.label,))
        if levers.analysis and same_moments(held, self.fingerprint):
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
            rates=self.here.rates(self.skeleton.dtype, self.work),
            device_budget=self.here.device_budget,
            kernel_bytes=self._kernel_bytes,
            work_in_memory=probe().is_memory_backed(self.work),
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
        """Go on with the ranks that are known now; the levers stay."""
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
        self.journal = begun or Journal.begin(self.work, self.fingerprint, levers, seconds)
        self.journal.trim()


def rows_of_output(rows: Iterable[StepRow], output: int) -> list[StepRow]:
    """Rows of the steps that one output rests on: its own, and those that all share."""
    return [row for row in rows if row.output in (None, output)]
