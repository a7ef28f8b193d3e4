"""The closed-form update against least squares on everything held in memory, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from streamcomp.calibration.corpus import load_windows
from streamcomp.calibration.refit import Refit
from streamcomp.forms import find_form
from streamcomp.forms.runtime import FactoredLinear
from streamcomp.linalg.fitting import refit_left
from streamcomp.model.sites import LinearSite, find_sites
from streamcomp.model.streamer import BlockStreamer, LoadedBlock
from tests.jobs import (
    SMALL,
    compress,
    factored_modules,
    in_memory,
    inputs_of,
    load_dense,
    products,
)
from tests.model.folders import CPU, open_skeleton
from tests.pico import pico_tokens

F64 = torch.float64
RIDGE = 1e-6


def normal(*shape: int, random: Generator) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=random)


# -- one linear


@pytest.mark.parametrize("rows", [4, 12, 20])
def test_it_solves_the_least_squares(rows: int, random: Generator) -> None:
    wanted, low = normal(rows, 90, random=random), normal(6, 90, random=random)

    found = refit_left(wanted @ low.T, low @ low.T, ridge=0.0)

    expected = torch.linalg.lstsq(low.T, wanted.T).solution.T
    assert torch.allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("ridge", [RIDGE, 1e-2, 10.0])
def test_the_ridge_is_as_if_more_rows_were_zero(ridge: float, random: Generator) -> None:
    wanted, low = normal(9, 90, random=random), normal(6, 90, random=random)
    inner = low @ low.T

    found = refit_left(wanted @ low.T, inner, ridge=ridge)

    more = (ridge * inner.diagonal().mean()).sqrt() * torch.eye(6, dtype=F64)
    inputs, outputs = torch.cat((low, more), 1), torch.cat((wanted, torch.zeros(9, 6)), 1)
    expected = torch.linalg.lstsq(inputs.T, outputs.T.to(F64)).solution.T
    assert torch.allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_it_never_loses_more_on_what_it_was_fitted_to(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    dense = normal(20, 90, random=random)
    shifted = dense + 0.3 * normal(20, 90, random=random)
    weight = normal(12, 20, random=random)
    left = torch.linalg.svd(weight @ dense).U
    right = left[:, :5].T @ weight
    low = right @ shifted

    wanted = weight @ dense
    exact = refit_left(wanted @ low.T, low @ low.T, ridge=0.0)
    found = refit_left(wanted @ low.T, low @ low.T)

    best, ridged, before = (lost(wanted.T, low.T, u) for u in (exact, found, left[:, :5]))
    assert best <= ridged <= best * (1 + 1e-6)
    assert ridged <= before
    for size in (1e-3, 1e-1):
        assert lost(wanted.T, low.T, exact + size * normal(12, 5, random=random)) > best


def test_on_the_dense_stream_alone_it_keeps_what_was_best(random: Generator) -> None:
    weight, inputs = normal(12, 20, random=random), normal(20, 90, random=random)
    basis = torch.linalg.svd(weight @ inputs).U[:, :5]
    low = basis.T @ weight @ inputs

    found = refit_left(weight @ inputs @ low.T, low @ low.T, ridge=0.0)

    assert torch.allclose(found, basis, atol=1e-11)


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_ranks_are_fitted_exactly(
    tokens: int, ridge: float, random: Generator
) -> None:
    wanted, low = normal(9, tokens, random=random), normal(6, tokens, random=random)

    found = refit_left(wanted @ low.T, low @ low.T, ridge)

    assert (found @ low - wanted).norm() < 1e-4 * wanted.norm()
    least = torch.linalg.lstsq(low.T, wanted.T, driver="gelsd").solution.T
    assert (found - least).norm() < 1e-3 * least.norm()  # nothing is made up beside


def test_without_any_input_nothing_is_put_out() -> None:
    found = refit_left(torch.zeros(9, 6), torch.zeros(6, 6))

    assert torch.equal(found, torch.zeros(9, 6, dtype=F64))
    for form in ("uv", "pivot"):
        tensors = find_form(form)().encode(found, torch.ones(6, 14, dtype=F64), torch.float32)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_narrow_sums_are_solved_in_fp64(random: Generator) -> None:
    wanted, low = normal(9, 90, random=random).float(), normal(6, 90, random=random).float()

    found = refit_left(wanted @ low.T, low @ low.T)

    assert found.dtype == F64
    expected = torch.linalg.lstsq(low.T.double(), wanted.T.double()).solution.T
    assert torch.allclose(found, expected, atol=1e-4)


def lost(wanted: Tensor, low: Tensor, left: Tensor, ridge: float = 0.0) -> float:
    """||Y - U Z||_F^2 + ridge ||U||_F^2 for rows of Y^T (T, m) and Z^T (T, r)."""
    return float((wanted - low @ left.T).square().sum() + ridge * left.square().sum())


# -- a block


@contextmanager
def compressed_block(
    folder: Path, form: str
) -> Iterator[
    tuple[LoadedBlock, dict[LinearSite, FactoredLinear], list[tuple[Tensor, Tensor, Any]]]
]:
    """Block 1 with half of its linears' ranks, and micro-batches of both streams."""
    skeleton = open_skeleton(folder)
    streamer = BlockStreamer(skeleton, CPU)
    random = torch.Generator().manual_seed(0)
    batches = []
    for seed in range(3):
        hidden, layer_inputs = streamer.capture(pico_tokens(seed=seed))
        noise = torch.randn(hidden.shape, dtype=hidden.dtype, generator=random)
        batches.append((hidden, hidden + 0.3 * hidden.std() * noise, layer_inputs[1]))
    with streamer.block(1) as loaded:
        sites = find_sites(skeleton, 1).linears
        modules = {site: install(loaded, site, form) for site in sites}
        yield loaded, modules, batches


