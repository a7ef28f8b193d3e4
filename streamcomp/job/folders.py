"""The folders of a job: OUT, one in it for each of several outputs, and the work folder.

OUT and the work folder may be on different disks, and hold what belongs to somebody else: then
the job is refused before it has touched anything.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from streamcomp.checkpoint.fetched import FETCHED_FOLDER
from streamcomp.errors import OutputError
from streamcomp.job.journal import Journal
from streamcomp.job.plan import Plan
from streamcomp.job.steps.base import Step
from streamcomp.job.workspace import work_files
from streamcomp.recipe import Recipe
from streamcomp.units import format_bytes

__all__ = ["WORK_FOLDER", "JobFolders", "output_folders"]

WORK_FOLDER = ".streamcomp"


class JobFolders:
    """The folders of a job on the model of ``blocks`` blocks in ``source``."""

    def __init__(
        self, source: Path, out: Path, work: Path | None, recipe: Recipe, blocks: int
    ) -> None:
        self.source, self.out, self.blocks = source, out, blocks
        self.work_folder = work or out / WORK_FOLDER
        self.outputs = output_folders(out, recipe)

    @property
    def works_inside(self) -> bool:
        """Whether the work folder is in OUT, and so is this OUT's."""
        return self.work_folder.resolve().is_relative_to(self.out.resolve())

    def shards(self, output: int) -> list[Path]:
        """One for each block, and the last for what is in none."""
        total = self.blocks + 1
        names = (f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total))
        return [self.outputs[output] / name for name in names]

    def shard_of(self, step: Step) -> Path | None:
        """The shard that a step writes."""
        number = step.shard(self.blocks)
        return None if number is None else self.shards(step.output)[number]

    # -- whether a job may run in them ---------------------------------------------------

    def refuse_foreign(self, journal: Journal | None) -> None:
        """OutputError unless OUT is missing, empty, or holds the job of ``journal``.

        A work folder elsewhere does not say which OUT it is for, so the files in OUT must show it.
        """
        self._refuse_places()
        if not self.out.is_dir():
            return
        begun = journal is not None or Journal.read(self.work_folder) is not None
        ours = {WORK_FOLDER}
        if begun and not (journal and journal.inherited):
            written = any(row.output is not None for row in journal.steps) if journal else False
            if self.works_inside or written:
                return  # it is this job's, or check_shards will say what is missing
            ours |= {folder.name for folder in self.outputs if folder != self.out}
            shards = [shard.name for shard in self.shards(0)]
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

    def _refuse_places(self) -> None:
        """Files, links that lead elsewhere, and folders that are taken already."""
        out, work = self.out, self.work_folder
        if work.is_symlink() and work == out / WORK_FOLDER:
            raise OutputError(
                f"{work} is a link: remove it, and give the folder that it leads to as --work-dir"
            )
        if work.exists() and not work.is_dir():
            raise OutputError(f"{work} is a file, --work-dir must be a folder")
        if out.is_symlink() and not out.exists():
            raise OutputError(f"{out} is a link to what is not there: give another OUT")
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file, OUT must be a folder")
        if out.resolve() == self.source.resolve():
            raise OutputError(f"{out} is the model's own folder: give another OUT")
        if work.resolve() in (out.resolve(), self.source.resolve()):
            raise OutputError(f"{work} is OUT or the model's folder: give another --work-dir")
        inside = [folder for folder in self.outputs if folder != out]
        inside += work_files(work) if work.is_dir() else []
        for path in inside:
            if path.is_symlink():
                raise OutputError(
                    f"{path} is a link, through which a job would write elsewhere: remove it"
                )

    def check_shards(self, done: Sequence[Step]) -> None:
        """OutputError where a shard that the steps ``done`` wrote is missing from OUT.

        A work folder elsewhere does not say which OUT it is for. In its own OUT the job goes back.
        """
        for step in () if self.works_inside else done:
            shard = self.shard_of(step)
            if shard is not None and not shard.is_file():
                raise OutputError(
                    f"{shard} is missing, and the journal in {self.work_folder} says that it is "
                    "written: give the OUT of that job, or remove both folders"
                )

    def check_disk(self, plan: Plan) -> None:
        """OutputError where the disk of OUT, or that of the work folder, has too little space."""
        out, work = _existing(self.out), _existing(self.work_folder)
        if out.stat().st_dev == work.stat().st_dev:
            self._check_space((self.out, self.work_folder), plan.disk_bytes, "OUT or --work-dir")
            return
        self._check_space((self.out,), plan.disk_bytes - plan.work_bytes, "OUT")
        self._check_space((self.work_folder,), plan.work_bytes, "--work-dir")

    def _check_space(self, folders: Sequence[Path], needed: int, setting: str) -> None:
        """OutputError unless ``folders``, on one disk, can hold ``needed`` bytes in all."""
        files: set[Path] = set()
        if self.out in folders:
            files |= {path.resolve() for path in self.out.rglob("*")}
        if self.work_folder in folders and self.work_folder.is_dir():
            fetched = (self.work_folder / FETCHED_FOLDER).rglob("*")
            files |= {path.resolve() for path in (*work_files(self.work_folder), *fetched)}
        there = sum(map(_file_bytes, files))
        free = shutil.disk_usage(_existing(folders[0])).free
        if free + there < needed:
            raise OutputError(
                f"{folders[0]} needs {format_bytes(needed)} at most and its disk has "
                f"{format_bytes(free)} free: give another {setting}, or free some space"
            )


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
        status = path.stat()
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
