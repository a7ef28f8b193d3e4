"""Observing, updating and refining know sites alone: a kind that is new to them works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcomp.calibration.observe import MomentGroup, Observer, group_moments, observing_flops
from streamcomp.calibration.refine import TrainingData, refine_block
from streamcomp.calibration.refit import Refit, refit_bytes
from streamcomp.forms import find_form
from streamcomp.linalg.fitting import refit_left
from streamcomp.model.sites import Site
from streamcomp.model.streamer import BlockStreamer, LoadedBlock
from streamcomp.model.taps import LayerInputs
from tests.model.experts import CHOSEN, EXPERTS, ExpertSite, PartlyFactored, expert_sites, gated
from tests.model.folders import CPU, open_skeleton
from tests.pico import pico_tokens

F64 = torch.float64
Given = tuple[LoadedBlock, list[ExpertSite], BlockStreamer]


@pytest.fixture
def given(pico: Callable[..., Path]) -> Iterator[Given]:
    """Block 1 of a mixture, and the sites of its experts."""
    skeleton = open_skeleton(pico("mixtral", dtype=F64))
    skeleton.model.set_experts_implementation("eager")  # grouped products know no fp64
    streamer = BlockStreamer(skeleton, CPU)
    with streamer.block(1) as loaded:
        yield loaded, expert_sites(skeleton, 1), streamer


@contextmanager
def given_to_experts(loaded: LoadedBlock) -> Iterator[list[tuple[Tensor, ...]]]:
    """What the experts that run now are given: hidden states (T, n), indices and weights."""
    seen: list[tuple[Tensor, ...]] = []
    hook = loaded.running("mlp.experts").register_forward_pre_hook(
        lambda _, args: seen.append(tuple(arg.detach() for arg in args))
    )
    yield seen
    hook.remove()


def truncate(loaded: LoadedBlock, sites: list[ExpertSite], form: str) -> None:
    """The truncated SVD of half the rank instead of each weight."""
    for site in sites:
        weight, rank = site.weight(loaded), min(site.rows, site.columns) // 2
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        tensors = find_form(form)().encode(
            left[:, :rank], values[:rank, None] * right[:rank], weight.dtype
        )
        site.install(loaded, tensors, {"form": form, "rank": rank})


def streams(streamer: BlockStreamer, windows: int = 3) -> tuple[Tensor, Tensor, LayerInputs]:
    """A dense and a compressed stream in front of the block, and the block's call."""
    random = torch.Generator().manual_seed(0)
    dense, calls = streamer.capture(pico_tokens(windows, 16))
    noise = torch.randn(dense.shape, dtype=dense.dtype, generator=random)
    return dense, dense + 0.1 * dense.std() * noise, calls[1]


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_each_expert_is_observed_on_its_own_tokens(side: str, given: Given) -> None:
    loaded, sites, streamer = given
    hidden, _, call = streams(streamer)
    gradient = torch.randn(hidden.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    sizes = [site.columns if side == "inputs" else site.rows for site in sites]
    groups = [
        MomentGroup(side, size, (site,), gradients=True)  # type: ignore[arg-type]
        for size, site in zip(sizes, sites, strict=True)
    ]

    with Observer(loaded, groups, CPU) as observer, given_to_experts(loaded) as seen:
        loaded.differentiate(hidden, call, gradient)
    moments = {group.sites[0]: observer.take(group) for group in groups}
    gradients = {site: observer.take_gradient(site) for site in sites}

    inputs, outputs, backward = by_autograd(loaded, hidden, call, gradient)
    index = seen[0][1]
    assert sum(moments[site].rows for site in sites) == 2 * CHOSEN * len(index)
    for site in sites:
        key = site.expert, site.leaf
        rows = inputs[key] if side == "inputs" else outputs[key]
        assert moments[site].rows == int((index == site.expert).sum()) == len(rows)
        assert torch.allclose(moments[site].value, rows.T @ rows)
        back = backward[key]
        if site.rows > site.columns:
            back = back @ site.weight(loaded)
        assert torch.allclose(gradients[site].value, back.T @ back)
        assert gradients[site].energy == pytest.approx(float(backward[key].square().sum()))


def by_autograd(
    loaded: LoadedBlock, hidden: Tensor, call: LayerInputs, gradient: Tensor
) -> tuple[dict[Any, Tensor], dict[Any, Tensor], dict[Any, Tensor]]:
    """Inputs, outputs and outputs' gradients of each expert's weights, by one backward."""

    class Watched(PartlyFactored):
        def multiply(self, rows: Tensor, expert: int, leaf: str) -> Tensor:
            inputs[expert, leaf] = rows.detach()
            outputs[expert, leaf] = output = super().multiply(rows, expert, leaf)
            return output

    inputs: dict[Any, Tensor] = {}
    outputs: dict[Any, Tensor] = {}
    loaded.replace("mlp.experts", Watched(loaded.original("mlp.experts")))
    with torch.enable_grad():
        result = loaded.run_with({}, hidden.detach().requires_grad_(), call)
        backward = torch.autograd.grad(result, list(outputs.values()), gradient)
    loaded.restore()
    return (
        inputs,
        {key: value.detach() for key, value in outputs.items()},
        dict(zip(outputs, backward, strict=True)),
    )


def test_an_expert_that_no_token_reaches_says_nothing(given: Given) -> None:
    loaded, sites, streamer = given
    hidden, calls = streamer.capture(pico_tokens(1, 1))
    groups = group_moments(sites, (), gradients=True)

    with Observer(loaded, groups, CPU) as observer:
        loaded.differentiate(hidden, calls[1], torch.ones_like(hidden))

    empty = [observer.take(group).is_empty for group in groups]
    assert sum(empty) == 2 * (EXPERTS - CHOSEN)
    assert [observer.take_gradient(g.sites[0]).energy == 0 for g in groups] == empty


def test_sums_are_planned_for_the_tokens_that_are_expected(given: Given) -> None:
    _, sites, _ = given
    groups = group_moments(sites, (), gradients=True)

    assert {group.tokens(1000) for group in groups} == {500}
    assert observing_flops(groups, 1000)[0] < observing_flops(groups, 2000)[0]
    ranks: dict[Site, int] = {site: 8 for site in sites}
    one, two = (refit_bytes(ranks, F64, tokens)[1] for tokens in (1000, 2000))
    assert two - one == 8 * 500 * sum(site.rows for site in sites)


@pytest.mark.parametrize("anchor", [1.0, 0.5])
def test_left_factors_are_refitted_on_the_tokens_of_the_dense_block(
    anchor: float, given: Given
) -> None:
    loaded, sites, streamer = given
    dense, compressed, call = streams(streamer)
    truncate(loaded, sites, "uv")
    before = {site: site.factored(loaded).left_factor().detach() for site in sites}

    refit = Refit(loaded, sites, anchor)
    with refit.dense(), given_to_experts(loaded) as seen:
        loaded.run(dense, call)
    with refit.compressed(), given_to_experts(loaded) as seen_compressed:
        loaded.run(compressed, call)

    for site in sites:
        tokens = torch.where(seen[0][1] == site.expert)[0]
        rows, shifted = seen[0][0][tokens], seen_compressed[0][0][tokens]
        weight, right = site.weight(loaded), site.factored(loaded).weight
        if site.leaf == "down_proj":
            experts = loaded.original("mlp.experts")
            first = experts.get_parameter("gate_up_proj")[site.expert]
            rows = gated(experts, functional.linear(rows, first))
            running = loaded.running("mlp.experts")
            assert isinstance(running, PartlyFactored)
            shifted = gated(experts, running.multiply(shifted, site.expert, "gate_up_proj"))
        wanted = (anchor * rows + (1 - anchor) * shifted) @ weight.T
        low = shifted @ right.T
        left, kept = refit.factors(site)
        assert torch.equal(kept, right)
        expected = refit_left(wanted.T @ low, low.T @ low, towards=before[site])
        assert torch.allclose(left, expected, atol=1e-8)


@pytest.mark.parametrize("form", ["pivot", "uv"])
def test_experts_are_refined_with_the_block(form: str, given: Given) -> None:
    loaded, sites, streamer = given
    dense, compressed, call = streams(streamer, windows=11)
    target = loaded.run(dense, call)
    call = streamer.capture(pico_tokens(1, 16))[1][1]
    truncate(loaded, sites, form)
    running = loaded.running("mlp.experts")
    data = TrainingData(
        11, lambda w: compressed[w : w + 1], lambda w: target[w : w + 1], call, None
    )

    refined = refine_block(loaded, sites, data, 40, form=find_form(form)())

    assert refined.steps > 0 and refined.after < refined.before
    assert list(refined.tensors) == sites and loaded.running("mlp.experts") is running
    for site in sites:
        held = site.factored(loaded).tensors()
        assert refined.tensors[site].keys() == held.keys()
        site.install(loaded, refined.tensors[site], {"form": form, "rank": len(held["weight"])})
    again = refine_block(loaded, sites, data, 0, form=find_form(form)())
    assert again.before == pytest.approx(refined.after)


def test_the_dense_experts_come_back(given: Given) -> None:
    loaded, sites, streamer = given
    hidden, _, call = streams(streamer)
    dense = loaded.run(hidden, call)
    truncate(loaded, sites, "uv")

    assert not torch.allclose(loaded.run(hidden, call), dense)
    with loaded.dense():
        assert torch.equal(loaded.run(hidden, call), dense)
    loaded.restore()
    assert not any(isinstance(m, PartlyFactored) for m in loaded.module.modules())
    assert isinstance(loaded.running("mlp.experts"), nn.Module)
