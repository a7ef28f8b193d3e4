"""Decomposes some linears of a finished job again, with other damping, from moments it kept."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamcomp.checkpoint.index import CheckpointIndex, read_header
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import JobMismatchError, RecipeError
from streamcomp.job.analysis import as_kept, read_moment
from streamcomp.job.journal import Journal, locked, same_analysis
from streamcomp.job.progress import JobProgress
from streamcomp.job.run import choose_device
from streamcomp.job.workspace import Stage, Workspace
from streamcomp.job.writing import Factored, factorize
from streamcomp.methods import Swsc, find_method
from streamcomp.modeling.sites import Site, find_sites
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.modeling.streamer import LoadedBlock
from streamcomp.planning.blocks import BlockPlan
from streamcomp.planning.meter import (
    budget_bytes,
    device_budget_bytes,
    is_memory_backed,
    limit_device,
    release,
    warm_up,
)
from streamcomp.planning.plan import make_plan
from streamcomp.planning.rates import measure_rates
from streamcomp.planning.schedule import Step
from streamcomp.recipe import Recipe, Resources

__all__ = ["redo_linears"]


def redo_linears(
    index: CheckpointIndex,
    out: Path,
    folder: Path,
    recipe: Recipe,
    resources: Resources,
    report: dict[str, Any],
    pattern: str,
    damping: float,
    progress: JobProgress,
) -> list[dict[str, Any]]:
    """Replace the factors of the matching linears in ``out``; returns their new figures.

    ``folder`` holds the kept work of the job whose ``report`` this is. One block is loaded at a
    time, as in the job itself, within the same budget.
    """
    recipe = replace(recipe, damping=damping)
    chosen = _matching(report, recipe, pattern)
    journal = Journal.read(folder) if folder.is_dir() else None
    if journal is None or not any(folder.glob("moments-*")):
        raise RecipeError(
            f"{folder} keeps no moments: --redo needs a job that was run with --keep-work "
            "(and the same --work-dir)"
        )
    if not same_analysis(journal.header["fingerprint"], report["fingerprint"]):
        raise JobMismatchError(
            f"{folder} keeps the work of another job than that in {out}: give its own --work-dir",
            field="work_dir",
        )
    device = choose_device(resources.device)
    skeleton = Skeleton(index)
    kernels = warm_up(device, skeleton.dtype)
    plan = make_plan(
        skeleton,
        recipe,
        budget_bytes(resources.max_ram),
        measure_rates(device, skeleton.dtype),
        analysis=True,
        keep_work=True,
        kernel_bytes=kernels,
        memory_backed=is_memory_backed(folder),
        output_in_memory=is_memory_backed(out),
        device_budget=device_budget_bytes(device, resources.max_vram),
        redo=_blocks_of(skeleton, chosen),
    )
    limit_device(device, plan.device_budget_bytes)
    with locked(out), locked(folder):
        work = Workspace(
            skeleton, recipe, find_method(recipe.method), device, folder, plan, journal, True
        )
        seconds = [step.seconds for step in plan.steps]
        progress.begin(f"redo {len(chosen)} linears", seconds, 0, plan.budget_bytes)
        results = []
        try:
            for place, planned in enumerate(plan.steps):
                name = f"block {planned.step.block}"
                stage = Stage(progress, place, name)
                results += _redo_block(work, stage, planned.step, chosen, out)
                release()
                progress.finish_step(place, name, stage.total(), "")
        finally:
            progress.end()
    return results


def _matching(report: dict[str, Any], recipe: Recipe, pattern: str) -> dict[str, dict[str, Any]]:
    """The factored linears that ``pattern`` matches, by name."""
    if recipe.follows or recipe.statistics != "dense" or recipe.method == "swsc" or recipe.centred:
        raise RecipeError(
            "--redo is for jobs whose factors depend on kept moments alone: not after --update or "
            "--refine, on the compressed stream, centred, or with swsc"
        )
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"--redo {pattern!r} is no regular expression: {error}") from None
    found = {item["name"]: item for item in report["linears"] if expression.search(item["name"])}
    if not found:
        raise RecipeError(f"--redo {pattern!r} matches none of the factored linears")
    return found


def _redo_block(
    work: Workspace, stage: Stage, step: Step, chosen: dict[str, dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """New factors for the chosen linears of one block, and its shard with them.

    Holds the factors so far, and of weights those that have their turn yet in this pass.
    """
    block = work.block_plan(step.block)
    found: list[Factored] = []
    for groups in work.passes(step):
        mine = [m for group in groups for m in group.sites if m.disk_name in chosen]
        if not mine:
            continue
        with work.block(stage, block.number) as loaded:
            for linear in block.linears.eligible:
                if linear not in mine:
                    linear.free(loaded)
            for linear in mine:
                stage(f"decomposing {linear.leaf}")
                found.append(_redone(work, block, loaded, linear, chosen[linear.disk_name]["rank"]))
                linear.free(loaded)
    stage("writing")
    entries = [entry for item in found for entry in item.entries]
    names = {entry.name for entry in entries}
    shard = sorted(out.glob("model-*.safetensors"))[block.number]
    kept = [Entry(n, info) for n, info in read_header(shard).items() if n not in names]
    write_shard(shard, entries + kept)
    return [item.result for item in found]


def _redone(
    work: Workspace, block: BlockPlan, loaded: LoadedBlock, linear: Site, rank: int
) -> Factored:
    """One linear from its own moments; they and its decomposition are gone with the return."""
    assert not isinstance(work.method, Swsc)
    group = next(group for group in block.groups if linear in group.sites)
    moment = read_moment(work.folder, block.number, group, linear, work.device)
    weight = linear.weight(loaded)
    found = work.method.decompose(weight, moment, work.recipe.damping, rank)
    del moment
    return factorize(work, linear, rank, loaded, as_kept(linear, found))


def _blocks_of(skeleton: Skeleton, chosen: Collection[str]) -> list[int]:
    """Numbers of the blocks that hold a linear of the names ``chosen``."""
    linears = (find_sites(skeleton, number).eligible for number in range(len(skeleton)))
    return [
        number
        for number, eligible in enumerate(linears)
        if any(linear.disk_name in chosen for linear in eligible)
    ]
