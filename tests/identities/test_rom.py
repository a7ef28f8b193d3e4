"""ROM against a principal component analysis of the outputs, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.calibration.corpus import load_windows
from streamcomp.linalg.low_rank import Decomposition, centred
from streamcomp.methods import Moment, factor_tensors, find_method, mean_bias
from tests.jobs import (
    SMALL,
    compress,
    factored_modules,
    in_memory,
    inputs_of,
    load_dense,
    products,
    stored_tensors,
    varied_text,
)

F64 = torch.float64
SHAPES = [(12, 20), (20, 12), (16, 16)]
SIDES = [*((shape, "inputs") for shape in SHAPES), ((12, 20), "outputs"), ((16, 16), "outputs")]


def problem(shape: tuple[int, int], random: Generator) -> tuple[Tensor, Tensor]:
    """A weight W (m, n) and inputs X (n, T) far from the origin."""
    rows, columns = shape
    weight = torch.randn(rows, columns, dtype=F64, generator=random)
    mixing = torch.randn(columns, columns, dtype=F64, generator=random)
    inputs = mixing @ torch.randn(columns, 100, dtype=F64, generator=random)
    return weight, inputs + 5 * torch.randn(columns, 1, dtype=F64, generator=random)


def moment_of(weight: Tensor, inputs: Tensor, side: str, *, total: bool = True) -> Moment:
    seen = inputs if side == "inputs" else weight @ inputs
    summed = seen.sum(1) if total else None
    return Moment(side, seen @ seen.T, seen.shape[1], summed)  # type: ignore[arg-type]


def decomposed(weight: Tensor, moment: Moment) -> Decomposition:
    return find_method("rom").decompose(weight, moment, 0.0)  # type: ignore[union-attr]


def principal(outputs: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (m, 1), components (m, r) and all squared singular values of the rows of Y^T."""
    mean = outputs.mean(1, keepdim=True)
    components, values, _ = torch.linalg.svd(outputs - mean, full_matrices=False)
    return mean, components[:, :rank], values**2


@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_without_a_sum_it_is_svd_llm(shape: tuple[int, int], side: str, random: Generator) -> None:
    weight, inputs = problem(shape, random)
    moment = moment_of(weight, inputs, side, total=False)

    found = decomposed(weight, moment)

    expected = find_method("svd-llm").decompose(weight, moment, 0.0)  # type: ignore[union-attr]
    assert torch.equal(found.spectrum, expected.spectrum)
    for ours, theirs in zip(found.factors(weight, 5), expected.factors(weight, 5), strict=True):
        assert torch.equal(ours, theirs)


def test_a_centred_moment_is_that_of_centred_rows(random: Generator) -> None:
    _, inputs = problem((12, 20), random)
    apart = inputs - inputs.mean(1, keepdim=True)

    found = centred(inputs @ inputs.T, inputs.sum(1), inputs.shape[1])

    assert torch.allclose(found, apart @ apart.T, atol=1e-9)
    assert torch.allclose(centred(found, torch.zeros(20), 100), found)


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_centred_it_is_the_principal_component_analysis(
    shape: tuple[int, int], side: str, rank: int, random: Generator
) -> None:
    weight, inputs = problem(shape, random)
    moment = moment_of(weight, inputs, side)

    found = decomposed(weight, moment)
    left, right = found.factors(weight, rank)
    bias = mean_bias(weight, left, right, moment)

    outputs = weight @ inputs
    mean, components, energies = principal(outputs, rank)
    expected = mean + components @ components.T @ (outputs - mean)
    assert torch.allclose(left @ right @ inputs + bias[:, None], expected, atol=1e-7)
    assert torch.allclose(left @ right, components @ components.T @ weight, atol=1e-8)
    assert torch.allclose(found.spectrum, energies[: min(shape)], rtol=1e-7)
    lost = (outputs - expected).square().sum()
    assert float(found.spectrum[rank:].sum()) == pytest.approx(float(lost), rel=1e-7)


