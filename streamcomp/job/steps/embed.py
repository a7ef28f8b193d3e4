"""The step that embeds the windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamcomp.checkpoint.reader import COPY_BYTES, TensorReader, check_finite_on_disk
from streamcomp.job.files import DenseStates, Windows
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step
from streamcomp.job.workspace import Stage, Workspace, check_finite

__all__ = ["Embed"]

_SECONDS = 0.5


@dataclass(frozen=True)
class Embed(Step):
    """Hidden states as they enter the first block, and the check of all weights outside of blocks.

    Holds a row of the embedding for each distinct token of a micro-batch, on disk's dtype and in
    the model's, the states four times, and what masks and positions are made of.
    """

    @classmethod
    def make(cls) -> Embed:
        return cls("embed", reads=(Windows(),), writes=(DenseStates(0),))

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        stream, captured = outline.stream, outline.blocks[0].inputs.peak_bytes
        row = stream.hidden * stream.dtype.itemsize
        distinct = min(outline.vocabulary, levers.batch * stream.seq_len)
        held = 2 * distinct * row + levers.batch * (4 * stream.window_bytes + captured)
        yield Phase("checking", {"buffers": 3 * COPY_BYTES})
        yield Phase("embedding", {"embeddings": held}, _SECONDS)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        stage("checking")
        with TensorReader() as reader:
            for infos in work.skeleton.outer_parameters().values():
                for info in infos:
                    check_finite_on_disk(info, reader)
        work.saw(reader.digests)
        with work.writing(DenseStates(0)) as write:
            for start, stop in work.batches(stage, "embedding", work.levers.batch):
                hidden = work.streamer.embed(work.tokens[start:stop].long())
                check_finite(hidden, "the embeddings")
                write(start, hidden)
        return StepResult()
