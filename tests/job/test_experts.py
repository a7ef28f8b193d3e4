"""Jobs that factor the experts of mixtures: what they write, resume, report and leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import streamcomp
from streamcomp import RecipeError
from streamcomp.api import plan
from streamcomp.job.publish import read_report
from streamcomp.job.rows import Report
from tests.jobs import (
    RESOURCES,
    Interrupt,
    Interrupted,
    compress,
    factored_modules,
    logits_of,
    product,
    quick_plan,
    small_recipe,
    stored_tensors,
    varied_text,
)
from tests.pico import MIXTURES, pico_tokens

WAYS: dict[str, dict[str, Any]] = {
    "two-sided": {},
    "svd-llm": {"method": "svd-llm", "form": "uv"},
    "rom": {"method": "rom", "statistics": "dense"},
}
# Per-expert tensors on disk; fused, transposed, biased and interleaved ones; a shared expert.
KINDS = ("mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture
def job_text(tmp_path: Path) -> Path:
    return varied_text(tmp_path / "text.txt", 4096)


def report_of(out: Path) -> Report:
    report = read_report(out)
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, "two-sided") for kind in MIXTURES]
    + [(kind, way) for kind in KINDS for way in ("svd-llm", "rom")],
)
def test_a_mixture_loads_and_is_the_product_of_its_factors(
    kind: str, way: str, pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico(kind), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.3, **WAYS[way])

    tokens = pico_tokens(2, 16)
    expected = logits_of(_with_products(dense, out), tokens)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=2e-5, atol=2e-5)
    report = report_of(out)
    assert report.model.ratio == pytest.approx(0.3, abs=0.02)
    assert sum(row.within != "" for row in report.linears) > 8 - 3  # of 8 in a block
    assert all(step.peak_bytes <= step.predicted_bytes for step in report.steps)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_goes_on_behind_every_step(
    kind: str, way: str, pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, whole, out = pico(kind), tmp_path / "whole", tmp_path / "out"
    compress(dense, whole, job_text, ratio=0.3, **WAYS[way])
    steps = len(report_of(whole).steps)

    for step in range(steps - 1):
        with pytest.raises(Interrupted):
            compress(dense, out, job_text, ratio=0.3, progress=Interrupt(step), **WAYS[way])
    compress(dense, out, job_text, ratio=0.3, **WAYS[way])

    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    for name in [*names, "config.json"]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_almost_all_ranks_give_the_model_back(
    kind: str, pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico(kind), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.001)

    tokens = pico_tokens(2, 16)
    before = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    after = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    expected = logits_of(before, tokens)
    far = float((logits_of(after, tokens) - expected).abs().max() / expected.abs().max())
    assert far < 0.02


def test_several_ratios_come_from_one_analysis(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense = pico("qwen3_moe")
    compress(dense, tmp_path / "both", job_text, ratio=(0.2, 0.4))
    compress(dense, tmp_path / "one", job_text, ratio=0.4)

    both, one = tmp_path / "both" / "ratio-0.4", tmp_path / "one"
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (both / path.name).read_bytes()


def test_only_included_experts_are_factored(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico("mixtral"), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.2, include=r"q_proj|experts\.[13]\.gate_up", form="uv")

    rows = report_of(out).linears
    assert {row.name.partition(".experts.")[2] for row in rows if row.within} <= {
        "1.gate_up_proj",
        "3.gate_up_proj",
    }
    (ranks,) = {
        tuple(spec["ranks"]["down_proj"])
        for spec in factored_modules(out).values()
        if "ranks" in spec
    }
    assert ranks == (32,) * 4  # all rows: dense


def test_experts_that_are_excluded_stay_as_they_are(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico("mixtral"), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.2, exclude="experts")

    assert report_of(out).left["model.layers.0.mlp.experts"] == "excluded"
    before, after = stored_tensors(dense), stored_tensors(out)
    experts = {name for name in before if ".experts." in name}
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "swsc"}, "method swsc"),
        ({"method": "svd-llm", "update": True}, "--update"),
        ({"method": "svd-llm", "statistics": "compressed"}, "--statistics compressed"),
    ],
)
def test_what_leaves_experts_dense_is_said(
    settings: dict[str, Any],
    why: str,
    pico: Callable[..., Path],
    job_text: Path,
    tmp_path: Path,
) -> None:
    dense, out = pico("mixtral"), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.2, **settings)

    assert why in report_of(out).left["model.layers.0.mlp.experts"]


def test_the_report_tells_how_many_tokens_reached_an_expert(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico("mixtral"), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.3)

    rows = report_of(out).linears
    reached = {row.name: row.tokens for row in rows if row.within}
    assert all(row.tokens is None for row in rows if not row.within)
    assert all(0 <= tokens <= 128 for tokens in reached.values() if tokens is not None)
    assert None not in reached.values()


def test_ratio_counts_experts_in_the_plan(pico: Callable[..., Path], job_text: Path) -> None:
    with quick_plan():
        made = plan(pico("mixtral"), small_recipe(job_text, ratio=0.3), RESOURCES)

    names = set(made.ranks)
    assert "model.layers.1.mlp.experts.3.down_proj" in names
    assert made.ratio == pytest.approx(0.3, abs=0.02)


def test_a_job_with_another_damping_takes_moments_of_experts_again(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico("mixtral"), tmp_path / "out"
    compress(dense, out, job_text, ratio=0.3, keep_work=True)
    for path in out.iterdir():
        if path.is_file():
            path.unlink()

    with pytest.raises(streamcomp.JobMismatchError, match="damping"):
        compress(dense, out, job_text, ratio=0.3, damping=0.05, keep_work=True)


def test_no_experts_are_included_by_a_name_that_none_has(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="leave no linear"):
        compress(pico("mixtral"), tmp_path / "out", job_text, include="nothing")


# -- what is expected --------------------------------------------------------------------------


@torch.no_grad()
def _with_products(dense: Path, out: Path) -> PreTrainedModel:
    """The dense model with W' instead of every weight that ``out`` holds factors of."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    tensors = stored_tensors(out)
    for disk_name, spec in factored_modules(out).items():
        tail = disk_name.partition("layers.")[2].replace("block_sparse_moe", "mlp")
        module = next(
            m
            for n, m in model.named_modules()
            if n.partition("layers.")[2].replace("block_sparse_moe", "mlp") == tail
        )
        if "ranks" not in spec:
            weight = product(tensors, disk_name, spec["form"])
            module.get_parameter("weight").copy_(weight)
            continue
        for name, ranks in spec["ranks"].items():
            parameter = module.get_parameter(name)
            for expert, weight in _expert_products(tensors, f"{disk_name}.{name}", spec, ranks):
                parameter[expert].copy_(weight.T if getattr(module, "is_transposed") else weight)  # noqa: B009
    return model


