"""The step where the gradient of the loss enters through the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from streamcomp.errors import NonFiniteError
from streamcomp.job.files import DenseStates, Gradients, Windows
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step
from streamcomp.job.workspace import Stage, Workspace, check_finite
from streamcomp.linalg.dtypes import gradient_dtype, moment_dtype

__all__ = ["Loss", "head_bytes", "loading_head"]

_LARGEST = 700.0  # its exponential is near the largest fp64 number
_F32 = 4


@dataclass(frozen=True)
class Loss(Step):
    """Negative log-likelihood, summed over tokens, and its gradient at the last block's output.

    Holds the head, and for ``head_tokens`` tokens of one window logits in the model's dtype and
    twice in fp32, their gradients, and a copy where logits are scaled or softly capped; and three
    windows of hidden states.
    """

    @classmethod
    def make(cls, depth: int) -> Loss:
        """The step after the last of ``depth`` blocks."""
        return cls(
            "gradient of the loss",
            reads=(Windows(), DenseStates(depth)),
            writes=(Gradients(depth),),
        )

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        stream, tokens = outline.stream, levers.head_tokens
        run_dtype = gradient_dtype(stream.dtype)
        window = stream.seq_len * stream.hidden * run_dtype.itemsize
        held = head_bytes(outline, run_dtype) + 3 * window
        held += 5 * _F32 * tokens * outline.vocabulary
        held += outline.blocks[0].captured_again_bytes(tokens)
        numbers = outline.skeleton.head.weight.numel()
        seconds = 3 * 2.0 * outline.tokens * numbers / outline.rates.model_flops
        yield loading_head(outline, run_dtype)
        yield Phase("differentiating", {"head and logits": held}, seconds)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        depth = len(work.skeleton)
        total, last = 0.0, work.shape.seq_len - 1  # nothing is predicted from the last position
        size, dtype = work.levers.head_tokens, gradient_dtype(work.skeleton.dtype)
        stage("loading")
        with (
            work.streamer.head(dtype) as head,
            work.reading(DenseStates(depth)) as states,
            work.writing(Gradients(depth)) as write,
        ):
            for window, _ in work.batches(stage, "differentiating", 1):
                hidden = states.read(window, window + 1).to(work.device, dtype)
                targets = work.tokens[window, 1:].long().to(work.device)
                gradient = torch.zeros_like(hidden)
                for start in range(0, last, size):
                    stop = min(start + size, last)
                    piece = hidden[:, start : start + size].detach().requires_grad_()
                    with torch.enable_grad():
                        logits = head(piece)[0, : stop - start].to(moment_dtype(dtype))
                        nll = functional.cross_entropy(logits, targets[start:stop], reduction="sum")
                    gradient[:, start : start + size] = torch.autograd.grad(nll, piece)[0]
                    total += float(nll.detach())
                check_finite(gradient, "the gradient of the loss")
                write(window, gradient)
        mean = total / (work.shape.windows * last)
        if math.isnan(mean):
            raise NonFiniteError("the loss on the calibration text is NaN: the weights are damaged")
        perplexity = math.exp(min(mean, _LARGEST))
        return StepResult(nll=mean, detail=f"perplexity {perplexity:.2f} on the calibration text")


def loading_head(outline: Outline, run_dtype: torch.dtype) -> Phase:
    """Reading the head."""
    source = outline.skeleton.embedding_source
    on_disk = outline.skeleton.head.weight.numel() * source.torch_dtype.itemsize
    seconds = on_disk / outline.rates.disk_bytes
    return Phase("loading", {"head and logits": head_bytes(outline, run_dtype)}, seconds)


def head_bytes(outline: Outline, run_dtype: torch.dtype) -> int:
    """The head in the dtypes on disk, of the model and of the run, once for each distinct one."""
    skeleton = outline.skeleton
    dtypes = {skeleton.embedding_source.torch_dtype, skeleton.dtype, run_dtype}
    return int(skeleton.head.weight.numel() * sum(dtype.itemsize for dtype in dtypes))
