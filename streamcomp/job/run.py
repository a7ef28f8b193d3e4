"""Runs a compression step by step, in the order of :mod:`streamcomp.planning.schedule`.

Each step leaves durable files and then one line in the journal. A job that is killed
anywhere and started again does at most one step a second time, and with the same levers and
threads writes the same bytes as one that was never killed. (On a GPU the same within rounding:
its kernels add gradients of long windows up in no fixed order.)
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from streamcomp.calibration.corpus import load_windows
from streamcomp.checkpoint.atomic import make_folder
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.checkpoint.reader import check_finite_on_disk
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import (
    BudgetError,
    JobLockedError,
    JobMismatchError,
    RecipeError,
    UnsupportedSystemError,
)
from streamcomp.job import sweeps, writing
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
from streamcomp.job.progress import JobProgress
from streamcomp.job.workspace import Stage, Workspace, check_finite
from streamcomp.methods import find_method
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.planning.levers import Levers
from streamcomp.planning.meter import (
    PeakMeter,
    budget_bytes,
    device_budget_bytes,
    is_memory_backed,
    limit_device,
    release,
    settle,
    warm_up,
    within_device,
)
from streamcomp.planning.plan import Plan, make_plan
from streamcomp.planning.rates import MachineRates, measure_disk, measure_rates
from streamcomp.planning.schedule import Step, can_be_analysed, live_after, runs_windows
from streamcomp.recipe import Recipe, Resources

__all__ = [
    "Job",
    "check_system",
    "choose_device",
    "prepare_process",
    "steps_of_output",
]

_DECOMPOSE, _RANKS = "decompose", "ranks"

# What reading, writing and streaming call that not every system has; macOS lacks the first two.
_SYSTEM_CALLS = ("posix_fadvise", "posix_fallocate", "preadv", "pwrite", "O_DIRECTORY")


class Job:
    """One compression of ``source`` into ``out``; use inside :meth:`open`.

    Several ratios give several outputs, a folder each inside of ``out``.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        out: Path,
        recipe: Recipe,
        resources: Resources,
        progress: JobProgress,
    ) -> None:
        self.index, self.out, self.recipe, self.resources = index, out, recipe, resources
        self.progress = progress
        self.device = choose_device(resources.device)
        self.method = find_method(recipe.method)
        self.fingerprint = fingerprint(index, recipe)
        self.meter = PeakMeter(self.device)

    @property
    def work(self) -> Path:
        return self.folders.work

    # -- before any work -----------------------------------------------------------------

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Plan, make the folders, take the lock, and begin or continue the journal."""
        self.budget = budget_bytes(self.resources.max_ram)
        device_budget = device_budget_bytes(self.device, self.resources.max_vram)
        self.skeleton = Skeleton(self.index)
        self.skeleton.check_tensors(head=self.recipe.two_sided)
        gradients, training = self.recipe.two_sided, self.recipe.refine > 0
        kernels = warm_up(self.device, self.skeleton.dtype, gradients=gradients, training=training)
        self._settings: dict[str, Any] = {"device_budget": device_budget, "kernel_bytes": kernels}
        self.folders = JobFolders(
            self.index.folder, self.out, self.resources.work_dir, self.recipe, len(self.skeleton)
        )
        rates = measure_rates(self.device, self.skeleton.dtype)
        self.rates = replace(rates, disk_bytes=measure_disk(self.work))
        found = self._journal()
        self.folders.refuse_foreign(found)
        if found is not None:
            holder = self.out if self.folders.works_inside else self.work
            with locked(holder):  # a job that runs there is no "other job" to be removed
                check_fingerprint(found.header["fingerprint"], self.fingerprint, holder)
        for note in self.skeleton.notes:
            self.progress.note(note)
        if unused := self.skeleton.blocks_unused:
            self.progress.note(
                f"config.json has {len(self.skeleton)} blocks: {len(unused)} tensors of others are "
                f"copied as they are, {unused[0]} first"
            )
        self.plan = self._plan(self.rates, found)
        limit_device(self.device, device_budget)
        done = self.plan.steps[: len(found.steps)] if found else ()
        self.folders.check_shards([planned.step for planned in done])
        self.folders.check_disk(self.plan)
        make_folder(self.out)
        with locked(self.out):
            self.folders.refuse_foreign(found)
            make_folder(self.work)
            with locked(self.work):
                self._check_unchanged(found)
                for folder in self.folders.outputs:
                    make_folder(folder)
                self._resume(found)
                yield

    def _journal(self) -> Journal | None:
        """What was done; a job that got no further than its first step may begin anew.

        A finished job that kept its work hands its decompositions on to one that differs in its
        output alone, and its moments to one that decomposes them otherwise.
        """
        found = Journal.read(self.work) if self.work.is_dir() else None
        if found is None or not found.steps:
            return None
        before, levers = found.header["fingerprint"], found.header["levers"]
        if same_job(before, self.fingerprint) or not (levers["keep_work"] and found.finished):
            return found
        if same_analysis(before, self.fingerprint):
            return found.inherit(self.fingerprint, (_RANKS,))
        if levers["analysis"] and same_moments(before, self.fingerprint):
            return found.inherit(self.fingerprint, (_DECOMPOSE, _RANKS), from_moments=True)
        return found

    def _check_unchanged(self, found: Journal | None) -> None:
        """Nobody worked here between the first look and the lock."""
        now = self._journal()
        if (now.steps if now else []) != (found.steps if found else []):
            raise JobLockedError(f"another process has just worked on {self.out}: try again")

    def _plan(self, rates: MachineRates, found: Journal | None) -> Plan:
        keep = self.resources.keep_work
        fits = self._settings | {
            "memory_backed": is_memory_backed(self.work),
            "output_in_memory": is_memory_backed(self.out),
            "analysis": keep and can_be_analysed(self.recipe),
            "keep_work": keep,
            "from_moments": False,
        }
        if found is None:
            self._settings = fits
            return make_plan(self.skeleton, self.recipe, self.budget, rates, **fits)
        held = found.header["levers"]
        if keep and not held["keep_work"]:
            self.progress.note(
                "--keep-work comes too late: this job began without it, and removes its work"
            )
        fits |= {name: held[name] for name in ("analysis", "keep_work", "from_moments")}
        self._settings = fits
        ranked = found.find(_RANKS)
        fits["ranks"] = ranked["ranks"] if ranked else None
        levers = Levers.of_journal(held)
        try:
            return make_plan(self.skeleton, self.recipe, self.budget, rates, levers=levers, **fits)
        except BudgetError:
            plan = make_plan(self.skeleton, self.recipe, self.budget, rates, **fits)
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

    def _resume(self, found: Journal | None) -> None:
        levers = asdict(self.plan.levers) | {
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "analysis": self.plan.analysis,
            "keep_work": self._settings["keep_work"],
            "from_moments": self._settings["from_moments"],
        }
        total = len(self.plan.steps)
        seconds = [round(step.seconds, 3) for step in self.plan.steps]
        if found is not None and found.inherited:
            found.header |= {"total": total, "planned_seconds": seconds}
        self.journal = found or Journal.begin(self.work, self.fingerprint, levers, seconds)
        self.journal.trim()
        self.space = Workspace(
            self.skeleton,
            self.recipe,
            self.method,
            self.device,
            self.work,
            self.plan,
            self.journal,
            bool(self._settings["keep_work"]),
        )

    # -- the steps -----------------------------------------------------------------------

    def run(self) -> None:
        """Do every step that is not done yet."""
        names = [step.name for step in self.plan.steps]
        done = len(self.journal.steps)
        if [entry["step"] for entry in self.journal.steps] != names[:done]:
            raise JobMismatchError(f"{self.journal.path} lists other steps", field="steps")
        self.progress.begin(
            str(self.out), [step.seconds for step in self.plan.steps], done, self.budget
        )
        try:
            for number in range(done, len(names)):
                self._step(number, self.plan.steps[number].step)
        finally:
            self.progress.end()

    def _step(self, number: int, step: Step) -> None:
        self.meter.restart()
        stage = Stage(self.progress, number, step.name)
        with within_device(step.name, self.plan.device_budget_bytes):
            results = self._do(stage, step)
        results |= {
            "seconds": round(stage.total(), 3),
            "stages": {key: round(value, 3) for key, value in stage.seconds.items()},
            "limits": {k: round(v, 3) for k, v in self.plan.steps[number].limits.items()},
            "peak_bytes": self.meter.peak(),
            "predicted_bytes": self.plan.steps[number].peak_bytes,
        }
        if self.plan.device_budget_bytes:
            results |= {
                "device_peak_bytes": self.meter.device_peak(),
                "device_predicted_bytes": self.plan.steps[number].device_bytes,
            }
        self.journal.commit(step.name, results)
        self.space.drop(live_after([s.step for s in self.plan.steps], number + 1))
        release()
        for note in results.get("notes", []):
            self.progress.note(note)
        self.progress.finish_step(number, step.name, results["seconds"], results.get("detail", ""))
        if step.kind == _RANKS:
            self._rank(results["ranks"])

    def _do(self, stage: Stage, step: Step) -> dict[str, Any]:
        if runs_windows(step):
            self.space.record_calls()
        shard = self.folders.shard_of(step)
        if shard is not None:
            write = writing.block if step.kind == "block" else writing.copy
            return write(self.space, stage, step, shard)
        if step.kind in ("tokenize", "embed"):
            return self._tokenize(stage) if step.kind == "tokenize" else self._embed(stage)
        sweep = {
            "forward": sweeps.forward,
            "loss": sweeps.loss,
            "reverse": sweeps.reverse,
            "analyse": sweeps.analyse,
            _DECOMPOSE: sweeps.decompose,
            "ranks": sweeps.ranks,
        }[step.kind]
        return sweep(self.space, stage, step)

    def _rank(self, ranks: list[dict[str, int | None]]) -> None:
        """Go on with the ranks that are known now; the levers stay."""
        self.plan = self.space.plan = make_plan(
            self.skeleton,
            self.recipe,
            self.budget,
            self.rates,
            levers=self.plan.levers,
            blocks=self.plan.blocks,
            baseline=self.plan.baseline_bytes,
            **(self._settings | {"ranks": ranks}),
        )

    def _tokenize(self, stage: Stage) -> dict[str, Any]:
        stage("reading text")
        recipe = self.recipe
        windows = load_windows(
            self.index.folder,
            recipe.calibration,
            recipe.samples,
            recipe.seq_len,
            recipe.seed,
            chat=recipe.chat,
        )
        write_shard(self.space.windows_path, [Entry("tokens", windows.tokens)])
        return {"windows": len(windows.tokens), "notes": list(windows.notes)}

    def _embed(self, stage: Stage) -> dict[str, Any]:
        stage("checking")
        for infos in self.skeleton.outer_parameters().values():
            for info in infos:
                check_finite_on_disk(info)
        space = self.space
        with space.writing("hidden-00000") as write:
            for start, stop in space.batches(stage, "embedding", self.plan.levers.batch):
                hidden = space.streamer.embed(space.tokens[start:stop].long())
                check_finite(hidden, "the embeddings")
                write(start, hidden)
        return {}


def steps_of_output(steps: list[dict[str, Any]], output: int) -> list[dict[str, Any]]:
    """Journal lines that one output rests on: its own, and those that all share."""
    return [step for step in steps if step.get("output", output) == output]


def check_system() -> None:
    """UnsupportedSystemError where the system lacks calls that are made once work has begun."""
    missing = [call for call in _SYSTEM_CALLS if not hasattr(os, call)]
    if missing:
        raise UnsupportedSystemError(
            f"streamcomp needs Linux: this system ({platform.system()}) has no "
            f"{', '.join(missing)}; use a container or a virtual machine with Linux (inspect, "
            "status and loading a compressed model with transformers work here too)"
        )


def prepare_process(resources: Resources) -> None:
    """Check the system, and set threads and the allocator before anything large is allocated."""
    check_system()
    if resources.threads:
        torch.set_num_threads(resources.threads)
    settle()


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, or the CPU where there is none.

    A GPU always comes with its number, which some of torch's calls insist on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: torch finds no CUDA GPU here; use --device cpu")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError(f"--device {name}: torch finds {count} GPUs, from cuda:0 on")
    return torch.device("cuda", number)
