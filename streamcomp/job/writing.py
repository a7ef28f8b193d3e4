"""The steps that write an output: a shard for each block, and one for all that is in none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from streamcomp.calibration.observe import MomentGroup, Observer
from streamcomp.calibration.refine import TrainingData, refine_block
from streamcomp.calibration.refit import Refit
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.job.analysis import as_kept, health, read_decomposition, read_output_gradient
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.linalg.channel_sharing import average_bits, shared_numbers
from streamcomp.linalg.low_rank import Decomposition, decompose_weight
from streamcomp.methods import (
    Moment,
    Swsc,
    factor_tensors,
    mean_bias,
    shared_tensors,
)
from streamcomp.modeling.sites import Site
from streamcomp.modeling.streamer import LoadedBlock
from streamcomp.planning.outputs import OutputPlan
from streamcomp.planning.schedule import Step, can_be_analysed, hidden_key

__all__ = ["Factored", "block", "block_entries", "copy", "factorize"]

Results = dict[str, Any]


@dataclass(frozen=True)
class Factored:
    """A linear's factors by their names on disk, how the config describes them, and the figures."""

    linear: Site
    tensors: dict[str, Tensor]
    spec: dict[str, Any]
    result: Results

    @property
    def entries(self) -> list[Entry]:
        """The tensors as they go into a shard."""
        name = self.linear.disk_name
        return [Entry(f"{name}.{leaf}", tensor.cpu()) for leaf, tensor in self.tensors.items()]


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
    write_shard(shard, block_entries(work, step.block, found))
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


def block_entries(work: Workspace, number: int, found: list[Factored]) -> list[Entry]:
    """What a block's shard holds: factors, and whatever they do not replace."""
    entries = [entry for item in found for entry in item.entries]
    names = {entry.name for entry in entries}
    return entries + [
        Entry(info.name, info)
        for info in work.skeleton.block_tensors(number)
        if info.name not in names
    ]


def factorize(
    work: Workspace,
    linear: Site,
    rank: int,
    loaded: LoadedBlock,
    found: Decomposition,
    moment: Moment | None = None,
) -> Factored:
    """The factors of one linear at ``rank``; the mean as a bias where the method is centred."""
    weight, dense_bias = linear.weight(loaded), linear.bias(loaded)
    form, dtype = work.recipe.form, linear.source.torch_dtype
    left, right = found.factors(weight, rank)
    spec: dict[str, Any] = {"form": form, "rank": rank}
    bias = {}
    if moment is not None and moment.total is not None:
        shift = mean_bias(weight, left, right, moment)
        bias["bias"] = (shift if dense_bias is None else shift + dense_bias).to(dtype)
        if dense_bias is None:
            spec["bias"] = True
    tensors = factor_tensors(form, left, right, dtype) | bias
    result = health(linear, found) | {
        "rank": rank,
        "relative_loss": found.relative_loss(rank),
        "loss": float(found.spectrum[rank:].sum()),
        "spec": spec,
    }
    return Factored(linear, tensors, spec, result)


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
            linear.free(loaded)
    spare = _spare(output, before)  # goes from one linear to the next
    for group in groups:
        moment = observer.take(group) if observer else None
        if moment is not None and moment.is_empty:
            for linear in () if runs_again else group.sites:
                linear.free(loaded)
            continue
        for linear in group.sites:
            rank, numbers = output.ranks[linear.full_name], output.numbers[linear.full_name]
            if rank is None or numbers is None:
                continue
            stage(f"factorizing {linear.leaf}")
            weight = linear.weight(loaded)
            if isinstance(work.method, Swsc):
                item = _share(work, work.method, linear, weight, moment, numbers + spare)
                spare += numbers - item.result["numbers"]
            else:
                found = _decomposition(work, step, group, linear, weight, moment, rank)
                moment = None if moment is None else moment.knowing(found)
                item = factorize(work, linear, rank, loaded, found, moment)
                del found
            del weight
            if not runs_again:
                linear.free(loaded)
            elif not work.recipe.follows:
                _install(loaded, item)
            yield item