@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_the_mean_output_is_kept(shape: tuple[int, int], side: str, random: Generator) -> None:
    weight, inputs = problem(shape, random)
    moment = moment_of(weight, inputs, side)
    left, right = decomposed(weight, moment).factors(weight, 4)

    bias = mean_bias(weight, left, right, moment)

    mean = inputs.mean(1)
    assert bias.dtype == F64
    assert torch.allclose(left @ (right @ mean) + bias, weight @ mean, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_no_other_affine_map_of_the_rank_loses_less(
    shape: tuple[int, int], side: str, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, inputs = problem(shape, random)
    moment, outputs = moment_of(weight, inputs, side), weight @ inputs
    left, right = decomposed(weight, moment).factors(weight, 4)
    bias = mean_bias(weight, left, right, moment)[:, None]

    def lost(product: Tensor, shift: Tensor) -> float:
        return float((outputs - product @ inputs - shift).square().sum())

    best, mean = lost(left @ right, bias), outputs.mean(1, keepdim=True)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(5):
            noise = torch.randn(left.shape, dtype=F64, generator=random)
            other = torch.linalg.qr(left + size * noise).Q
            projected = other @ other.T @ weight
            assert lost(projected, mean - other @ other.T @ mean) > best
            assert lost(left @ right, bias + size * noise[:, :1]) > best
    uncentred = decomposed(weight, moment_of(weight, inputs, side, total=False))
    assert lost(torch.matmul(*uncentred.factors(weight, 4)), torch.zeros_like(bias)) > best
    apart = right + torch.randn(right.shape, dtype=F64, generator=random)
    for _ in range(20):  # alternating least squares over all U V x + b
        centre = inputs - inputs.mean(1, keepdim=True)
        across = torch.linalg.lstsq((apart @ centre).T, (outputs - mean).T).solution.T
        apart = torch.linalg.lstsq(across, weight).solution
        assert lost(
            across @ apart, mean - across @ apart @ inputs.mean(1, keepdim=True)
        ) >= best * (1 - 1e-9)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_inputs_that_never_change_become_a_bias(side: str, random: Generator) -> None:
    weight, inputs = problem((12, 20), random)
    inputs = inputs[:, :1].expand(-1, 100)
    moment = moment_of(weight, inputs, side)

    found = decomposed(weight, moment)
    left, right = found.factors(weight, 3)
    bias = mean_bias(weight, left, right, moment)

    assert torch.allclose(left @ right @ inputs + bias[:, None], weight @ inputs, atol=1e-8)


# -- a whole job


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "calibration.txt", 4000)


@torch.no_grad()
@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("statistics", ["dense", "compressed"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_a_job_stores_the_components_and_the_means_of_the_whole_model(
    architecture: str,
    statistics: str,
    form: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    dense, out = pico(architecture, dtype=F64), tmp_path / "out"
    settings = {"method": "rom", "centred": True, "statistics": statistics, "form": form}

    compress(dense, out, text, ratio=0.3, **settings)

    model, whole = load_dense(dense), stored_tensors(out)
    tokens = load_windows(dense, [str(text)], SMALL["samples"], SMALL["seq_len"], 0).tokens.long()
    stored, ranks = products(out), factored_modules(out)
    for block in range(model.config.num_hidden_layers):
        names = {in_memory(model, n): n for n in stored if f"layers.{block}." in f".{n}"}
        assert names
        with inputs_of(model, list(names)) as seen:
            model(input_ids=tokens, use_cache=False)
        for name, disk_name in names.items():
            linear, inputs = model.get_submodule(name), torch.cat(seen[name]).T
            outputs = linear.weight @ inputs
            mean, components, _ = principal(outputs, ranks[disk_name]["rank"])
            project = components @ components.T
            bias = (mean - project @ mean)[:, 0]
            if linear.bias is not None:
                bias += linear.bias
            expected = project @ outputs + bias[:, None]
            found = stored[disk_name] @ inputs + whole[f"{disk_name}.bias"][:, None]
            assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))
            assert torch.allclose(
                found.mean(1), mean[:, 0] + (0 if linear.bias is None else linear.bias), atol=1e-9
            )
            if statistics == "compressed":
                linear.weight.data = stored[disk_name]
                linear.bias = torch.nn.Parameter(whole[f"{disk_name}.bias"])


def test_both_forms_hold_the_centred_factors(random: Generator) -> None:
    weight, inputs = problem((20, 12), random)
    left, right = decomposed(weight, moment_of(weight, inputs, "inputs")).factors(weight, 5)

    for form in ("uv", "pivot"):
        tensors = factor_tensors(form, left, right, F64)
        assert "bias" not in tensors
