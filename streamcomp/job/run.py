"""Runs a compression step by step, in the order of :mod:`streamcomp.planning.schedule`.

Each step leaves durable files and then one line in the journal. A job that is killed
anywhere and started again does at most one step a second time, and with the same levers,
threads and device writes the same bytes as one that was never killed.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from streamcomp.calibration.corpus import check_text, load_windows
from streamcomp.checkpoint.atomic import make_folder
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.checkpoint.reader import check_finite_on_disk
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import (
    BudgetError,
    JobLockedError,
    JobMismatchError,
    OutputError,
    RecipeError,
)
from streamcomp.job import sweeps, writing
from streamcomp.job.journal import (
    Journal,
    check_fingerprint,
    fingerprint,
    locked,
    same_analysis,
)
from streamcomp.job.progress import JobProgress
from streamcomp.job.workspace import Stage, Workspace, check_finite, work_files
from streamcomp.methods import find_method
from streamcomp.modeling.skeleton import Skeleton, check_same_calls
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
from streamcomp.planning.schedule import Step, can_be_analysed, live_after
from streamcomp.recipe import Recipe, Resources
from streamcomp.units import format_bytes

__all__ = [
    "Job",
    "WORK_FOLDER",
    "choose_device",
    "output_folders",
    "prepare_process",
    "steps_of_output",
]

WORK_FOLDER = ".streamcomp"
_RANKS = "ranks"


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
        self.outputs = output_folders(out, recipe)
        self.progress = progress
        self.work = resources.work_dir or out / WORK_FOLDER
        self.device = choose_device(resources.device)
        self.method = find_method(recipe.method)
        self.fingerprint = fingerprint(index, recipe)
        self.meter = PeakMeter(self.device)

    @property
    def _works_inside(self) -> bool:
        """Whether the work folder lies in OUT, and so is this OUT's."""
        return self.work.resolve().is_relative_to(self.out.resolve())

    # -- before any work -----------------------------------------------------------------

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Plan, make the folders, take the lock, and begin or continue the journal."""
        self.budget = budget_bytes(self.resources.max_ram)
        device_budget = device_budget_bytes(self.device, self.resources.max_vram)
        self._settings: dict[str, Any] = {"device_budget": device_budget}
        for source in self.recipe.calibration:
            check_text(source)
        self.skeleton = Skeleton(self.index)
        self.skeleton.check_tensors(head=self.recipe.two_sided)
        gradients, training = self.recipe.two_sided, self.recipe.refine > 0
        warm_up(self.device, self.skeleton.dtype, gradients=gradients, training=training)
        rates = measure_rates(self.device, self.skeleton.dtype)
        self.rates = replace(rates, disk_bytes=measure_disk(self.work))
        found = self._journal()
        self._refuse_foreign_folder(found)
        if found is not None:
            holder = self.out if self._works_inside else self.work
            with locked(holder):  # a job that runs there is no "other job" to be removed
                check_fingerprint(found.header["fingerprint"], self.fingerprint, holder)
        if unused := self.skeleton.blocks_unused:
            self.progress.note(
                f"config.json has {len(self.skeleton)} blocks: {len(unused)} tensors of others are "
                f"copied as they are, {unused[0]} first"
            )
        self.plan = self._plan(self.rates, found)
        limit_device(self.device, device_budget)
        self._check_shards(found)
        self._check_disk()
        make_folder(self.out)
        with locked(self.out):
            self._refuse_foreign_folder(found)
            make_folder(self.work)
            with locked(self.work):
                self._check_unchanged(found)
                for folder in self.outputs:
                    make_folder(folder)
                self._resume(found)
                yield

    def _journal(self) -> Journal | None:
        """What was done; a job that got no further than its first step may begin anew.

        A finished job that kept its analysis hands it on to one that differs in its output alone.
        """
        found = Journal.read(self.work) if self.work.is_dir() else None
        if found is None or not found.steps:
            return None
        header = found.header
        if (
            header["levers"].get("keep_work")
            and found.finished
            and header["fingerprint"] != self.fingerprint
            and same_analysis(header["fingerprint"], self.fingerprint)
        ):
            return found.inherit(self.fingerprint, before=_RANKS)
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
            "analysis": keep and can_be_analysed(self.recipe),
            "keep_work": keep,
        }
        if found is None:
            self._settings = fits
            return make_plan(self.skeleton, self.recipe, self.budget, rates, **fits)
        held = found.header["levers"]
        if keep and not held["keep_work"]:
            self.progress.note(
                "--keep-work comes too late: this job began without it, and removes its work"
            )
        fits |= {"analysis": held["analysis"], "keep_work": held["keep_work"]}
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

    def _refuse_foreign_folder(self, found: Journal | None) -> None:
        """OUT may be missing, empty, or hold this job; nothing of anybody else's is touched.

        A work folder elsewhere does not say which OUT it is for: what lies in OUT has to.
        """
        if self.work.exists() and not self.work.is_dir():
            raise OutputError(f"{self.work} is a file, --work-dir must be a folder")
        if self.out.is_symlink() and not self.out.exists():
            raise OutputError(f"{self.out} is a link to what is not there: give another OUT")
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file, OUT must be a folder")
        if self.out.resolve() == self.index.folder.resolve():
            raise OutputError(f"{self.out} is the model's own folder: give another OUT")
        if self.work.resolve() in (self.out.resolve(), self.index.folder.resolve()):
            raise OutputError(f"{self.work} is OUT or the model's folder: give another --work-dir")
        if not self.out.is_dir():
            return
        begun = found is not None or Journal.read(self.work) is not None
        ours = {WORK_FOLDER}
        if begun and not (found and found.inherited):
            written = [self._shard_of_entry(entry) for entry in found.steps] if found else []
            if self._works_inside or any(shard is not None for shard in written):
                return  # it is this job's, or _check_shards will say what is missing
            ours |= {folder.name for folder in self.outputs if folder != self.out}
            shards = [self.shard_path(0, number).name for number in range(len(self.skeleton) + 1)]
            ours |= {*shards, *(f".{shard}.tmp" for shard in shards)}
        others = sorted(
            path.relative_to(self.out).as_posix()
            for folder in {self.out, *self.outputs}
            if folder.is_dir()
            for path in folder.iterdir()
            if path.name not in ours and not _is_empty_output(path)
        )
        if others:
            raise OutputError(
                f"{self.out} is not empty ({others[0]}) and holds no job: give another OUT"
            )

    def _check_shards(self, found: Journal | None) -> None:
        """What the journal says is written lies in OUT, also where the work folder is elsewhere."""
        for step in self.plan.steps[: len(found.steps)] if found else ():
            shard = self._shard_of(step.step)
            if shard is not None and not shard.is_file():
                raise OutputError(
                    f"{shard} is missing, and the journal in {self.work} says that it is written: "
                    "give the OUT of that job, or remove both folders"
                )

    def _check_disk(self) -> None:
        """OutputError where the disk of OUT, or that of the work folder, has too little space."""
        out, work = _existing(self.out), _existing(self.work)
        if out.stat().st_dev == work.stat().st_dev:
            self._check_space((self.out, self.work), self.plan.disk_bytes, "OUT or --work-dir")
            return
        outputs = self.plan.disk_bytes - self.plan.work_bytes
        self._check_space((self.out,), outputs, "OUT")
        self._check_space((self.work,), self.plan.work_bytes, "--work-dir")

    def _check_space(self, folders: Sequence[Path], needed: int, setting: str) -> None:
        """That ``folders``, on one disk, can hold ``needed`` bytes with the job's own there now."""
        files: set[Path] = set()
        if self.out in folders:
            files |= {path.resolve() for path in self.out.rglob("*")}
        if self.work in folders and self.work.is_dir():
            files |= {path.resolve() for path in work_files(self.work)}
        there = sum(map(_file_bytes, files))
        free = shutil.disk_usage(_existing(folders[0])).free
        if free + there < needed:
            raise OutputError(
                f"{folders[0]} needs {format_bytes(needed)} at most and its disk has "
                f"{format_bytes(free)} free: give another {setting}, or free some space"
            )

    def _resume(self, found: Journal | None) -> None:
        levers = asdict(self.plan.levers) | {
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "analysis": self.plan.analysis,
            "keep_work": self._settings["keep_work"],
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
        shard = self._shard_of(step)
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
                hidden, calls = space.streamer.record(space.tokens[start:stop].long())
                check_same_calls(space.calls(stop - start), calls)
                check_finite(hidden, "the embeddings")
                write(start, hidden)
        return {}

    # -- where the results go ------------------------------------------------------------

    def _shard_of_entry(self, entry: dict[str, Any]) -> Path | None:
        """The shard that a line of the journal says is written."""
        if "output" not in entry:
            return None
        return self.shard_path(entry["output"], entry.get("block", len(self.skeleton)))

    def _shard_of(self, step: Step) -> Path | None:
        if step.kind == "block":
            return self.shard_path(step.output, step.block)
        return self.shard_path(step.output, len(self.skeleton)) if step.kind == "copy" else None

    def shard_path(self, output: int, number: int) -> Path:
        total = len(self.skeleton) + 1
        return self.outputs[output] / f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def output_folders(out: Path, recipe: Recipe) -> list[Path]:
    """``out`` itself, or for several ratios a folder in it for each."""
    if len(recipe.ratios) == 1:
        return [out]
    return [out / f"ratio-{ratio:g}" for ratio in recipe.ratios]


def _is_empty_output(path: Path) -> bool:
    """Whether ``path`` is a folder for one of several ratios with nothing in it yet."""
    return path.name.startswith("ratio-") and path.is_dir() and not any(path.iterdir())


def _file_bytes(path: Path) -> int:
    """The size of a file; 0 for anything else, or where it is gone by now."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def steps_of_output(steps: list[dict[str, Any]], output: int) -> list[dict[str, Any]]:
    """Journal lines that one output rests on: its own, and those that all share."""
    return [step for step in steps if step.get("output", output) == output]


def prepare_process(resources: Resources) -> None:
    """Set threads and the allocator, before anything large is allocated."""
    if resources.threads:
        torch.set_num_threads(resources.threads)
    settle()


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return torch.device(name)
