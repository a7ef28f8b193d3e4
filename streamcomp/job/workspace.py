"""State that all steps share: the work folder, its streams, and the model's blocks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from streamcomp.calibration.hidden_states import HiddenStates, StreamShape
from streamcomp.calibration.routing import Routing
from streamcomp.checkpoint.atomic import sync_folder
from streamcomp.checkpoint.fetched import FETCHED_FOLDER
from streamcomp.checkpoint.index import TensorInfo
from streamcomp.checkpoint.reader import TensorReader, read_ahead
from streamcomp.checkpoint.writer import Entry
from streamcomp.errors import JobMismatchError, NonFiniteError, OutputError
from streamcomp.job.block_plan import BlockPlan
from streamcomp.job.files import States, Windows, is_step_file
from streamcomp.job.journal import JOURNAL, Journal
from streamcomp.job.ledger import Ledger
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.progress import JobProgress
from streamcomp.job.rows import AnalysisRow
from streamcomp.machine.allocator import release
from streamcomp.methods import Method
from streamcomp.model.sites import Site
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.streamer import BlockStreamer, LoadedBlock
from streamcomp.model.taps import LayerInputs
from streamcomp.recipe import Recipe

__all__ = ["Stage", "Workspace", "check_finite", "remove_work", "work_files"]


_WINDOWS = f"{Windows().key}.safetensors"


class Stage:
    """Names the phase that a step is in, tells the progress, and keeps the seconds of each.

    Memory that a phase has freed goes back to the system before the next begins.
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
    """The state of one job that its steps share. ``outline`` changes once, when ranks are known."""

    def __init__(
        self,
        outline: Outline,
        levers: Levers,
        device: torch.device,
        folder: Path,
        journal: Journal,
        shards: Callable[[int], list[Path]],
    ) -> None:
        """``shards`` tells where an output's are: one for each block, and one for the rest."""
        self.outline, self.levers, self.device = outline, levers, device
        self.folder, self.journal, self.shards = folder, journal, shards
        self.ledger = Ledger(folder, journal)
        self.read_ahead: list[TensorInfo] = []  # tensors to ask for once a block is read
        # digests of tensors of the source, as they were first read
        self._sources = {k: v for row in journal.steps for k, v in row.sources.items()}

    @property
    def skeleton(self) -> Skeleton:
        return self.outline.skeleton

    @property
    def recipe(self) -> Recipe:
        return self.outline.recipe

    @property
    def method(self) -> Method:
        return self.outline.method

    @cached_property
    def streamer(self) -> BlockStreamer:
        tokens = self.levers.feed_forward_tokens
        return BlockStreamer(self.skeleton, self.device, tokens, self.saw)

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration tokens (windows, seq), as the first step left them."""
        return dict(self.ledger.read(_WINDOWS))["tokens"]

    def write_tokens(self, tokens: Tensor) -> None:
        """Keep the calibration tokens."""
        self.ledger.write(_WINDOWS, [Entry("tokens", tokens)])

    def write_shard(self, output: int, number: int, entries: Iterable[Entry]) -> None:
        """Write a shard of an output; JobMismatchError where a tensor that it copies changed."""
        reader = TensorReader()
        self.ledger.write_shard(self.shards(output)[number], entries, reader)
        self.saw(reader.digests)

    # -- the source ----------------------------------------------------------------------

    def saw(self, digests: Mapping[str, str]) -> None:
        """Note tensors of the source by their digests; JobMismatchError where one has changed."""
        for name, digest in digests.items():
            if self._sources.setdefault(name, digest) != digest:
                raise JobMismatchError(
                    f"{name} has other bytes now than when it was read before: the model's files "
                    "have changed; give another OUT",
                    field="source",
                )

    def new_sources(self) -> dict[str, str]:
        """Digests of tensors outside of blocks that no step of the journal has noted.

        Those of tensors in blocks are dropped: the journal has one digest for all of a block.
        """
        outer = {info.name for info in self.skeleton.other_tensors()}
        noted = {name for row in self.journal.steps for name in row.sources}
        self._sources = {name: self._sources[name] for name in self._sources.keys() & outer}
        return {name: self._sources[name] for name in sorted(self._sources.keys() - noted)}

    @property
    def shape(self) -> StreamShape:
        windows, seq_len = self.tokens.shape
        return StreamShape(windows, seq_len, self.skeleton.hidden_size, self.skeleton.dtype)

    def block_plan(self, number: int) -> BlockPlan:
        return self.outline.blocks[number]

    @contextmanager
    def block(self, stage: Stage, number: int) -> Iterator[LoadedBlock]:
        """The block with its weights; JobMismatchError where an earlier sweep read other bytes.

        Where its experts are loaded apart, that is known when they have been read. Tensors to be
        read ahead are asked for then.
        """
        stage("loading")
        bank = self.block_plan(number).bank
        with self.streamer.block(number, bank) as loaded:
            if bank is None:
                self.check_source(loaded)
            else:
                self.saw({f"{loaded.name} without its experts": loaded.digest})
            read_ahead(self.read_ahead)
            yield loaded

    def check_source(self, loaded: LoadedBlock) -> None:
        """JobMismatchError where an earlier sweep read other bytes for a block, now read whole."""
        for row in self.journal.steps:
            if row.block == loaded.number and row.digest not in (None, loaded.digest):
                raise JobMismatchError(
                    f"{loaded.name} has other bytes now than in step {row.step!r}: the "
                    "model's files have changed; give another OUT",
                    field="source",
                )

    def inputs(self, number: int, batch: int, dtype: torch.dtype | None = None) -> LayerInputs:
        """Inputs of a block for ``batch`` windows, besides the hidden states.

        With a ``dtype`` other than the model's, a copy in that dtype.
        """
        inputs = self.streamer.layer_inputs(self.tokens[:batch].long())[number]
        if dtype is None or dtype == self.skeleton.dtype:
            return inputs

        def cast(tensor: Tensor) -> Tensor:
            if tensor.dtype != self.skeleton.dtype:
                return tensor
            if tensor.dim() and tensor.stride(0) == 0:  # a view of one window
                return tensor[:1].to(dtype).expand_as(tensor)
            return tensor.to(dtype)

        return LayerInputs(*tree_map_only(Tensor, cast, (inputs.args, inputs.kwargs)))

    def capture(self) -> None:
        """Capture the blocks' inputs for each batch size before a block's weights are loaded."""
        levers, windows = self.levers, self.shape.windows
        for size in {1, *(min(n, windows) for n in (levers.batch, levers.reverse_batch))}:
            self.streamer.layer_inputs(self.tokens[:size].long())
            if rest := windows % size:
                self.streamer.layer_inputs(self.tokens[:rest].long())

    def batches(self, stage: Stage, name: str, size: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each micro-batch of ``size`` windows."""
        windows = self.shape.windows
        for start in range(0, windows, size):
            stage(name, start / windows)
            yield start, min(start + size, windows)

    def states(self, file: States) -> HiddenStates:
        return HiddenStates(self.folder / f"{file.key}.bin", file.shape(self.shape))

    @contextmanager
    def reading(self, file: States) -> Iterator[HiddenStates]:
        """The states; DamagedFileError at the end where they are not what was written.

        Also instead of an error that they may have caused.
        """
        states = self.states(file)
        expected = self.ledger.expected(states.path.name)
        states.open()
        try:
            try:
                yield states
            except Exception:
                states.verify(expected)
                raise
            states.verify(expected)
        finally:
            states.close()

    @contextmanager
    def writing(self, file: States | None) -> Iterator[Callable[[int, Tensor], None]]:
        """A function that puts states at a window; durable at the end. None: nothing is kept."""
        if file is None:
            yield lambda start, states: None
            return
        states = self.states(file)
        states.create()
        done = False
        try:
            yield states.write
            done = True
        finally:
            states.close(durable=done)
        self.ledger.written[states.path.name] = states.digest

    def propagate(
        self,
        stage: Stage,
        phase: str,
        loaded: LoadedBlock,
        source: States,
        target: States | None,
        routing: Routing | None = None,
    ) -> None:
        """Run all windows through the block and keep its outputs in ``target``.

        With ``routing`` on what it says that the experts give.
        """
        with self.reading(source) as states, self.writing(target) as write:
            for start, stop in self.batches(stage, phase, self.levers.batch):
                hidden = states.read(start, stop).to(self.device)
                inputs = self.inputs(loaded.number, stop - start)
                with routing.replayed(loaded, start, len(hidden)) if routing else nullcontext():
                    hidden = loaded.run(hidden, inputs)
                check_finite(hidden, loaded.name)
                write(start, hidden)

    @property
    def unreached(self) -> set[str]:
        """Sites, by their names on disk, that no calibration token reached."""
        return {name for row in self.journal.steps for name in row.unreached}

    def analysis_row(self, block: int, site: Site) -> AnalysisRow:
        """The journal's row on the latest decomposition of ``site``."""
        steps = (step for step in reversed(self.journal.steps) if step.block == block)
        rows = (row for step in steps for row in step.analysis)
        for row in rows:
            if row.name == site.disk_name:
                return row
        raise OutputError(
            f"{self.journal.path} is damaged, it lists no decomposition of {site.disk_name}: "
            f"remove {self.folder} and start again"
        )