def _spare(output: OutputPlan, found: list[Factored]) -> int:
    """Numbers that sharing has left over in the linears ``found``."""
    left = 0
    for item in found:
        if "numbers" in item.result:
            left += (output.numbers[item.linear.full_name] or 0) - item.result["numbers"]
    return left


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
    with Observer(loaded, groups, work.device, totals=work.recipe.centred) as observer:
        if groups or keep:
            name = "observing"
            work.propagate(stage, name, loaded, step.block, source, target if keep else None)
    return observer


def _decomposition(
    work: Workspace, step: Step, group: MomentGroup, linear: Site, weight: Tensor,
    moment: Moment | None, rank: int,
) -> Decomposition:  # fmt: skip
    if work.plan.analysis:
        kind = "reverse" if work.recipe.two_sided else "analyse"
        results = work.results(kind, step.block)
        assert results is not None
        known = next(item for item in results["analysis"] if item["name"] == linear.disk_name)
        return read_decomposition(work.folder, step.block, linear, known, work.device)
    assert not isinstance(work.method, Swsc)
    if moment is None:
        return decompose_weight(weight)
    found = work.method.decompose(weight, moment, work.recipe.damping, rank)
    # the same bytes as where one analysis serves several outputs
    return as_kept(linear, found) if can_be_analysed(work.recipe) else found


def _share(
    work: Workspace,
    method: Swsc,
    linear: Site,
    weight: Tensor,
    moment: Moment | None,
    numbers: int,
) -> Factored:
    recipe, dtype = work.recipe, linear.source.torch_dtype
    shared = method.share(
        weight,
        moment,
        numbers,
        clusters=recipe.clusters,
        axis=recipe.axis,
        seed=recipe.seed,
        dtype=dtype,
    )
    tensors = shared_tensors(shared, dtype)
    rank, clusters = shared.left.shape[1], int(shared.labels.max()) + 1
    spec = {"form": "shared", "rank": rank, "clusters": clusters, "axis": shared.axis}
    result = {
        "name": linear.disk_name,
        "rows": linear.rows,
        "columns": linear.columns,
        "rank": rank,
        "relative_loss": shared.relative_loss,
        "damping": shared.damping,
        "condition": None,
        "fallback": "",
        "numbers": shared_numbers(linear.rows, linear.columns, shared.axis, clusters, rank),
        "bits_per_weight": average_bits(linear.rows, linear.columns, shared.axis, clusters, rank),
        "spec": spec,
    }
    return Factored(linear, tensors, spec, result)


def _install(loaded: LoadedBlock, item: Factored) -> None:
    item.linear.install(loaded, item.tensors, item.spec)


def _update(
    work: Workspace, stage: Stage, step: Step, loaded: LoadedBlock, found: list[Factored]
) -> list[Factored]:
    """Left factors refitted on the compressed stream, all of them from one pass."""
    number = step.block
    refit = Refit(loaded, [item.linear for item in found], work.recipe.anchor)
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
        left, right = refit.factors(item.linear)
        dtype = item.linear.source.torch_dtype
        tensors = factor_tensors(work.recipe.form, left, right, dtype)
        updated.append(replace(item, tensors=tensors))
        _install(loaded, updated[-1])
    return updated


def _refine(
    work: Workspace, stage: Stage, step: Step, loaded: LoadedBlock, found: list[Factored]
) -> tuple[list[Factored], Results]:
    """Factors trained on the compressed stream; the closed form where that helps none."""
    number, recipe = step.block, work.recipe
    run_dtype = work.gradient_dtype
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
            read_output_gradient(work.folder, number, work.device) if recipe.two_sided else None,
        )
        refined = refine_block(
            loaded,
            [item.linear for item in found],
            data,
            recipe.refine,
            rate=recipe.rate,
            seed=recipe.seed,
            progress=lambda share: stage("refining", share),
        )
    better = []
    for item in found:
        tensors = {
            leaf: tensor.to(item.linear.source.torch_dtype)
            if tensor.is_floating_point()
            else tensor
            for leaf, tensor in refined.tensors[item.linear].items()
        }
        better.append(replace(item, tensors=item.tensors | tensors))
        _install(loaded, better[-1])
    return better, {"before": refined.before, "after": refined.after, "steps": refined.steps}
