"""Runs a compression step by step: tokenize, embed, every block, the rest, publish.

Each step leaves durable files and then one line in the journal. A job that is killed
anywhere and started again does at most one step a second time, and with the same levers,
threads and device writes the same bytes as one that was never killed.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcomp.calibration.corpus import load_windows
from streamcomp.calibration.hidden_states import HiddenStates, StreamShape
from streamcomp.calibration.observe import Observer
from streamcomp.checkpoint.atomic import make_folder
from streamcomp.checkpoint.index import CheckpointIndex, read_header
from streamcomp.checkpoint.reader import TensorReader, check_finite_on_disk
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import (
    BudgetError,
    JobLockedError,
    JobMismatchError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from streamcomp.job.journal import Journal, check_fingerprint, fingerprint, locked
from streamcomp.job.progress import JobProgress
from streamcomp.methods import Method, factor_tensors, find_method
from streamcomp.modeling.linears import Linear
from streamcomp.modeling.modules import factored
from streamcomp.modeling.skeleton import Call, Skeleton, check_same_calls
from streamcomp.modeling.streamer import BlockStreamer, LoadedBlock
from streamcomp.planning.meter import (
    PeakMeter,
    budget_bytes,
    is_memory_backed,
    release,
    settle,
    warm_up,
)
from streamcomp.planning.plan import BlockPlan, MachineRates, Plan, make_plan, measure_rates
from streamcomp.recipe import Recipe, Resources
from streamcomp.units import format_bytes

__all__ = ["Job", "WORK_FOLDER", "choose_device", "prepare_process"]

WORK_FOLDER = ".streamcomp"
_FIRST_BLOCK = 2  # steps before the first block's: tokenize, embed


class Job:
    """One compression of ``source`` into ``out``; use inside :meth:`open`."""

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
        self.work = resources.work_dir or out / WORK_FOLDER
        self.device = choose_device(resources.device)
        self.method: Method = find_method(recipe.method)
        self.fingerprint = fingerprint(index, recipe)
        self.meter = PeakMeter()
        self._recorded: dict[int, list[Call]] = {}

    # -- before any work -----------------------------------------------------------------

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Plan, make the folders, take the lock, and begin or continue the journal."""
        self.budget = budget_bytes(self.resources.max_ram)
        self.skeleton = Skeleton(self.index)
        warm_up(self.device, self.skeleton.dtype)
        rates = measure_rates(self.device, self.skeleton.dtype)
        self._refuse_foreign_folder()
        found = self._journal()
        if found is not None:
            check_fingerprint(found.header["fingerprint"], self.fingerprint, self.out)
        self.plan = self._plan(rates, found)
        self._check_shards(found)
        self._check_disk()
        make_folder(self.out)
        with locked(self.out):
            self._refuse_foreign_folder()
            make_folder(self.work)
            with locked(self.work):
                self._check_unchanged(found)
                self._resume(found)
                yield

    def _journal(self) -> Journal | None:
        """What was done; a job that got no further than its first step may begin anew."""
        found = Journal.read(self.work) if self.work.is_dir() else None
        return found if found is not None and found.steps else None

    def _check_unchanged(self, found: Journal | None) -> None:
        """Nobody worked here between the first look and the lock."""
        now = self._journal()
        if (now.steps if now else []) != (found.steps if found else []):
            raise JobLockedError(f"another process has just worked on {self.out}: try again")

    def _plan(self, rates: MachineRates, found: Journal | None) -> Plan:
        fits = {"memory_backed": is_memory_backed(self.work)}
        if found is None:
            return make_plan(self.skeleton, self.recipe, self.budget, rates, **fits)
        batch = int(found.header["levers"]["batch"])
        try:
            return make_plan(self.skeleton, self.recipe, self.budget, rates, batch=batch, **fits)
        except BudgetError:
            plan = make_plan(self.skeleton, self.recipe, self.budget, rates, **fits)
            self.progress.note(
                f"the job began with {batch} windows per forward, this budget allows {plan.batch}: "
                "the result is the same within rounding"
            )
            return plan

    def _refuse_foreign_folder(self) -> None:
        """OUT may be missing, empty, or hold this job; nothing of anybody else's is touched."""
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file, OUT must be a folder")
        if self.out.resolve() == self.index.folder.resolve():
            raise OutputError(f"{self.out} is the model's own folder: give another OUT")
        if self.work.resolve() in (self.out.resolve(), self.index.folder.resolve()):
            raise OutputError(f"{self.work} is OUT or the model's folder: give another --work-dir")
        if not self.out.is_dir() or Journal.read(self.work) is not None:
            return
        others = sorted(p.name for p in self.out.iterdir() if p.name != WORK_FOLDER)
        if others:
            raise OutputError(
                f"{self.out} is not empty ({others[0]}) and holds no job: give another OUT"
            )

    def _check_shards(self, found: Journal | None) -> None:
        """What the journal says is written lies in OUT, also where the work folder is elsewhere."""
        for number in range(len(found.steps) - _FIRST_BLOCK if found else 0):
            shard = self.shard_path(number)
            if not shard.is_file():
                raise OutputError(
                    f"{shard} is missing, and the journal in {self.work} says that it is written: "
                    "give the OUT of that job, or remove both folders"
                )

    def _check_disk(self) -> None:
        folder = self.out
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        there = sum(
            file.stat().st_size
            for root in (self.out, self.work)
            if root.is_dir() and not (root != self.out and root.is_relative_to(self.out))
            for file in root.rglob("*")
            if file.is_file()
        )
        if free + there < self.plan.disk_bytes:
            raise OutputError(
                f"{self.out} needs {format_bytes(self.plan.disk_bytes)} at most and its disk has "
                f"{format_bytes(free)} free: give another OUT or --work-dir, or free some space"
            )

    def _resume(self, found: Journal | None) -> None:
        levers = {
            "batch": self.plan.batch,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }
        total = len(self.plan.steps)
        self.journal = found or Journal.begin(self.work, self.fingerprint, levers, total)
        self.journal.trim()

    # -- the steps -----------------------------------------------------------------------

    def run(self) -> None:
        """Do every step that is not done yet."""
        steps = self._steps()
        names = [step.name for step in self.plan.steps]
        done = len(self.journal.steps)
        if [entry["step"] for entry in self.journal.steps] != names[:done]:
            raise JobMismatchError(f"{self.journal.path} lists other steps", field="steps")
        self.progress.begin(
            str(self.out), [step.seconds for step in self.plan.steps], done, self.budget
        )
        try:
            for number in range(done, len(names)):
                self._step(number, names[number], steps[number])
        finally:
            self.progress.end()

    def _steps(self) -> list[Callable[[_Stage], dict[str, Any]]]:
        blocks = [self._block_step(block) for block in self.plan.blocks]
        return [self._tokenize, self._embed, *blocks, self._copy_rest]

    def _step(self, number: int, name: str, work: Callable[[_Stage], dict[str, Any]]) -> None:
        self.meter.restart()
        stage = _Stage(self.progress, number, name)
        results = work(stage)
        results |= {
            "seconds": round(stage.total(), 3),
            "stages": {key: round(value, 3) for key, value in stage.seconds.items()},
            "peak_bytes": self.meter.peak(),
            "predicted_bytes": self.plan.steps[number].peak_bytes,
        }
        self.journal.commit(name, results)
        self._drop_streams_before(number)
        release()
        self.progress.finish_step(number, name, results["seconds"], results.get("detail", ""))

    def _tokenize(self, stage: _Stage) -> dict[str, Any]:
        stage("reading text")
        recipe = self.recipe
        windows = load_windows(
            self.index.folder, recipe.calibration, recipe.samples, recipe.seq_len, recipe.seed
        )
        for note in windows.notes:
            self.progress.note(note)
        write_shard(self._windows_path, [Entry("tokens", windows.tokens)])
        return {"windows": len(windows.tokens), "notes": list(windows.notes)}

    def _embed(self, stage: _Stage) -> dict[str, Any]:
        stage("checking")
        for infos in self.skeleton.outer_parameters().values():
            for info in infos:
                check_finite_on_disk(info)
        tokens = self._tokens
        states = self._states(0)
        states.create()
        try:
            for start, stop in self._batches(stage, "embedding"):
                hidden, calls = self.streamer.record(tokens[start:stop].long())
                check_same_calls(self._calls(stop - start), calls)
                _check_finite(hidden, "the embeddings")
                states.write(start, hidden)
        finally:
            states.close(durable=True)
        return {}

    def _block_step(self, block: BlockPlan) -> Callable[[_Stage], dict[str, Any]]:
        def step(stage: _Stage) -> dict[str, Any]:
            stage("loading")
            with self.streamer.block(block.number) as loaded:
                return self._compress_block(stage, block, loaded)

        return step

    def _compress_block(
        self, stage: _Stage, block: BlockPlan, loaded: LoadedBlock
    ) -> dict[str, Any]:
        compressed = self.recipe.statistics == "compressed"
        with Observer(loaded.module, loaded.name, block.groups, self.device) as observer:
            self._propagate(stage, "observing", block, loaded, write=not compressed)
        entries, linears = self._factorize(stage, block, loaded, observer)
        if compressed and block.number + 1 < len(self.skeleton):
            self._propagate(stage, "propagating", block, loaded, write=True)
        stage("writing")
        replaced = {linear.source.name for linear in block.linears.eligible if _rank(block, linear)}
        kept = [
            Entry(info.name, info)
            for info in self.skeleton.block_tensors(block.number)
            if info.name not in replaced
        ]
        write_shard(self.shard_path(block.number), entries + kept)
        loss = sum(linear["relative_loss"] for linear in linears) / max(1, len(linears))
        return {
            "digest": loaded.digest,
            "linears": linears,
            "detail": f"loss {loss:.2%}" if linears else "",
        }

    def _factorize(
        self, stage: _Stage, block: BlockPlan, loaded: LoadedBlock, observer: Observer
    ) -> tuple[list[Entry], list[dict[str, Any]]]:
        """Factors of every linear, installed in the block where it has to run with them."""
        entries: list[Entry] = []
        results = []
        for group in block.groups:
            moment = observer.take(group)
            for linear in group.linears:
                stage(f"factorizing {linear.name.rpartition('.')[2]}")
                rank = _rank(block, linear)
                dense = loaded.module.get_submodule(linear.name)
                assert rank and isinstance(dense, torch.nn.Linear)
                weight = dense.weight.detach()
                found = self.method.decompose(weight, moment)
                tensors = factor_tensors(
                    self.recipe.form,
                    weight,
                    found.basis(weight, rank),
                    linear.source.torch_dtype,
                )
                entries += [
                    Entry(f"{linear.disk_name}.{leaf}", tensor.cpu())
                    for leaf, tensor in tensors.items()
                ]
                results.append(
                    {
                        "name": linear.disk_name,
                        "rows": linear.rows,
                        "columns": linear.columns,
                        "rank": rank,
                        "relative_loss": found.relative_loss(rank),
                        "damping": found.damping,
                        "side": group.side,
                    }
                )
                if self.recipe.statistics == "compressed":
                    loaded.replace(
                        linear.name, _with_tensors(dense, self.recipe.form, rank, tensors)
                    )
            del moment
        return entries, results

    def _propagate(
        self, stage: _Stage, name: str, block: BlockPlan, loaded: LoadedBlock, write: bool
    ) -> None:
        """Run all windows through the block; ``write`` keeps what comes out for the next one."""
        write = write and block.number + 1 < len(self.skeleton)
        source, target = self._states(block.number), self._states(block.number + 1)
        source.open()
        try:
            if write:
                target.create()
            for start, stop in self._batches(stage, name):
                hidden = source.read(start, stop).to(self.device)
                hidden = loaded.run(hidden, self._calls(stop - start)[block.number])
                _check_finite(hidden, loaded.name)
                if write:
                    target.write(start, hidden)
        finally:
            source.close()
            target.close(durable=write)

    def _copy_rest(self, stage: _Stage) -> dict[str, Any]:
        stage("copying")
        entries = [Entry(info.name, info) for info in self.skeleton.other_tensors()]
        write_shard(self.shard_path(len(self.skeleton)), entries)
        return {}

    # -- what the steps stand on ---------------------------------------------------------

    @cached_property
    def streamer(self) -> BlockStreamer:
        return BlockStreamer(self.skeleton, self.device)

    @property
    def _windows_path(self) -> Path:
        return self.work / "windows.safetensors"

    @cached_property
    def _tokens(self) -> Tensor:
        """Calibration tokens (windows, seq), as the first step left them."""
        with TensorReader() as reader:
            return reader.read(read_header(self._windows_path)["tokens"])

    @property
    def _shape(self) -> StreamShape:
        windows, seq_len = self._tokens.shape
        return StreamShape(windows, seq_len, self.skeleton.hidden_size, self.skeleton.dtype)

    def _calls(self, batch: int) -> list[Call]:
        """Each block's call for ``batch`` windows; it depends on their shape alone."""
        if batch not in self._recorded:
            self._recorded[batch] = self.streamer.record(self._tokens[:batch].long())[1]
        return self._recorded[batch]

    def _batches(self, stage: _Stage, name: str) -> Iterator[tuple[int, int]]:
        windows, batch = self._shape.windows, self.plan.batch
        for start in range(0, windows, batch):
            stage(name, start / windows)
            yield start, min(start + batch, windows)

    def _states(self, number: int) -> HiddenStates:
        """Hidden states entering block ``number``."""
        return HiddenStates(self.work / f"hidden-{number:05d}.bin", self._shape)

    def _drop_streams_before(self, step: int) -> None:
        """Step 1 wrote the input of block 0, step 2 + k that of block k + 1."""
        for old in self.work.glob("hidden-*.bin"):
            if int(old.stem.partition("-")[2]) < step - 1:
                old.unlink(missing_ok=True)

    def shard_path(self, number: int) -> Path:
        total = len(self.skeleton) + 1
        return self.out / f"model-{number + 1:05d}-of-{total:05d}.safetensors"


