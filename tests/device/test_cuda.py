"""On a GPU: every kind of job, against the same job on the CPU, and resumed. Needs a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streamcomp
from streamcomp import BudgetError, Recipe, Resources
from tests.jobs import (
    BUDGET,
    Interrupt,
    Interrupted,
    products,
    tree,
    varied_text,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

JOBS: list[dict[str, Any]] = [
    {"method": "two-sided"},
    {"method": "two-sided", "form": "uv", "store_every": 2},
    {"method": "two-sided", "ratio": (0.2, 0.4)},
    {"method": "two-sided", "update": True},
    {"method": "svd-llm"},
    {"method": "svd-llm", "form": "uv"},
    {"method": "svd-llm", "statistics": "compressed"},
    {"method": "svd-llm", "statistics": "none"},
    {"method": "svd-llm", "allocation": "loss", "update": True, "anchor": 0.5},
    {"method": "rom"},
    {"method": "rom", "blocks": "last:1"},
    {"method": "swsc"},
    {"method": "swsc", "axis": "columns", "ratio": 0.4},
    {"method": "swsc", "statistics": "none"},
]
TRAINED: list[dict[str, Any]] = [{"refine": 8}, {"method": "svd-llm", "form": "uv", "refine": 8}]


def _name(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return varied_text(tmp_path / "text.txt", 6000)


def _compress(
    model: Path, out: Path, text: Path, device: str, progress: Any = None, **settings: Any
) -> streamcomp.CompressResult:
    recipe = Recipe(calibration=(str(text),), samples=8, seq_len=32, **settings)
    return streamcomp.compress(
        model, out, recipe, Resources(BUDGET, threads=1, device=device), progress=progress
    )


def _evaluate(model: Path, text: Path, device: str) -> float:
    resources = Resources(BUDGET, threads=1, device=device)
    return streamcomp.evaluate(
        model, str(text), seq_len=32, windows=8, resources=resources
    ).perplexity


@pytest.mark.parametrize("kind", ["opt", "gemma2", "gemma3", "phi3", "gpt_neox", "mixtral"])
def test_every_kind_of_model_runs(
    kind: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico(kind)

    on_gpu = _compress(folder, tmp_path / "gpu", text, "cuda")
    on_cpu = _compress(folder, tmp_path / "cpu", text, "cpu")

    expected = _evaluate(on_cpu.out, text, "cpu")
    assert _evaluate(on_gpu.out, text, "cuda") == pytest.approx(expected, rel=3e-2)


@pytest.mark.parametrize("settings", JOBS, ids=_name)
def test_a_job_gives_the_same_matrices_as_on_the_cpu(
    settings: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("llama", dtype=torch.float64)

    on_gpu = _compress(folder, tmp_path / "gpu", text, "cuda", **settings)
    on_cpu = _compress(folder, tmp_path / "cpu", text, "cpu", **settings)

    for gpu, cpu in zip((on_gpu, *on_gpu.others), (on_cpu, *on_cpu.others), strict=True):
        expected = products(cpu.out)
        found = products(gpu.out)
        assert found.keys() == expected.keys() and expected
        for name, matrix in expected.items():
            assert (found[name] - matrix).norm() <= 1e-6 * matrix.norm(), name


@pytest.mark.parametrize("settings", TRAINED, ids=_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_refinement_runs_there_and_makes_no_block_worse(
    dtype: torch.dtype,
    settings: dict[str, Any],
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    result = _compress(pico("llama", dtype=dtype), tmp_path / "out", text, "cuda", **settings)

    refined = [step["refined"] for step in result.report["steps"] if step.get("refined")]
    assert len(refined) == 2
    assert all(step["after"] <= step["before"] for step in refined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perplexity_is_that_of_the_cpu(
    dtype: torch.dtype, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("llama", dtype=dtype)
    out = _compress(folder, tmp_path / "out", text, "cuda").out

    for model in (folder, out):
        gpu, cpu = (math.log(_evaluate(model, text, device)) for device in ("cuda", "cpu"))
        assert abs(gpu - cpu) < {torch.float32: 1e-4}.get(dtype, 3e-2)


@pytest.mark.parametrize("settings", [JOBS[0], JOBS[4], JOBS[11], TRAINED[0]], ids=_name)
def test_the_budget_of_the_gpu_is_kept(
    settings: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    recipe = Recipe(calibration=(str(text),), samples=8, seq_len=32, **settings)
    model, out = pico("llama", dtype=torch.bfloat16), tmp_path / "out"
    with pytest.raises(BudgetError, match="--max-vram") as caught:
        streamcomp.compress(model, out, recipe, Resources(BUDGET, device="cuda", max_vram="64M"))
    least = str(caught.value.minimum_bytes)

    done = streamcomp.compress(model, out, recipe, Resources(BUDGET, device="cuda", max_vram=least))

    memory = done.report["memory"]
    assert 0 < memory["device_peak_bytes"] <= memory["device_predicted_bytes"]
    assert memory["device_predicted_bytes"] <= memory["device_budget_bytes"] == int(least)


@pytest.mark.parametrize("settings", [JOBS[0], JOBS[6], TRAINED[0]], ids=_name)
def test_an_interrupted_job_ends_in_the_same_bytes(
    settings: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("llama", dtype=torch.bfloat16)
    whole = _compress(folder, tmp_path / "whole", text, "cuda", **settings).out
    steps = len(json.loads((whole / "streamcomp_report.json").read_text("utf-8"))["steps"])

    for after in range(0, steps - 1, 2):
        out = tmp_path / f"after-{after}"
        with pytest.raises(Interrupted):
            _compress(folder, out, text, "cuda", Interrupt(after), **settings)
        _compress(folder, out, text, "cuda", **settings)

        expected = {
            k: v for k, v in tree(whole).items() if k.endswith((".safetensors", "fig.json"))
        }
        assert {k: v for k, v in tree(out).items() if k in expected} == expected
