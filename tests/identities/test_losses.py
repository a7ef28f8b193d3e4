"""The loss that is reported for a linear is the one that its factors have.

||W X - W' X||^2 / ||W X||^2 on the inputs X that the linear had during calibration: of the
dense model, or of the model compressed so far.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcomp.calibration.corpus import load_windows
from tests.jobs import SMALL, compress, in_memory, inputs_of, load_dense, products


@torch.no_grad()
def measured_losses(dense: Path, out: Path, tokens: Tensor, statistics: str) -> dict[str, float]:
    """Losses of the stored factors, measured on the whole model in memory."""
    model = load_dense(dense)
    losses = {}
    replaced = products(out)
    for block in range(model.config.num_hidden_layers):
        members = {
            in_memory(model, name): name for name in replaced if f"layers.{block}." in f".{name}"
        }
        with inputs_of(model, list(members)) as seen:
            model(input_ids=tokens, use_cache=False)
        for name, disk_name in members.items():
            linear = model.get_submodule(name)
            inputs, weight = torch.cat(seen[name]), linear.weight.double()
            wanted = inputs @ weight.T
            losses[disk_name] = float(
                (wanted - inputs @ replaced[disk_name].T).square().sum() / wanted.square().sum()
            )
            if statistics == "compressed":
                linear.weight.data = replaced[disk_name].to(linear.weight.dtype)
    return losses


@pytest.mark.parametrize(
    ("method", "statistics"),
    [("svd-llm", "dense"), ("svd-llm", "compressed"), ("rom", "compressed")],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "opt", "gpt_neox"])
def test_reported_losses_are_the_measured_ones(
    architecture: str,
    form: str,
    dtype: torch.dtype,
    tolerance: float,
    method: str,
    statistics: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    dense = pico(architecture, dtype=dtype)
    tokens = load_windows(dense, [str(text)], SMALL["samples"], SMALL["seq_len"], 0).tokens.long()

    settings: dict[str, Any] = {"method": method, "form": form, "statistics": statistics}
    result = compress(dense, tmp_path / "out", text, ratio=0.4, batch=3, **settings)

    reported = {linear["name"]: linear["relative_loss"] for linear in result.report["linears"]}
    measured = measured_losses(dense, tmp_path / "out", tokens, statistics)
    assert min(measured.values()) > 1e-5 and max(measured.values()) < 0.5
    assert reported.keys() == measured.keys()
    known = torch.finfo(dtype).eps / 2  # of the energy: what one rounding in that dtype hides
    for name, loss in measured.items():
        assert reported[name] == pytest.approx(loss, rel=tolerance, abs=known), name


@pytest.mark.parametrize("form", ["pivot", "uv"])
def test_rounded_factors_lose_little_more_than_reported(
    form: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense = pico("llama", dtype=torch.bfloat16)
    tokens = load_windows(dense, [str(text)], SMALL["samples"], SMALL["seq_len"], 0).tokens.long()

    result = compress(dense, tmp_path / "out", text, method="svd-llm", form=form, ratio=0.4)

    measured = measured_losses(dense, tmp_path / "out", tokens, "dense")
    for linear in result.report["linears"]:
        assert measured[linear["name"]] == pytest.approx(
            linear["relative_loss"], rel=0.02, abs=1e-4
        )


@pytest.mark.parametrize("method", ["two-sided", "svd-llm", "rom"])
def test_the_loss_falls_as_the_ratio_does(
    method: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    losses = []
    for ratio in (0.8, 0.5, 0.3, 0.1):
        out = tmp_path / f"{ratio}"
        result = compress(
            pico("llama"), out, text, method=method, allocation="uniform", ratio=ratio
        )
        losses.append([linear["relative_loss"] for linear in result.report["linears"]])

    for more, less in zip(losses, losses[1:], strict=False):
        assert all(a > b for a, b in zip(more, less, strict=True))
