"""The steps that write an output: a shard for each block, and one for all that is in none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcomp.calibration.observe import MomentGroup, Observer
from streamcomp.calibration.refine import TrainingData, refine_block
from streamcomp.calibration.refit import Refit
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.forms import Allowance, find_form, storage_of
from streamcomp.forms.runtime import FactoredLinear, factored
from streamcomp.job.analysis import read_decomposition, read_output_gradient
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.methods import Factors, Moment
from streamcomp.modeling.linears import Linear
from streamcomp.modeling.streamer import LoadedBlock
from streamcomp.planning.outputs import OutputPlan
from streamcomp.planning.schedule import Step, hidden_key

__all__ = ["Factored", "block", "copy"]

Results = dict[str, Any]


@dataclass(frozen=True)
class Factored:
    """A linear and its factors."""

    linear: Linear
    factors: Factors

    @property
    def result(self) -> Results:
        """The figures as the journal has them."""
        return self.factors.figures.values() | {"spec": self.factors.spec}

    @property
    def entries(self) -> list[Entry]:
        """The tensors as they go into a shard."""
        name, tensors = self.linear.disk_name, self.factors.tensors
        return [Entry(f"{name}.{leaf}", tensor.cpu()) for leaf, tensor in tensors.items()]

    def module(self, dense: nn.Linear) -> FactoredLinear:
        """The runtime module that holds these tensors instead of ``dense``."""
        with torch.device("meta"):
            module = factored(dense, self.factors.spec)
        dtype, tensors = dense.weight.dtype, self.factors.tensors
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        if dense.bias is not None:
            state["bias"] = dense.bias.detach()
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Factored:
        """With other tensors of the same shapes."""
        return replace(self, factors=replace(self.factors, tensors=tensors))


def block(work: Workspace, stage: Stage, step: Step, shard: Path) -> Results:
    """Factor one block for one output, on the streams that it needs, and write its shard.

    In one pass, or in several, each with the moments and weights of some linears alone; on the
    compressed stream, where all factors run together, in one.
    """
    again = work.recipe.compressed_stream
    found: list[Factored] = []
    refined: Results = {}
    for groups in work.passes(step):
        with work.block(stage, step.block) as loaded:
            found = [*found, *_factorize_groups(work, stage, step, loaded, groups, found)]
            if again:
                found, refined = _on_compressed_stream(work, stage, step, loaded, found)
    stage("writing")
    write_shard(shard, _block_entries(work, step.block, found))
    linears = [item.result for item in found]
    notes = [f"{m['name']}: {m['fallback']}" for m in linears if m["fallback"]]
    loss = sum(linear["relative_loss"] for linear in linears) / max(1, len(linears))
    detail = f"loss {loss:.2%}" if linears else ""
    if refined:
        detail += f", refined {refined['before']:.3g} -> {refined['after']:.3g}"
    return {
        "block": step.block,
        "output": step.output,
        "digest": loaded.digest,
        "linears": linears,
        "unreached": _unreached(work, step, found),
        "detail": detail,
        "notes": notes,
        **({"refined": refined} if refined else {}),
    }


def _unreached(work: Workspace, step: Step, found: list[Factored]) -> list[str]:
    """Linears that were to be factored, and stay dense since no calibration token reached them."""
    ranks = work.plan.outputs[step.output].ranks
    done = {item.linear for item in found}
    targets = work.block_plan(step.block).targets
    return [m.disk_name for m in targets if ranks[m.full_name] is not None and m not in done]


def copy(work: Workspace, stage: Stage, step: Step, shard: Path) -> Results:
    """All tensors that are in no block, byte for byte."""
    stage("copying")
    write_shard(shard, [Entry(info.name, info) for info in work.skeleton.other_tensors()])
    return {"output": step.output}


def _block_entries(work: Workspace, number: int, found: list[Factored]) -> list[Entry]:
    """What a block's shard holds: factors, and whatever they do not replace."""
    entries = [entry for item in found for entry in item.entries]
    names = {entry.name for entry in entries}
    return entries + [
        Entry(info.name, info)
        for info in work.skeleton.block_tensors(number)
        if info.name not in names
    ]


def _factorize_groups(
    work: Workspace,
    stage: Stage,
    step: Step,
    loaded: LoadedBlock,
    groups: tuple[MomentGroup, ...],
    before: list[Factored],
) -> Iterator[Factored]:
    """The linears of ``groups`` that this output factors; ``before`` are those of earlier passes.

    From kept decompositions, or from moments taken now.
    """
    output, runs_again = work.plan.outputs[step.output], work.recipe.compressed_stream
    observer = None
    if not work.plan.analysis:
        observer = _observe(work, stage, step, loaded, groups, keeps=not before)
    if not runs_again:
        for linear in work.block_plan(step.block).others(groups):
            loaded.drop(linear.name)
    spare = _spare(output, before)  # goes from one linear to the next
    for group in groups:
        moment = observer.take(group) if observer else None
        if moment is not None and moment.is_empty:
            for linear in () if runs_again else group.linears:
                loaded.drop(linear.name)
            continue
        for linear in group.linears:
            allowance = output.allowances[linear.full_name]
            if allowance is None:
                continue
            stage(f"factorizing {linear.name.rpartition('.')[2]}")
            weight = loaded.weight(linear.name)
            allowance = replace(allowance, numbers=allowance.numbers + spare)
            factors = _compress(work, step, linear, weight, moment, allowance)
            spare = factors.spare(allowance)
            moment = None if moment is None else moment.damped(factors.least_damping)
            item = Factored(linear, factors)
            del weight
            if not runs_again:
                loaded.drop(linear.name)
            elif not work.recipe.follows:
                _install(loaded, item)
            yield item