def work_files(folder: Path) -> list[Path]:
    """Files and links in ``folder`` with names that jobs use, also unfinished ones."""

    def is_ours(path: Path) -> bool:
        name = path.name
        if name.startswith(".") and name.endswith(".tmp"):
            name = name[1 : -len(".tmp")]
        ours = name == JOURNAL or is_step_file(name)
        return ours and (path.is_symlink() or path.is_file())

    return [path for path in folder.iterdir() if is_ours(path)]


def remove_work(folder: Path) -> None:
    """Delete what a job left in its work folder, and the folder unless it holds more or is a link.

    The journal goes last: until then it tells an interrupted call whose files these are.
    """
    shutil.rmtree(folder / FETCHED_FOLDER, ignore_errors=True)
    for path in sorted(work_files(folder), key=lambda path: path.name == JOURNAL):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()) and not folder.is_symlink():
        folder.rmdir()
        sync_folder(folder.parent)


def check_finite(hidden: Tensor, name: str) -> None:
    """NonFiniteError where hidden states hold NaN or infinity."""
    if not bool(hidden.sum().isfinite()) and not bool(hidden.isfinite().all()):
        raise NonFiniteError(
            f"{name} puts out NaN or infinite values on the calibration text: the weights are "
            "damaged, or their dtype is too narrow for the model"
        )
