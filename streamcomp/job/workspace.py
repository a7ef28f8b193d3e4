"""What every step of a job stands on: the work folder, its streams, and the model's blocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from streamcomp.calibration.hidden_states import HiddenStates, StreamShape
from streamcomp.calibration.observe import MomentGroup
from streamcomp.checkpoint.atomic import sync_folder
from streamcomp.checkpoint.index import read_header
from streamcomp.checkpoint.reader import TensorReader, read_ahead
from streamcomp.errors import JobMismatchError, NonFiniteError
from streamcomp.job.journal import JOURNAL, Journal
from streamcomp.job.progress import JobProgress
from streamcomp.methods import Method, Swsc
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.modeling.streamer import BlockStreamer, LoadedBlock
from streamcomp.modeling.taps import Call
from streamcomp.planning.blocks import BlockPlan, passes_of_step
from streamcomp.planning.cost import gradient_dtype
from streamcomp.planning.meter import release
from streamcomp.planning.plan import Plan
from streamcomp.planning.schedule import Step, hidden_key
from streamcomp.recipe import Recipe

__all__ = ["Stage", "Workspace", "check_finite", "remove_work", "work_files"]

# All that a job puts into its work folder; whatever else lies there is somebody's own.
_WORK_FILE = re.compile(
    rf"{re.escape(JOURNAL)}|windows\.safetensors|(hidden|gradient)-\d{{5}}\.bin"
    r"|compressed-\d+-\d{5}\.bin|(analysis|moments)-\d{5}\..+\.safetensors"
)


class Stage:
    """Names what a step is at, tells the progress, and keeps the seconds of each stage.

    What a stage has freed goes back to the system before the next begins.
    """

    def __init__(self, progress: JobProgress, number: int, step: str) -> None:
        self._progress, self._number, self._step = progress, number, step
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def __call__(self, name: str, share: float = 0.0) -> None:
        self._close()
        kind = name.partition(" ")[0]
        if kind != self._name:
            release()
        self._name = kind
        self._progress.stage(self._number, self._step, name, share)

    def total(self) -> float:
        self._close()
        return sum(self.seconds.values())

    def _close(self) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._since = now


class Workspace:
    """The state of one job that its steps share. ``plan`` changes once, when ranks are known."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        method: Method | Swsc,
        device: torch.device,
        folder: Path,
        plan: Plan,
        journal: Journal,
        keeps_work: bool,
    ) -> None:
        self.skeleton, self.recipe, self.method = skeleton, recipe, method
        self.device, self.folder, self.plan, self.journal = device, folder, plan, journal
        self.keeps_work = keeps_work

    @cached_property
    def streamer(self) -> BlockStreamer:
        tokens = self.plan.levers.feed_forward_tokens
        return BlockStreamer(self.skeleton, self.device, tokens)

    @property
    def windows_path(self) -> Path:
        return self.folder / "windows.safetensors"

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration tokens (windows, seq), as the first step left them."""
        with TensorReader() as reader:
            return reader.read(read_header(self.windows_path)["tokens"])

    @property
    def shape(self) -> StreamShape:
        windows, seq_len = self.tokens.shape
        return StreamShape(windows, seq_len, self.skeleton.hidden_size, self.skeleton.dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        return gradient_dtype(self.skeleton.dtype)

    def block_plan(self, number: int) -> BlockPlan:
        return self.plan.blocks[number]

    def passes(self, step: Step) -> list[tuple[MomentGroup, ...]]:
        """The groups that ``step`` works on each time that it reads its block."""
        block, plan = self.block_plan(step.block), self.plan
        return passes_of_step(step, block, self.recipe, plan.analysis, plan.levers)

    @contextmanager
    def block(self, stage: Stage, number: int) -> Iterator[LoadedBlock]:
        """The block with its weights; JobMismatchError where an earlier sweep read other bytes.

        Where the budget has room for it in the page cache, the next step's block is read ahead.
        """
        stage("loading")
        with self.streamer.block(number) as loaded:
            for step in self.journal.steps:
                if step.get("block") == number and step["digest"] != loaded.digest:
                    raise JobMismatchError(
                        f"{loaded.name} has other bytes now than in step {step['step']!r}: the "
                        "model's files have changed; give another OUT",
                        field="source",
                    )
            self._read_ahead(number)
            yield loaded

    def _read_ahead(self, number: int) -> None:
        """Ask the kernel for the block of the step to come."""
        steps, current = self.plan.steps, len(self.journal.steps)
        following = steps[current + 1].step.block if current + 1 < len(steps) else -1
        if following in (-1, number):
            return
        infos = self.skeleton.block_tensors(following)
        if steps[current].peak_bytes + sum(info.nbytes for info in infos) <= self.plan.budget_bytes:
            read_ahead(infos)

    def call(self, number: int, batch: int, dtype: torch.dtype | None = None) -> Call:
        """How a block is called for ``batch`` windows.

        In ``dtype`` where it does not run in the model's own: then a copy of its own.
        """
        call = self.streamer.calls(self.tokens[:batch].long())[number]
        if dtype is None or dtype == self.skeleton.dtype:
            return call

        def cast(tensor: Tensor) -> Tensor:
            if tensor.dtype != self.skeleton.dtype:
                return tensor
            if tensor.dim() and tensor.stride(0) == 0:  # a view of one window's
                return tensor[:1].to(dtype).expand_as(tensor)
            return tensor.to(dtype)

        return Call(*tree_map_only(Tensor, cast, (call.args, call.kwargs)))

    def record_calls(self) -> None:
        """Have all calls made while no block is there, whose bytes would come on top."""
        levers, windows = self.plan.levers, self.shape.windows
        for size in {1, *(min(n, windows) for n in (levers.batch, levers.reverse_batch))}:
            self.streamer.calls(self.tokens[:size].long())
            if rest := windows % size:
                self.streamer.calls(self.tokens[:rest].long())

    def batches(self, stage: Stage, name: str, size: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each micro-batch of ``size`` windows."""
        windows = self.shape.windows
        for start in range(0, windows, size):
            stage(name, start / windows)
            yield start, min(start + size, windows)

    def states(self, key: str) -> HiddenStates:
        """The stream that the schedule calls ``key``."""
        shape = self.shape
        if key.startswith("gradient"):
            shape = StreamShape(shape.windows, shape.seq_len, shape.hidden, self.gradient_dtype)
        return HiddenStates(self.folder / f"{key}.bin", shape)

    @contextmanager
    def reading(self, key: str) -> Iterator[HiddenStates]:
        states = self.states(key)
        states.open()
        try:
            yield states
        finally:
            states.close()

    @contextmanager
    def writing(self, key: str | None) -> Iterator[Callable[[int, Tensor], None]]:
        """A function that puts states at a window; durable at the end. Without ``key``, nothing."""
        if key is None:
            yield lambda start, states: None
            return
        states = self.states(key)
        states.create()
        done = False
        try:
            yield states.write
            done = True
        finally:
            states.close(durable=done)

    def propagate(
        self,
        stage: Stage,
        name: str,
        loaded: LoadedBlock,
        number: int,
        source: str,
        target: str | None,
    ) -> None:
        """Run all windows through the block; ``target`` keeps what comes out."""
        with self.reading(source) as states, self.writing(target) as write:
            for start, stop in self.batches(stage, name, self.plan.levers.batch):
                hidden = states.read(start, stop).to(self.device)
                hidden = loaded.run(hidden, self.call(number, stop - start))
                check_finite(hidden, loaded.name)
                write(start, hidden)

    def drop(self, live: set[str]) -> None:
        """Delete the files of the work folder that no step to come reads.

        Kept work is the analysis, and the embeddings that a compressed stream begins with.
        """
        kinds = ("hidden-", "compressed-", "gradient-", "analysis-")
        for path in work_files(self.folder):
            key = path.name.partition(".")[0]
            if not key.startswith(kinds) or key in live:
                continue
            if not (self.keeps_work and (key.startswith("analysis-") or key == hidden_key(0))):
                path.unlink(missing_ok=True)

    @property
    def unreached(self) -> set[str]:
        """Linears, by their names on disk, that no calibration token reached."""
        return {name for step in self.journal.steps for name in step.get("unreached", [])}

    def analysis_of(self, block: int) -> list[dict[str, Any]]:
        """Figures of the decompositions of the linears of ``block``, as they were made last."""
        steps = (step for step in reversed(self.journal.steps) if step.get("block") == block)
        return next(step["analysis"] for step in steps if "analysis" in step)


def work_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that bear a name of a job's own, also unfinished ones."""

    def is_ours(path: Path) -> bool:
        name = path.name
        if name.startswith(".") and name.endswith(".tmp"):
            name = name[1 : -len(".tmp")]
        return _WORK_FILE.fullmatch(name) is not None and path.is_file()

    return [path for path in folder.iterdir() if is_ours(path)]


def remove_work(folder: Path) -> None:
    """Delete what a job left in its work folder, and the folder if nothing else is in it.

    The journal goes last: until then, a call that was interrupted knows whose files these are.
    """
    for path in sorted(work_files(folder), key=lambda path: path.name == JOURNAL):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
        sync_folder(folder.parent)


def check_finite(hidden: Tensor, name: str) -> None:
    """NonFiniteError where hidden states hold NaN or infinity."""
    if not bool(hidden.sum().isfinite()) and not bool(hidden.isfinite().all()):
        raise NonFiniteError(
            f"{name} puts out NaN or infinite values on the calibration text: the weights are "
            "damaged, or their dtype is too narrow for the model"
        )
