"""The step of an evaluation that scores the windows through the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from streamcomp.job.files import DenseStates, Windows
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step
from streamcomp.job.steps.loss import head_bytes, loading_head
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["Score"]

_F32 = 4


@dataclass(frozen=True)
class Score(Step):
    """Negative log-likelihood of each window's tokens, predicted from those before it.

    Holds the head, one window, and for ``head_tokens`` tokens logits in the model's dtype and twice
    in fp32.
    """

    @classmethod
    def make(cls, depth: int) -> Score:
        """The step after the last of ``depth`` blocks."""
        return cls("head", reads=(Windows(), DenseStates(depth)))

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        tokens, skeleton = levers.head_tokens, outline.skeleton
        yield loading_head(outline, skeleton.dtype)
        held = head_bytes(outline, skeleton.dtype) + outline.stream.window_bytes
        held += 3 * _F32 * tokens * outline.vocabulary
        held += outline.blocks[0].captured_again_bytes(tokens)
        flops = 2.0 * outline.tokens * skeleton.head.weight.numel()
        yield Phase("scoring", {"head and logits": held}, flops / outline.rates.model_flops)

    @torch.no_grad()
    def run(self, work: Workspace, stage: Stage) -> StepResult:
        total, last = 0.0, work.shape.seq_len - 1  # nothing is predicted from the last position
        size = work.levers.head_tokens
        stage("loading")
        with (
            work.streamer.head() as head,
            work.reading(DenseStates(len(work.skeleton))) as states,
        ):
            for window, _ in work.batches(stage, "scoring", 1):
                hidden = states.read(window, window + 1).to(work.device)
                targets = work.tokens[window, 1:].long().to(work.device)
                for start in range(0, last, size):
                    stop = min(start + size, last)
                    logits = head(hidden[:, start : start + size])[0, : stop - start].float()
                    nll = functional.cross_entropy(logits, targets[start:stop], reduction="none")
                    total += float(nll.double().sum())
        return StepResult(nll=total / (work.shape.windows * last))
