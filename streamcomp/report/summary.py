"""The report of a finished job, from its journal and the files it wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo
from streamcomp.job.plan import Plan
from streamcomp.job.rows import (
    DenseRow,
    Header,
    MemoryFigures,
    ModelFigures,
    RefinedBlock,
    Report,
    StepRow,
)
from streamcomp.machine.rates import MachineRates

__all__ = ["job_report", "model_name", "perplexity"]

# Why a linear stays dense that the plan would have factored.
_UNREACHED = "no calibration token reached it"
_MOST_NLL = 700.0  # above it, the exponential overflows


def job_report(
    index: CheckpointIndex,
    written: Sequence[TensorInfo],
    plan: Plan,
    rates: MachineRates,
    header: Header,
    steps: Sequence[StepRow],
    asked: float,
) -> Report:
    """Contents of ``streamcomp_report.json`` for one output.

    ``written`` are the tensors of the output, ``header`` and ``steps`` come from the journal;
    ``rates`` are this machine's, which the ``limits`` of the stages were counted with; ``asked`` is
    the ratio that was asked for.
    """
    linears = tuple(linear for step in steps for linear in step.linears)
    factored = {linear.name for linear in linears}
    unreached = {name for step in steps for name in step.unreached}
    reached = [linear for linear in plan.outline.eligible if linear.disk_name not in unreached]
    eligible = sum(linear.numel for linear in reached)
    return Report(
        model=_model_figures(index, written, eligible),
        memory=_memory_figures(plan, steps),
        seconds=round(sum(step.seconds for step in steps), 1),
        stages=_summed(step.stages for step in steps),
        limits=_summed(step.limits for step in steps),
        rates=rates,
        windows=next((step.windows for step in steps if step.windows is not None), 0),
        recipe=header.recipe,
        levers=header.levers,
        fingerprint=header.fingerprint,
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
        notes=tuple(note for step in steps for note in step.notes),
        linears=linears,
        experts=tuple(step.experts for step in steps if step.experts is not None),
        dense=tuple(
            DenseRow(name=linear.disk_name, rows=linear.rows, columns=linear.columns)
            for linear in reached
            if linear.disk_name not in factored
        ),
        refined=tuple(
            RefinedBlock(**vars(step.refined), block=step.block)
            for step in steps
            if step.refined is not None and step.block is not None
        ),
        left=plan.outline.left | dict.fromkeys(sorted(unreached), _UNREACHED),
        steps=tuple(
            replace(
                step,
                linears=(),
                experts=None,
                analysis=(),
                ranks=(),
                refined=None,
                unreached=(),
                files={},
                sources={},
            )
            for step in steps
        ),
        asked=asked,
    )


def _model_figures(
    index: CheckpointIndex, written: Sequence[TensorInfo], eligible: int
) -> ModelFigures:
    removed = index.numel - sum(info.numel for info in written if _counts(info))
    return ModelFigures(
        source=model_name(index.folder),
        type=index.config.get("model_type"),
        linear_parameters=eligible,
        linear_parameters_kept=eligible - removed,
        ratio=removed / eligible if eligible else 0.0,
        parameters=index.numel,
        parameters_kept=index.numel - removed,
        model_ratio=removed / index.numel,
        bytes=index.nbytes,
        bytes_kept=sum(info.nbytes for info in written),
    )


def _memory_figures(plan: Plan, steps: Sequence[StepRow]) -> MemoryFigures:
    """Budget and peaks; a GPU's too unless the job ran on the CPU."""
    figures = MemoryFigures(
        budget_bytes=plan.budget_bytes,
        minimum_bytes=plan.minimum_bytes,
        predicted_bytes=max(step.predicted_bytes for step in steps),
        peak_bytes=max(step.peak_bytes for step in steps),
    )
    if not plan.device_budget_bytes:
        return figures
    return replace(
        figures,
        device_budget_bytes=plan.device_budget_bytes,
        device_predicted_bytes=max(step.device_predicted_bytes or 0 for step in steps),
        device_peak_bytes=max(step.device_peak_bytes or 0 for step in steps),
    )


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by stage, over all steps."""
    total: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = round(total.get(name, 0.0) + seconds, 3)
    return total


def _counts(info: TensorInfo) -> bool:
    """Whether a tensor's numbers count in the ratio: floats, and labels as in SWSC's paper."""
    return info.is_float or info.name.endswith(".labels")


def model_name(folder: Path) -> str:
    """Name of a checkpoint: its folder's, or in the hub's cache its model's."""
    hub = re.search(r"models--([^/]+)/snapshots/", str(folder.resolve()))
    return hub[1].replace("--", "/") if hub else folder.resolve().name


def perplexity(nll: float) -> float:
    return math.exp(min(nll, _MOST_NLL))