def _expert_products(
    tensors: dict[str, Tensor], name: str, spec: dict[str, Any], ranks: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """W' of each expert, as docs/format.md says that they are stored."""
    left = "U" if spec["form"] == "uv" else "coef"
    row, place = 0, 0
    for expert in sorted(range(len(ranks)), key=lambda e: ranks[e]):
        rank = ranks[expert]
        right = tensors[f"{name}_V"][row : row + rank].double()
        row += rank
        pivots = tensors.get(f"{name}_pivots")
        rows = pivots.shape[1] if pivots is not None else None
        if pivots is None:
            rows = max(ranks) if f"{name}_U" not in tensors else _rows(tensors, name, ranks)
        assert rows is not None
        if rank == rows:
            yield expert, right
            continue
        height = rows if pivots is None else rows - rank
        flat = tensors[f"{name}_{left}"][place : place + rank * height].double()
        place += rank * height
        if pivots is None:
            yield expert, flat.view(rank, height).T @ right
        else:
            stacked = torch.cat((right, flat.view(height, rank) @ right))
            yield expert, stacked[pivots[expert].long()]


def _rows(tensors: dict[str, Tensor], name: str, ranks: list[int]) -> int:
    """The rows m for which U has as many numbers as it has; dense experts have rank m."""
    numbers = len(tensors[f"{name}_U"])
    return next(m for m in range(1, numbers + 1) if sum(r * m for r in ranks if r != m) == numbers)


def test_the_config_names_ranks_of_all_experts(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico("qwen3_moe"), out, job_text, ratio=0.4)

    entry = factored_modules(out)["model.layers.0.mlp.experts"]

    assert set(entry) == {"form", "ranks", "dtype"}
    assert {name: len(ranks) for name, ranks in entry["ranks"].items()} == {
        "gate_up_proj": 4,
        "down_proj": 4,
    }
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3_moe"
