"""What a finished job tells: a report in plain values, and a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo
from streamcomp.methods import find_method
from streamcomp.planning.plan import Plan
from streamcomp.planning.rates import MachineRates
from streamcomp.recipe import Recipe
from streamcomp.units import format_bytes

__all__ = ["job_report", "model_card", "model_name"]

# What a step's line in the journal holds beside its figures.
_BULKY = ("linears", "analysis", "ranks", "refined", "unreached")
# Why a linear stays dense that the plan would have factored.
_UNREACHED = "no calibration token reached it"


def job_report(
    index: CheckpointIndex,
    written: Sequence[TensorInfo],
    recipe: dict[str, Any],
    plan: Plan,
    rates: MachineRates,
    header: dict[str, Any],
    steps: list[dict[str, Any]],
) -> dict[str, Any]:
    """All that ``streamcomp_report.json`` holds.

    ``written`` are the tensors of the output, ``header`` and ``steps`` come from the journal;
    ``rates`` are this machine's, which the ``limits`` of the stages were counted with.
    """
    linears = [linear for step in steps for linear in step.get("linears", [])]
    factored = {linear["name"] for linear in linears}
    unreached = {name for step in steps for name in step.get("unreached", [])}
    reached = [linear for linear in plan.linears if linear.disk_name not in unreached]
    eligible = sum(linear.numel for linear in reached)
    removed = index.numel - sum(info.numel for info in written if _counts(info))
    return {
        "model": {
            "source": model_name(index.folder),
            "type": index.config.get("model_type"),
            "linear_parameters": eligible,
            "linear_parameters_kept": eligible - removed,
            "ratio": removed / eligible if eligible else 0.0,
            "parameters": index.numel,
            "parameters_kept": index.numel - removed,
            "model_ratio": removed / index.numel,
            "bytes": index.nbytes,
            "bytes_kept": sum(info.nbytes for info in written),
        },
        "memory": {
            "budget_bytes": plan.budget_bytes,
            "minimum_bytes": plan.minimum_bytes,
            "predicted_bytes": max(step["predicted_bytes"] for step in steps),
            "peak_bytes": max(step["peak_bytes"] for step in steps),
            **_device_memory(plan, steps),
        },
        "seconds": round(sum(step["seconds"] for step in steps), 1),
        "stages": _summed(step["stages"] for step in steps),
        "limits": _summed(step["limits"] for step in steps),
        "rates": asdict(rates),
        "windows": next((step["windows"] for step in steps if "windows" in step), 0),
        "recipe": recipe,
        "levers": header["levers"],
        "fingerprint": header["fingerprint"],
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "notes": [note for step in steps for note in step.get("notes", [])],
        "linears": linears,
        "dense": [
            {"name": linear.disk_name, "rows": linear.rows, "columns": linear.columns}
            for linear in reached
            if linear.disk_name not in factored
        ],
        "refined": [
            {"block": step["block"], **step["refined"]} for step in steps if "refined" in step
        ],
        "left": plan.left | dict.fromkeys(sorted(unreached), _UNREACHED),
        "steps": [{k: v for k, v in step.items() if k not in _BULKY} for step in steps],
    }


def _device_memory(plan: Plan, steps: list[dict[str, Any]]) -> dict[str, int]:
    """The GPU's budget and peaks; nothing of a job on the CPU."""
    if not plan.device_budget_bytes:
        return {}
    peaks = ("device_predicted_bytes", "device_peak_bytes")
    found = {key: max(step.get(key, 0) for step in steps) for key in peaks}
    return {"device_budget_bytes": plan.device_budget_bytes, **found}


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
    """What a checkpoint is called: its folder, or in the hub's cache its model."""
    hub = re.search(r"models--([^/]+)/snapshots/", str(folder.resolve()))
    return hub[1].replace("--", "/") if hub else folder.resolve().name


def model_card(report: dict[str, Any], recipe: Recipe) -> str:
    """``README.md`` of the output: what it is, how to load it, how it was made."""
    model, memory = report["model"], report["memory"]
    return f"""---
library_name: transformers
tags:
- streamcomp
- low-rank
---

# {model["source"]}, compressed

{model["ratio"]:.1%} of the parameters of its linears removed with streamcomp
(`{recipe.method}`, form `{recipe.form}`): {format_bytes(model["bytes"])} are now
{format_bytes(model["bytes_kept"])}.

```python
import streamcomp  # pip install streamcomp
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Without streamcomp installed, `from_pretrained("PATH", trust_remote_code=True)` does the same
through `streamcomp_plugin.py` in this folder. The licence of the original model applies.

| | |
|---|---|
| parameters | {model["parameters"]:,} -> {model["parameters_kept"]:,} |
| methods | {", ".join(_sources(recipe))} |
| calibration | {report["windows"]} windows of {recipe.seq_len} tokens |
| peak memory while compressing | {format_bytes(memory["peak_bytes"])} |
| details | `streamcomp_report.json`, `streamcomp_report.html` |
"""


def _sources(recipe: Recipe) -> list[str]:
    """Where that which made the model was published, each once."""
    sources = [find_method(recipe.method).source]
    if recipe.update:
        sources.append(find_method("svd-llm").source)
    if recipe.form == "pivot":
        sources.append("PIFA (arXiv 2501.19090)")
    if recipe.refine:
        sources.append("AA-SVD (arXiv 2604.02119)")
    return list(dict.fromkeys(sources))