def install(loaded: LoadedBlock, site: LinearSite, form: str) -> FactoredLinear:
    """The truncated SVD of half the rank instead of the weight."""
    weight, rank = site.weight(loaded), min(site.rows, site.columns) // 2
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    tensors = find_form(form)().encode(
        left[:, :rank], values[:rank, None] * right[:rank], weight.dtype
    )
    site.install(loaded, tensors, {"form": form, "rank": rank})
    return site.factored(loaded)


@pytest.mark.parametrize("anchor", [1.0, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt_neox"])
def test_the_sums_are_those_of_both_streams_in_memory(
    architecture: str, form: str, anchor: float, pico: Callable[..., Path]
) -> None:
    with compressed_block(pico(architecture, dtype=F64), form) as (loaded, modules, batches):
        refit = Refit(loaded, list(modules), anchor)
        for dense, shifted, inputs in batches:
            with refit.dense():
                loaded.run(dense, inputs)
            with refit.compressed():
                loaded.run(shifted, inputs)
        found = {site: refit.factors(site) for site in modules}
        names = [site.name for site in modules]

        with inputs_of(loaded.module, names) as seen:
            for _, shifted, inputs in batches:
                loaded.run(shifted, inputs)
        with loaded.dense(), inputs_of(loaded.module, names) as seen_dense:
            for dense, _, inputs in batches:
                loaded.run(dense, inputs)
        for site, module in modules.items():
            weight, right = site.weight(loaded), module.weight
            inputs, anchored = torch.cat(seen[site.name]), torch.cat(seen_dense[site.name])
            wanted = (anchor * anchored + (1 - anchor) * inputs) @ weight.T
            low = inputs @ right.T
            left, kept = found[site]
            assert torch.equal(kept, right)
            before = module.left_factor()
            expected = refit_left(wanted.T @ low, low.T @ low, towards=before)
            assert torch.allclose(left, expected, atol=1e-8), site.name

            best = torch.linalg.lstsq(low, wanted, driver="gelsd").solution.T
            assert lost(wanted, low, left) <= lost(wanted, low, before) * (1 + 1e-12)
            assert lost(wanted, low, left) <= lost(wanted, low, best) * 1.01


def test_the_sums_leave_no_hook_and_the_factors_in_their_places(pico: Callable[..., Path]) -> None:
    with compressed_block(pico("llama", dtype=F64), "pivot") as (loaded, modules, batches):
        refit = Refit(loaded, list(modules), 1.0)
        dense, shifted, inputs = batches[0]
        with refit.dense():
            assert all(type(loaded.running(site.name)) is nn.Linear for site in modules)
            loaded.run(dense, inputs)
        with refit.compressed():
            assert all(loaded.running(site.name) is m for site, m in modules.items())
            loaded.run(shifted, inputs)

        for site, module in modules.items():
            assert loaded.running(site.name) is module
            for linear in (module, loaded.original(site.name)):
                assert not linear._forward_hooks and not linear._forward_pre_hooks
            refit.factors(site)
            with pytest.raises(KeyError):
                refit.factors(site)


# -- a whole job


@torch.no_grad()
@pytest.mark.parametrize("anchor", [1.0, 0.5])
@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_updated_factors_lose_less_on_the_compressed_stream(
    architecture: str,
    method: str,
    form: str,
    anchor: float,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    dense = pico(architecture, dtype=F64)
    settings: dict[str, Any] = {"method": method, "form": form, "ratio": 0.4, "batch": 3}
    compress(dense, tmp_path / "plain", text, **settings)
    compress(dense, tmp_path / "updated", text, update=True, anchor=anchor, **settings)

    plain, updated = products(tmp_path / "plain"), products(tmp_path / "updated")
    ranks = factored_modules(tmp_path / "plain")
    assert ranks == factored_modules(tmp_path / "updated")
    tokens = load_windows(dense, [str(text)], SMALL["samples"], SMALL["seq_len"], 0).tokens.long()
    whole, model = load_dense(dense), load_dense(dense)
    before, after = 0.0, 0.0
    for block in range(model.config.num_hidden_layers):
        names = {in_memory(model, n): n for n in plain if f"layers.{block}." in f".{n}"}
        for name, disk_name in names.items():
            model.get_submodule(name).weight.data = plain[disk_name]
        with inputs_of(model, list(names)) as seen:
            model(input_ids=tokens, use_cache=False)
        with inputs_of(whole, list(names)) as seen_dense:
            whole(input_ids=tokens, use_cache=False)
        for name, disk_name in names.items():
            weight, inputs = whole.get_submodule(name).weight, torch.cat(seen[name])
            wanted = anchor * torch.cat(seen_dense[name]) @ weight.T
            wanted += (1 - anchor) * inputs @ weight.T
            one = float((wanted - inputs @ plain[disk_name].T).square().sum())
            two = float((wanted - inputs @ updated[disk_name].T).square().sum())
            assert two <= one * (1 + 1e-6), name  # the ridge costs that where nothing is to gain
            before, after = before + one, after + two
            right = torch.linalg.svd(plain[disk_name]).Vh[: ranks[disk_name]["rank"]]
            best = torch.linalg.lstsq(inputs @ right.T, wanted, driver="gelsd").solution
            least = float((wanted - inputs @ right.T @ best).square().sum())
            assert least * (1 - 1e-9) <= two <= least * 1.02, name  # so much the ridge costs
            model.get_submodule(name).weight.data = updated[disk_name]
    assert after < before
