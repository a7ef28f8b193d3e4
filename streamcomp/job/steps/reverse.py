"""The step that runs a block forward and back, and decomposes its weights by loss.

The reverse sweep streams as the forward one does: blocks are loaded last to first. Each runs on one
micro-batch at a time, from its input as the forward sweep left it on disk; hooks take the moments,
and the gradient of its input goes to a file for the block below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from streamcomp.calibration.observe import Observer, observing_bytes
from streamcomp.calibration.routing import Routing
from streamcomp.job import kept
from streamcomp.job.block_plan import BlockPlan, Pass
from streamcomp.job.files import DenseStates, Gradients, StepFile
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.analyse import (
    Analysed,
    decompose,
    decomposing,
    kept_files,
    moment_seconds,
)
from streamcomp.job.steps.base import Phase, Step, loading, running
from streamcomp.job.steps.experts import (
    decompose_experts,
    decomposing_experts,
    descend,
    descending,
    route,
    routing,
    routing_parts,
    scratch,
)
from streamcomp.job.workspace import Stage, Workspace, check_finite
from streamcomp.linalg.dtypes import gradient_dtype, moment_dtype
from streamcomp.linalg.moments import SecondMoment
from streamcomp.model.streamer import LoadedBlock
from streamcomp.recipe import Recipe

__all__ = ["Reverse"]

_BACKWARD = 2  # forwards that take as long as a backward


@dataclass(frozen=True)
class Reverse(Step):
    """Takes moments of one block's inputs, outputs and gradients, and decomposes its weights.

    In one pass over the windows, or in several passes that each take moments of some groups.
    Where its input was not stored, it is computed first, from the last one that was.
    """

    @classmethod
    def make(
        cls, block: int, depth: int, chosen: range, recipe: Recipe, *, keeps_moments: bool
    ) -> Reverse:
        """One of ``depth`` blocks, of which the ``chosen`` ones are decomposed."""
        every = recipe.store_every
        stored = block - block % every
        again: tuple[StepFile, ...] = ()
        if block == depth - 1 or block % every == every - 1:  # the last of its segment
            again = tuple(DenseStates(k) for k in range(stored + 1, block + 1))
        below = (Gradients(block),) if block > chosen.start else ()
        kept_here = kept_files(block, chosen, keeps_moments=keeps_moments)
        reads = (DenseStates(stored if again else block), Gradients(block + 1))
        return cls(f"reverse {block}", block, -1, reads, (*again, *below, *kept_here))

    @property
    def _again(self) -> list[int]:
        """Blocks to run a second time, since their output was not stored."""
        return [file.block - 1 for file in self.writes if isinstance(file, DenseStates)]

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        for number in self._again:
            yield loading(outline, number)
            block = outline.blocks[number].chunked(levers)
            yield from routing(outline, block, levers.batch, outline.stream.dtype)
            yield running("forward", outline, block, levers.batch)
        block = outline.blocks[self.block].chunked(levers)
        dtype = gradient_dtype(outline.stream.dtype)
        for turn, groups in enumerate(block.passes(levers)):
            yield loading(outline, self.block)
            if turn == 0:
                yield from routing(outline, block, levers.batch, dtype)
                yield from descending(outline, block, levers, dtype)
                yield from decomposing_experts(outline, block, dtype)
            outgoing = block.output_gradient_bytes if turn == 0 else 0
            yield _reversing(outline, block, levers, groups, outgoing)
            yield from decomposing(outline, block, groups)

    def held(self, outline: Outline) -> Mapping[str, int]:
        return {**super().held(outline), **routing_parts(outline, self.block, gradients=True)}

    def scratch_bytes(self, outline: Outline) -> int:
        return scratch(outline, self.block, gradients=True)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        for number in self._again:
            source, target = DenseStates(number), DenseStates(number + 1)
            with (
                work.block(stage, number) as loaded,
                route(work, stage, loaded, source, work.skeleton.dtype) as routed,
            ):
                work.propagate(stage, "forward", loaded, source, target, routed)
        below: Gradients | None = Gradients(self.block)
        if below not in self.writes:
            below = None
        analysed, digest, routed = Analysed(), "", None
        block = work.block_plan(self.block)
        with ExitStack() as stack:
            for turn, groups in enumerate(block.passes(work.levers)):
                with work.block(stage, self.block) as loaded:
                    first = turn == 0
                    if first:
                        routed = stack.enter_context(_descended(work, stage, loaded, analysed))
                        digest = loaded.digest
                    observer = _differentiate(
                        work,
                        stage,
                        loaded,
                        groups,
                        below if first else None,
                        routed,
                        outgoing=first,
                    )
                    decompose(work, stage, loaded, observer, groups, analysed, self.writes)
        return analysed.result(self.block, digest)


@contextmanager
def _descended(
    work: Workspace, stage: Stage, loaded: LoadedBlock, analysed: Analysed
) -> Iterator[Routing | None]:
    """The experts of a block run forward and back, and decomposed; None where it has none apart."""
    source, above = DenseStates(loaded.number), Gradients(loaded.number + 1)
    dtype = gradient_dtype(work.skeleton.dtype)
    with route(work, stage, loaded, source, dtype) as routed:
        if routed is not None:
            descend(work, stage, loaded, routed, (source, above), dtype)
            analysed.rows += decompose_experts(work, stage, loaded, routed)
        yield routed


def _reversing(
    outline: Outline, block: BlockPlan, levers: Levers, groups: Pass, outgoing: int
) -> Phase:
    """Forward and backward of all windows, ``outgoing`` bytes of moments next to those of groups.

    The incoming gradient, the input, its gradient and the products with W^T are held too.
    """
    stream, batch = block.stream, levers.reverse_batch
    run_dtype = gradient_dtype(stream.dtype)
    wider = run_dtype.itemsize / stream.dtype.itemsize
    states = 4 * stream.window_bytes
    parts = {
        "weights": block.cast_weight_bytes(run_dtype),
        "moments": outgoing + block.moment_bytes(groups),
        "activations": int(wider * batch * (block.trace.autograd_bytes + states))
        + 2 * observing_bytes(block.groups, stream, batch)
        + batch * block.replay_bytes(run_dtype, gradients=True)
        + block.cast_input_bytes(run_dtype),
    }
    twice = levers.feed_forward_tokens < stream.seq_len  # most of a forward
    seconds = (1 + twice + _BACKWARD) * outline.forward_seconds(block.number)
    return Phase("reverse", parts, seconds + moment_seconds(outline, groups))


def _differentiate(
    work: Workspace,
    stage: Stage,
    loaded: LoadedBlock,
    groups: Pass,
    below: Gradients | None,
    routed: Routing | None,
    *,
    outgoing: bool,
) -> Observer:
    """All windows forward and back through the block; ``below`` keeps its inputs' gradient.

    With ``outgoing`` the moment of its output's gradient goes to the work folder too; with
    ``routed`` its experts are not run.
    """
    number, batch = loaded.number, work.levers.reverse_batch
    dtype = gradient_dtype(work.skeleton.dtype)
    outputs = None
    if groups and outgoing:
        outputs = SecondMoment(work.shape.hidden, dtype=moment_dtype(dtype), device=work.device)
    with (
        loaded.cast(dtype),
        Observer(loaded, groups, work.device) as observer,
        work.reading(DenseStates(number)) as states,
        work.reading(Gradients(number + 1)) as gradients,
        work.writing(below) as write,
    ):
        for start, stop in work.batches(stage, "reverse", batch):
            hidden = states.read(start, stop).to(work.device, dtype)
            gradient = gradients.read(start, stop).to(work.device)
            if outputs is not None:
                outputs.update(gradient)
            inputs = work.inputs(number, stop - start, dtype)
            with routed.replayed(loaded, start, len(hidden)) if routed else nullcontext():
                gradient = loaded.differentiate(hidden, inputs, gradient)
            check_finite(gradient, f"the gradient of {loaded.name}")
            write(start, gradient)
    if outputs is not None:
        kept.write_output_gradient(work.ledger, number, outputs.value)
    return observer