class _Stage:
    """Names what a step is at, tells the progress, and keeps the seconds of each stage."""

    def __init__(self, progress: JobProgress, number: int, step: str) -> None:
        self._progress, self._number, self._step = progress, number, step
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def __call__(self, name: str, share: float = 0.0) -> None:
        self._close()
        self._name = name.partition(" ")[0]
        self._progress.stage(self._number, self._step, name, share)

    def total(self) -> float:
        self._close()
        return sum(self.seconds.values())

    def _close(self) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._since = now


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


def _rank(block: BlockPlan, linear: Linear) -> int | None:
    return block.ranks[linear.full_name]


def _with_tensors(
    dense: torch.nn.Linear, form: str, rank: int, tensors: dict[str, Tensor]
) -> torch.nn.Module:
    """A factored linear that holds ``tensors`` and the bias of ``dense``."""
    with torch.device("meta"):
        module = factored(dense, {"form": form, "rank": rank})
    state = {
        k: v.to(dense.weight.dtype) if v.is_floating_point() else v for k, v in tensors.items()
    }
    if dense.bias is not None:
        state["bias"] = dense.bias.detach()
    module.load_state_dict(state, assign=True)
    return module


def _check_finite(hidden: Tensor, name: str) -> None:
    if not bool(hidden.sum().isfinite()) and not bool(hidden.isfinite().all()):
        raise NonFiniteError(
            f"{name} puts out NaN or infinite values on the calibration text: the weights are "
            "damaged, or their dtype is too narrow for the model"
        )