def _spare(output: OutputPlan, before: list[Factored]) -> int:
    """Numbers that the linears of earlier passes have left over."""
    allowed = [(item, output.allowances[item.linear.full_name]) for item in before]
    return sum(item.factors.spare(allowance) for item, allowance in allowed if allowance)


def _on_compressed_stream(
    work: Workspace, stage: Stage, step: Step, loaded: LoadedBlock, found: list[Factored]
) -> tuple[list[Factored], Results]:
    """The factors after update and refinement, and the windows through them."""
    recipe, number = work.recipe, step.block
    for item in found:
        _install(loaded, item)
    refined: Results = {}
    if recipe.follows and hidden_key(number) in step.reads:
        target = hidden_key(number + 1)
        if target in step.writes:
            with loaded.dense():
                work.propagate(stage, "forward", loaded, number, hidden_key(number), target)
        if found and recipe.update:
            found = _update(work, stage, step, loaded, found)
        if found and recipe.refine:
            found, refined = _refine(work, stage, step, loaded, found)
    target = hidden_key(number + 1, step.output)
    if target in step.writes:
        source = hidden_key(number, step.output)
        work.propagate(stage, "propagating", loaded, number, source, target)
    return found, refined


def _observe(
    work: Workspace,
    stage: Stage,
    step: Step,
    loaded: LoadedBlock,
    groups: tuple[MomentGroup, ...],
    *,
    keeps: bool,
) -> Observer | None:
    """Run the stream whose statistics the recipe wants; None where it wants none.

    What comes out is kept if a step to come reads it and ``keeps`` says so.
    """
    if work.recipe.statistics == "none" or not step.reads:
        return None
    compressed = work.recipe.statistics == "compressed"
    source = hidden_key(step.block, step.output if compressed else None)
    target = hidden_key(step.block + 1)
    keep = keeps and not compressed and not work.recipe.follows and target in step.writes
    with Observer(loaded.module, loaded.name, groups, work.device) as observer:
        if groups or keep:
            name = "observing"
            work.propagate(stage, name, loaded, step.block, source, target if keep else None)
    return observer


def _compress(
    work: Workspace,
    step: Step,
    linear: Linear,
    weight: Tensor,
    moment: Moment | None,
    allowance: Allowance,
) -> Factors:
    """From the kept decomposition where there is one, else from ``moment``."""
    if not work.plan.analysis:
        return work.method.compress(linear, weight, moment, allowance, work.recipe)
    rows = work.analysis_of(step.block)
    row = next(row for row in rows if row["name"] == linear.disk_name)
    kept = read_decomposition(work.folder, step.block, linear, row, work.device)
    return work.method.factors(linear, weight, kept, allowance, work.recipe)


def _install(loaded: LoadedBlock, item: Factored) -> None:
    loaded.replace(item.linear.name, item.module(loaded.dense_linear(item.linear.name)))


def _update(
    work: Workspace, stage: Stage, step: Step, loaded: LoadedBlock, found: list[Factored]
) -> list[Factored]:
    """Left factors refitted on the compressed stream, all of them from one pass."""
    number = step.block
    modules = {item.linear.name: loaded.factored(item.linear.name) for item in found}
    refit = Refit(loaded, modules, work.recipe.anchor)
    with (
        loaded.whole(),  # a linear is watched once in a forward
        work.reading(hidden_key(number)) as dense,
        work.reading(hidden_key(number, step.output)) as compressed,
    ):
        for start, stop in work.batches(stage, "updating", work.plan.levers.batch):
            call = work.call(number, stop - start)
            with refit.dense():
                loaded.run(dense.read(start, stop).to(work.device), call)
            with refit.compressed():
                loaded.run(compressed.read(start, stop).to(work.device), call)
    updated = []
    for item in found:
        left, right = refit.factors(item.linear.name)
        storage = storage_of(item.linear.dtype)
        tensors = find_form(work.recipe.form).encode(left, right, storage)
        updated.append(item.with_tensors(tensors))
        _install(loaded, updated[-1])
    return updated


def _refine(
    work: Workspace, stage: Stage, step: Step, loaded: LoadedBlock, found: list[Factored]
) -> tuple[list[Factored], Results]:
    """Factors trained on the compressed stream; the closed form where that helps none."""
    number, recipe = step.block, work.recipe
    run_dtype, gradient = work.gradient_dtype, None
    if work.method.needs_gradients:
        gradient = read_output_gradient(work.folder, number, work.device)
    with (
        loaded.whole(),  # its weights take gradients
        loaded.cast(run_dtype),
        work.reading(hidden_key(number, step.output)) as inputs,
        work.reading(hidden_key(number + 1)) as targets,
    ):
        data = TrainingData(
            work.shape.windows,
            lambda w: inputs.read(w, w + 1).to(work.device, run_dtype),
            lambda w: targets.read(w, w + 1),
            work.call(number, 1, run_dtype),
            gradient,
        )
        refined = refine_block(
            loaded,
            {item.linear.name: loaded.factored(item.linear.name) for item in found},
            data,
            recipe.refine,
            rate=recipe.rate,
            seed=recipe.seed,
            progress=lambda share: stage("refining", share),
        )
    better = []
    for item in found:
        tensors = {
            leaf: tensor.to(item.linear.dtype) if tensor.is_floating_point() else tensor
            for leaf, tensor in refined.tensors[item.linear.name].items()
        }
        better.append(item.with_tensors(item.factors.tensors | tensors))
        _install(loaded, better[-1])
    return better, {"before": refined.before, "after": refined.after, "steps": refined.steps}
