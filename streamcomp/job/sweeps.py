"""The sweeps before any factor is written: forward, the loss's gradient, reverse; and ranks.

The reverse sweep streams as the forward one does: the gradient of the loss enters through the
head, in chunks of tokens, and blocks are loaded last to first. Each runs forward and backward on
one micro-batch at a time, from its input as the forward sweep left it on disk; hooks take the
moments, and the gradient of its input goes to a file for the block below.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from streamcomp.calibration.observe import MomentGroup, Observer, moment_dtype
from streamcomp.errors import NonFiniteError
from streamcomp.job.analysis import (
    health,
    read_spectrum,
    write_decomposition,
    write_moment,
    write_output_gradient,
)
from streamcomp.job.workspace import Stage, Workspace, check_finite
from streamcomp.linalg.moments import SecondMoment
from streamcomp.methods import Swsc
from streamcomp.modeling.streamer import LoadedBlock
from streamcomp.planning.outputs import allocate
from streamcomp.planning.schedule import Step, gradient_key, hidden_key

__all__ = ["analyse", "forward", "loss", "ranks", "reverse"]

Results = dict[str, Any]

_ONE_SIDED = (
    "allocation loss compares energies across linears, which only those of method two-sided bear: "
    "ranks shared evenly (--allocation uniform) are better here"
)


def forward(work: Workspace, stage: Stage, step: Step) -> Results:
    """All windows through one dense block."""
    with work.block(stage, step.block) as loaded:
        work.propagate(stage, "forward", loaded, step.block, step.reads[0], step.writes[0])
        return {"block": step.block, "digest": loaded.digest}


def loss(work: Workspace, stage: Stage, step: Step) -> Results:
    """The negative log-likelihood, summed over tokens, and its gradient at the last block's output.

    Holds the head, and logits with their gradient for ``head_tokens`` positions of one window.
    """
    total, last = 0.0, work.shape.seq_len - 1  # nothing is predicted from the last position
    size, dtype = work.plan.levers.head_tokens, work.gradient_dtype
    stage("loading")
    with (
        work.streamer.head(dtype) as head,
        work.reading(step.reads[1]) as states,
        work.writing(step.writes[0]) as write,
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
    perplexity = math.exp(min(mean, 700.0))
    return {"nll": mean, "detail": f"perplexity {perplexity:.2f} on the calibration text"}


def reverse(work: Workspace, stage: Stage, step: Step) -> Results:
    """Moments of one block's inputs, outputs and gradients, and what is decomposed of them.

    In one pass over the windows, or in several, each with the moments of some groups alone.
    """
    number = step.block
    for key in (key for key in step.writes if key.startswith("hidden")):
        _again(work, stage, int(key.partition("-")[2]) - 1)
    below = next((key for key in step.writes if key == gradient_key(number)), None)
    analysed: Results = {}
    for turn, groups in enumerate(work.passes(step)):
        with work.block(stage, number) as loaded:
            observer = _differentiate(
                work, stage, number, loaded, groups, below, outputs=bool(groups) and turn == 0
            )
            below = None
            _decompose(work, stage, step, loaded, observer, groups, analysed)
    return {"block": number, "digest": loaded.digest, **analysed}


def analyse(work: Workspace, stage: Stage, step: Step) -> Results:
    """Moments of one block's inputs or outputs, and what is decomposed of them.

    In one pass over the windows, or in several, each with the moments of some groups alone.
    """
    number = step.block
    target = next((key for key in step.writes if key.startswith("hidden")), None)
    analysed: Results = {}
    for groups in work.passes(step):
        with work.block(stage, number) as loaded:
            with Observer(loaded, groups, work.device) as observer:
                work.propagate(stage, "observing", loaded, number, hidden_key(number), target)
            target = None
            _decompose(work, stage, step, loaded, observer, groups, analysed)
    return {"block": number, "digest": loaded.digest, **analysed}


def ranks(work: Workspace, stage: Stage, step: Step) -> Results:
    """Ranks of every output, from the spectra of the whole model where allocation asks for them.

    Holds all spectra, 8 bytes for each direction of each linear, and their hulls.
    """
    stage("sharing")
    plan, recipe, unreached = work.plan, work.recipe, work.unreached
    if recipe.allocation == "uniform" or unreached >= {m.disk_name for m in plan.chosen}:
        dense = {m.full_name: None for m in plan.chosen if m.disk_name in unreached}
        return {"ranks": [{**output.ranks, **dense} for output in plan.outputs]}
    eligible, chosen = (
        [linear for linear in linears if linear.disk_name not in unreached]
        for linears in (plan.linears, plan.chosen)
    )
    spectra = [
        read_spectrum(work.folder, block.number, linear)
        for block in plan.blocks
        for linear in block.targets
        if linear.disk_name not in unreached
    ]
    found = [allocate(recipe, output.asked, eligible, chosen, spectra) for output in plan.outputs]
    return {"ranks": found, "notes": [] if recipe.two_sided else [_ONE_SIDED]}


def _again(work: Workspace, stage: Stage, number: int) -> None:
    """Run a dense block a second time, where its output was not stored."""
    with work.block(stage, number) as loaded:
        source, target = hidden_key(number), hidden_key(number + 1)
        work.propagate(stage, "forward", loaded, number, source, target)


def _differentiate(
    work: Workspace,
    stage: Stage,
    number: int,
    loaded: LoadedBlock,
    groups: tuple[MomentGroup, ...],
    below: str | None,
    *,
    outputs: bool,
) -> Observer:
    """All windows forward and back through the block; ``below`` keeps its inputs' gradient.

    ``outputs`` asks for the moment of its outputs' gradient too, which goes to the work folder.
    """
    dtype, batch = work.gradient_dtype, work.plan.levers.reverse_batch
    outgoing = None
    if outputs:
        outgoing = SecondMoment(work.shape.hidden, dtype=moment_dtype(dtype), device=work.device)
    with (
        loaded.cast(dtype),
        Observer(loaded, groups, work.device) as observer,
        work.reading(hidden_key(number)) as states,
        work.reading(gradient_key(number + 1)) as gradients,
        work.writing(below) as write,
    ):
        for start, stop in work.batches(stage, "reverse", batch):
            hidden = states.read(start, stop).to(work.device, dtype)
            gradient = gradients.read(start, stop).to(work.device)
            if outgoing is not None:
                outgoing.update(gradient)
            call = work.call(number, stop - start, dtype)
            gradient = loaded.differentiate(hidden, call, gradient)
            check_finite(gradient, f"the gradient of {loaded.name}")
            write(start, gradient)
    if outgoing is not None:
        write_output_gradient(work.folder, number, outgoing.value)
    return observer


def _decompose(
    work: Workspace,
    stage: Stage,
    step: Step,
    loaded: LoadedBlock,
    observer: Observer,
    groups: tuple[MomentGroup, ...],
    results: Results,
) -> None:
    """Every linear of ``groups``, one at a time; what is found goes to the work folder.

    All other weights are dropped before, its moments and its own weight behind it. ``results``
    take the figures of each, and the names of those that no token reached.
    """
    assert not isinstance(work.method, Swsc)
    for linear in work.block_plan(step.block).others(groups):
        linear.free(loaded)
    found, unreached = results.setdefault("analysis", []), results.setdefault("unreached", [])
    for group in groups:
        moment = observer.take(group)
        gradients = {}
        if moment.is_empty:
            for linear in group.sites:
                unreached.append(linear.disk_name)
                linear.free(loaded)
            continue
        for linear in group.sites:
            stage(f"decomposing {linear.leaf}")
            if group.gradients:
                gradients[linear.name] = observer.take_gradient(linear)
            weight = linear.weight(loaded)
            own = replace(moment, gradient=gradients.get(linear.name))
            decomposition = work.method.decompose(weight, own, work.recipe.damping)
            write_decomposition(work.folder, step.block, linear, decomposition)
            found.append(health(linear, decomposition))
            moment = moment.knowing(decomposition)
            del weight, decomposition
            linear.free(loaded)
            if not work.keeps_work:
                gradients.clear()
        if work.keeps_work:
            write_moment(work.folder, step.block, group, moment, gradients)
