"""Perplexity, one block in memory at a time, for dense and compressed models alike."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamcomp.calibration.corpus import HELD_OUT, load_windows
from streamcomp.calibration.hidden_states import HiddenStates, StreamShape
from streamcomp.checkpoint.atomic import make_folder
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.errors import NonFiniteError
from streamcomp.job.progress import JobProgress
from streamcomp.job.run import choose_device
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.modeling.streamer import BlockStreamer
from streamcomp.planning.meter import (
    PeakMeter,
    budget_bytes,
    device_budget_bytes,
    is_memory_backed,
    limit_device,
    release,
    warm_up,
    within_device,
)
from streamcomp.planning.plan import make_evaluation_plan
from streamcomp.recipe import Resources

__all__ = ["Evaluation", "evaluate_checkpoint"]

_MOST_NLL = 700.0  # its exponential is about the largest number there is


@dataclass(frozen=True)
class Evaluation:
    """Perplexity on ``windows`` windows of ``seq_len`` tokens."""

    perplexity: float  # exp of the mean negative log-likelihood per predicted token
    nll: float  # that mean, in nats
    tokens: int  # predicted: windows * (seq_len - 1)
    windows: int
    seq_len: int
    text: str
    parameters: int  # numbers in the checkpoint
    checkpoint_bytes: int
    seconds: float
    peak_bytes: int
    predicted_bytes: int
    budget_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """In plain values; JSON has no infinite perplexity: None."""
        return asdict(self) | {"perplexity": self.perplexity if self.nll < _MOST_NLL else None}


def evaluate_checkpoint(
    index: CheckpointIndex,
    text: str | None,
    seq_len: int,
    windows: int,
    resources: Resources,
    progress: JobProgress,
    *,
    chat: bool = False,
) -> Evaluation:
    """Stream the first ``windows`` windows of ``text`` (0 = all) through the model.

    ``text`` is a source as in calibration; None is the held-out part of the Python
    reference. ``chat`` renders it through the chat template. Each window is predicted from its
    own beginning. Holds one block, one micro-batch, and at the end the head with the logits of a
    few tokens.
    """
    started = time.perf_counter()
    meter = PeakMeter()
    budget = budget_bytes(resources.max_ram)
    device = choose_device(resources.device)
    device_budget = device_budget_bytes(device, resources.max_vram)
    skeleton = Skeleton(index)
    skeleton.check_tensors(head=True)
    kernels = warm_up(device, skeleton.dtype)
    text = text or HELD_OUT
    tokens = load_windows(index.folder, [text], windows, seq_len, None, chat=chat)
    for note in (*skeleton.notes, *tokens.notes):
        progress.note(note)
    release()
    shape = StreamShape(len(tokens.tokens), seq_len, skeleton.hidden_size, skeleton.dtype)
    with _work_folder(resources.work_dir) as work:
        batch, head_tokens, predicted = make_evaluation_plan(
            skeleton,
            shape,
            budget,
            kernel_bytes=kernels,
            memory_backed=is_memory_backed(work),
            device_budget=device_budget,
        )
        limit_device(device, device_budget)
        progress.begin("evaluate", [1.0] * (len(skeleton) + 1), 0, budget)
        try:
            run = _Run(skeleton, device, tokens.tokens, shape, batch, work, progress)
            with within_device("evaluation", device_budget):
                nll = run.nll(run.through_blocks(), head_tokens)
        finally:
            progress.end()
    predicted_tokens = shape.windows * (seq_len - 1)
    mean = nll / predicted_tokens
    if math.isnan(mean):
        raise NonFiniteError(
            f"{index.folder}: its logits are NaN on {text}; the weights are damaged"
        )
    return Evaluation(
        math.exp(mean) if mean < _MOST_NLL else math.inf,
        mean,
        predicted_tokens,
        shape.windows,
        seq_len,
        text,
        index.numel,
        index.nbytes,
        time.perf_counter() - started,
        meter.peak(),
        predicted,
        budget,
    )


@contextmanager
def _work_folder(folder: Path | None) -> Iterator[Path]:
    """A fresh folder for the streams, below ``folder`` or where temporary files go."""
    if folder is not None:
        make_folder(folder)
    with tempfile.TemporaryDirectory(prefix="streamcomp-", dir=folder) as name:
        yield Path(name)


class _Run:
    """One evaluation: embeds, passes every block, and adds up the loss."""

    def __init__(
        self,
        skeleton: Skeleton,
        device: torch.device,
        tokens: Tensor,
        shape: StreamShape,
        batch: int,
        work: Path,
        progress: JobProgress,
    ) -> None:
        self.skeleton, self.device, self.tokens, self.shape = skeleton, device, tokens, shape
        self.batch, self.work, self.progress = batch, work, progress
        self.streamer = BlockStreamer(skeleton, device)

    def through_blocks(self) -> HiddenStates:
        """The last block's output; every file before it is deleted."""
        source = HiddenStates(self.work / "hidden-0.bin", self.shape)
        source.create()
        for start, stop in self._batches():
            source.write(start, self.streamer.embed(self.tokens[start:stop].long()))
        source.close()
        for number in range(len(self.skeleton)):
            started = time.perf_counter()
            target = HiddenStates(self.work / f"hidden-{number + 1}.bin", self.shape)
            source.open()
            target.create()
            with self.streamer.block(number) as block:
                for start, stop in self._batches():
                    self.progress.stage(number, block.name, "forward", start / self.shape.windows)
                    hidden = source.read(start, stop).to(self.device)
                    call = self.streamer.calls(self.tokens[start:stop].long())[number]
                    target.write(start, block.run(hidden, call))
            source.close()
            source.remove()
            target.close()
            source = target
            release()
            self.progress.finish_step(number, f"block {number}", time.perf_counter() - started, "")
        return source

    @torch.no_grad()
    def nll(self, states: HiddenStates, head_tokens: int) -> float:
        """Sum of -log p over all predicted tokens, ``head_tokens`` positions at a time."""
        total, last = 0.0, self.shape.seq_len - 1  # nothing is predicted from the last position
        started = time.perf_counter()
        states.open()
        with self.streamer.head() as head:
            for window in range(self.shape.windows):
                self.progress.stage(
                    len(self.skeleton), "head", "logits", window / self.shape.windows
                )
                hidden = states.read(window, window + 1).to(self.device)
                targets = self.tokens[window, 1:].long().to(self.device)
                for start in range(0, last, head_tokens):
                    stop = min(start + head_tokens, last)
                    logits = head(hidden[:, start : start + head_tokens])[0, : stop - start]
                    loss = functional.cross_entropy(
                        logits.float(), targets[start:stop], reduction="none"
                    )
                    total += float(loss.double().sum())
        states.close()
        states.remove()
        self.progress.finish_step(len(self.skeleton), "head", time.perf_counter() - started, "")
        return total

    def _batches(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.shape.windows, self.batch):
            yield start, min(start + self.batch, self.shape.windows)
