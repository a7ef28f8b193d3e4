"""Jobs that factor the experts of mixtures: what they write, resume, report and leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import streamcomp
from streamcomp import RecipeError
from streamcomp.api import plan
from streamcomp.job import block_plan
from streamcomp.job.publish import read_report
from streamcomp.job.rows import Report
from tests.jobs import (
    RESOURCES,
    Interrupt,
    Interrupted,
    compress,
    factored_modules,
    load_products,
    logits_of,
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
    expected = logits_of(load_products(dense, out), tokens)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=2e-5, atol=2e-5)
    report = report_of(out)
    assert report.model.ratio == pytest.approx(0.3, abs=0.02)
    assert sum(row.within != "" for row in report.linears) > 8 - 3  # of 8 in a block
    assert all(step.peak_bytes <= step.predicted_bytes for step in report.steps)


@pytest.mark.parametrize(("kind", "way"), list(zip(KINDS, WAYS, strict=True)))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_fewer_stored_states(
    dtype: torch.dtype, pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense = pico("gpt_oss", dtype=dtype)
    compress(dense, tmp_path / "all", job_text, ratio=0.2)
    compress(dense, tmp_path / "few", job_text, ratio=0.2, store_every=2)

    whole, few = stored_tensors(tmp_path / "all"), stored_tensors(tmp_path / "few")
    assert whole.keys() == few.keys()
    assert all(torch.equal(whole[name], few[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {dtype, torch.int32}
    tokens = pico_tokens(2, 16)
    before = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "all", dtype="auto").eval()
    expected = logits_of(before, tokens).float()
    assert (logits_of(after, tokens).float() - expected).norm() < 0.2 * expected.norm()


def test_blocks_that_are_not_chosen_keep_their_experts(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    dense, out = pico("mixtral"), tmp_path / "out"

    compress(dense, out, job_text, ratio=0.1, blocks="last:1")

    before, after = stored_tensors(dense), stored_tensors(out)
    experts = {name for name in before if ".layers.0." in name and ".experts." in name}
    assert len(experts) == 12
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert "model.layers.1.block_sparse_moe.experts" in factored_modules(out)


def test_large_experts_run_apart_where_a_model_is_only_evaluated(
    pico: Callable[..., Path], job_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"seq_len": 16, "windows": 4, "resources": RESOURCES}
    with quick_plan():
        whole = streamcomp.evaluate(pico("mixtral"), str(job_text), **settings)
        monkeypatch.setattr(block_plan, "_LARGE_BYTES", 0)
        apart = streamcomp.evaluate(pico("mixtral"), str(job_text), **settings)

    assert apart.nll == pytest.approx(whole.nll, rel=1e-5)


def test_an_output_may_leave_all_experts_dense_that_the_next_one_factors(
    pico: Callable[..., Path], job_text: Path, tmp_path: Path
) -> None:
    """The first one does not read them as weights; the check of the source knows that."""
    dense, out = pico("mixtral"), tmp_path / "out"

    compress(dense, out, job_text, ratio=(0.0005, 0.3))

    first, second = factored_modules(out / "ratio-0.0005"), factored_modules(out / "ratio-0.3")
    assert not any("experts" in name for name in first)
    assert any("experts" in name for name in second)


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


def test_a_plan_counts_what_stands_for_experts_while_the_block_runs(
    pico: Callable[..., Path], job_text: Path
) -> None:
    """Their rows in the wide dtype, read for a batch; and each token's choice in every phase."""
    with quick_plan():
        recipe = small_recipe(job_text, ratio=0.3)
        made = plan(pico("mixtral"), recipe, RESOURCES)
        dense = plan(pico("mixtral"), replace(recipe, exclude="experts"), RESOURCES)

    batch, tokens = made.levers.batch, 8 * 16
    apart, whole = made.outline.blocks[0], dense.outline.blocks[0]
    assert apart.bank is not None and whole.bank is None
    rows = 16 * 32 * (4 + 4)  # of a window, as read and as it runs
    states = apart.trace.activation_bytes + apart.stream.window_bytes
    assert apart.activations(batch) == batch * (states + rows)
    for step in made.steps:
        if step.name.startswith(("forward", "reverse")):
            assert step.step.held(made.outline)["routing"] >= tokens * 2 * (4 + 4)
    assert not any("routing" in step.step.held(dense.outline) for step in dense.steps)


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
