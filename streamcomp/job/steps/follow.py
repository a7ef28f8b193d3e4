"""Changes to factors on the compressed stream, after they were made.

Left factors are refitted (SVD-LLM's update), or all factors of the block are trained; then the
compressed block's output becomes the next block's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from streamcomp.calibration.refine import (
    TrainingData,
    balancing_bytes,
    factor_bytes,
    optimizer_flops,
    refine_block,
)
from streamcomp.calibration.refit import Refit, refit_bytes
from streamcomp.job import kept
from streamcomp.job.block_plan import BlockPlan
from streamcomp.job.files import DenseStates, compressed_states
from streamcomp.job.outline import Outline
from streamcomp.job.rows import Refined
from streamcomp.job.steps.base import Phase
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.linalg.dtypes import gradient_dtype
from streamcomp.methods import Factors
from streamcomp.model.sites import LinearSite
from streamcomp.model.streamer import LoadedBlock

__all__ = ["Factored", "refine", "refining", "update", "updating"]

_WINDOWS_PER_STEP = 1  # of training

Factored = dict[LinearSite, Factors]


def updating(
    outline: Outline, block: BlockPlan, batch: int, ranks: Mapping[LinearSite, int], factors: int
) -> Phase:
    """Both blocks over ``batch`` windows, the outputs of all sites, and the sums of the fits."""
    sums, outputs = refit_bytes(ranks, block.stream.dtype, batch * block.stream.seq_len)
    parts = {
        "weights": block.weight_bytes,
        "factors": factors,
        "moments": sums,
        "activations": 2 * block.activations(batch) + outputs,
    }
    return Phase("updating", parts, 2 * outline.forward_seconds(block.number))


def refining(
    outline: Outline,
    block: BlockPlan,
    most: Mapping[LinearSite, int],
    ranks: Mapping[LinearSite, int],
    factors: int,
) -> Iterator[Phase]:
    """Training both factors of each site, and bringing them back to their form.

    Bytes are those of the ``most`` that ranks may become, seconds those of ``ranks``.
    """
    stream, form = block.stream, outline.form
    run_dtype = gradient_dtype(stream.dtype)
    factors = factors * run_dtype.itemsize // stream.dtype.itemsize
    parts = {
        "weights": block.cast_weight_bytes(run_dtype),
        "moments": 3 * block.output_gradient_bytes,
    }
    wider = max(1, torch.float32.itemsize // stream.dtype.itemsize)
    activations = 2 * (block.trace.autograd_bytes + 6 * stream.window_bytes) * wider
    activations += block.cast_input_bytes(run_dtype)
    training, converting = factor_bytes(most, stream.dtype)
    flops = 3 * _WINDOWS_PER_STEP * block.trace.flops + optimizer_flops(ranks)
    seconds = outline.recipe.refine * flops / outline.rates.model_flops
    trained = {"factors": factors + training, "activations": activations}
    yield Phase("refining", parts | trained, seconds)
    working = (
        max(
            balancing_bytes(site.rows, site.columns, rank),
            form.encoding_bytes(site.rows, site.columns, rank, stream.dtype),
        )
        for site, rank in most.items()
    )
    stored = {"factors": 2 * factors + converting, "decomposition": max(working, default=0)}
    yield Phase("refining", parts | stored)


def update(
    work: Workspace, stage: Stage, loaded: LoadedBlock, output: int, factored: Factored
) -> Factored:
    """Left factors refitted on the compressed stream, all of them from one pass."""
    number = loaded.number
    refit = Refit(loaded, list(factored), work.recipe.anchor)
    with (
        loaded.whole(),  # a site is watched once in a forward
        work.reading(DenseStates(number)) as dense,
        work.reading(compressed_states(number, output)) as compressed,
    ):
        for start, stop in work.batches(stage, "updating", work.levers.batch):
            inputs = work.inputs(number, stop - start)
            with refit.dense():
                loaded.run(dense.read(start, stop).to(work.device), inputs)
            with refit.compressed():
                loaded.run(compressed.read(start, stop).to(work.device), inputs)
    updated = {}
    for site, factors in factored.items():
        left, right = refit.factors(site)
        tensors = work.outline.form.encode(left, right, site.dtype)
        updated[site] = replace(factors, tensors=tensors)
        site.install(loaded, tensors, factors.spec)
    return updated


def refine(
    work: Workspace, stage: Stage, loaded: LoadedBlock, output: int, factored: Factored
) -> tuple[Factored, Refined]:
    """Factors trained on the compressed stream; the closed form where that helps none."""
    number, recipe = loaded.number, work.recipe
    run_dtype = gradient_dtype(work.skeleton.dtype)
    gradient = None
    if work.method.needs_gradients:
        gradient = kept.read_output_gradient(work.ledger, number, work.device)
    with (
        loaded.whole(),  # its weights take gradients
        loaded.cast(run_dtype),
        work.reading(compressed_states(number, output)) as inputs,
        work.reading(DenseStates(number + 1)) as targets,
    ):
        data = TrainingData(
            work.shape.windows,
            lambda w: inputs.read(w, w + 1).to(work.device, run_dtype),
            lambda w: targets.read(w, w + 1),
            work.inputs(number, 1, run_dtype),
            gradient,
        )
        trained = refine_block(
            loaded,
            list(factored),
            data,
            recipe.refine,
            form=work.outline.form,
            rate=recipe.rate,
            seed=recipe.seed,
            progress=lambda share: stage("refining", share),
        )
    better = {}
    for site, factors in factored.items():
        tensors = {
            leaf: tensor.to(site.dtype) if tensor.is_floating_point() else tensor
            for leaf, tensor in trained.tensors[site].items()
        }
        better[site] = replace(factors, tensors=factors.tensors | tensors)
        site.install(loaded, better[site].tensors, factors.spec)
    return better, Refined(before=trained.before, after=trained.after, steps=trained.steps)
