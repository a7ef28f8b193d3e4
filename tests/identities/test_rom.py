"""ROM against a principal component analysis of the outputs about the origin, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.calibration.corpus import load_windows
from streamcomp.linalg.low_rank import Decomposition
from streamcomp.methods import Moment
from streamcomp.methods.rom import Rom
from streamcomp.methods.svd_llm import SvdLlm
from tests.jobs import (
    SMALL,
    compress,
    factored_modules,
    in_memory,
    inputs_of,
    load_dense,
    products,
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


def moment_of(weight: Tensor, inputs: Tensor, side: str) -> Moment:
    seen = inputs if side == "inputs" else weight @ inputs
    return Moment(side, seen @ seen.T, seen.shape[1])  # type: ignore[arg-type]


def decomposed(weight: Tensor, moment: Moment) -> Decomposition:
    return Rom().decompose(weight, moment, 0.0)


def principal(outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Components (m, r), and all squared singular values, of the rows of Y^T."""
    components, values, _ = torch.linalg.svd(outputs, full_matrices=False)
    return components[:, :rank], values**2


@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_it_is_svd_llm_on_the_same_moments(
    shape: tuple[int, int], side: str, random: Generator
) -> None:
    weight, inputs = problem(shape, random)
    moment = moment_of(weight, inputs, side)

    found = decomposed(weight, moment)

    expected = SvdLlm().decompose(weight, moment, 0.0)
    assert torch.equal(found.spectrum, expected.spectrum)
    for ours, theirs in zip(found.factors(weight, 5), expected.factors(weight, 5), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_it_is_the_principal_component_analysis(
    shape: tuple[int, int], side: str, rank: int, random: Generator
) -> None:
    weight, inputs = problem(shape, random)

    found = decomposed(weight, moment_of(weight, inputs, side))
    left, right = found.factors(weight, rank)

    outputs = weight @ inputs
    components, energies = principal(outputs, rank)
    expected = components @ components.T @ outputs
    assert torch.allclose(left @ right @ inputs, expected, atol=1e-7)
    assert torch.allclose(left @ right, components @ components.T @ weight, atol=1e-7)
    assert torch.allclose(
        found.spectrum, energies[: min(shape)], rtol=1e-7, atol=1e-9 * float(energies[0])
    )
    lost = (outputs - expected).square().sum()
    assert float(found.spectrum[rank:].sum()) == pytest.approx(float(lost), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("shape", "side"), SIDES)
def test_no_other_matrix_of_the_rank_loses_less(
    shape: tuple[int, int], side: str, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, inputs = problem(shape, random)
    outputs = weight @ inputs
    left, right = decomposed(weight, moment_of(weight, inputs, side)).factors(weight, 4)

    def lost(product: Tensor) -> float:
        return float((outputs - product @ inputs).square().sum())

    best = lost(left @ right)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(5):
            noise = torch.randn(left.shape, dtype=F64, generator=random)
            other = torch.linalg.qr(left + size * noise).Q
            assert lost(other @ other.T @ weight) > best
    apart = right + torch.randn(right.shape, dtype=F64, generator=random)
    for _ in range(20):  # alternating least squares over all U V x
        across = torch.linalg.lstsq((apart @ inputs).T, outputs.T).solution.T
        apart = torch.linalg.lstsq(across, weight).solution
        assert lost(across @ apart) >= best * (1 - 1e-9)


# -- a whole job


@torch.no_grad()
@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("statistics", ["dense", "compressed"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_a_job_stores_the_components_of_the_whole_model(
    architecture: str,
    statistics: str,
    form: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    dense, out = pico(architecture, dtype=F64), tmp_path / "out"
    settings: dict[str, Any] = {"method": "rom", "statistics": statistics, "form": form}

    compress(dense, out, text, ratio=0.3, **settings)

    model = load_dense(dense)
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
            components, _ = principal(outputs, ranks[disk_name]["rank"])
            expected = components @ (components.T @ outputs)
            found = stored[disk_name] @ inputs
            assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))
            if statistics == "compressed":
                linear.weight.data = stored[disk_name]
