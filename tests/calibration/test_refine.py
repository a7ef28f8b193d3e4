"""Refinement keeps what held-out windows say is best, the closed form among it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcomp.calibration.refine import TrainingData, refine_block
from streamcomp.forms import find_form
from streamcomp.forms.runtime import FactoredLinear
from streamcomp.linalg.low_rank import GRADIENT_DAMPING
from streamcomp.model.sites import LinearSite, find_sites
from streamcomp.model.streamer import BlockStreamer, LoadedBlock
from tests.jobs import compress, factored_modules, stored_tensors, varied_text
from tests.model.folders import CPU, open_skeleton
from tests.pico import HIDDEN, pico_tokens

WINDOWS = 11  # held out: 0 and 8
FORMS = ("pivot", "uv")


@dataclass
class Problem:
    """A block whose linears are factored, and what it is to be refined on."""

    loaded: LoadedBlock
    factored: dict[LinearSite, FactoredLinear]
    data: TrainingData

    def tensors(self) -> dict[LinearSite, dict[str, Tensor]]:
        """The factors that run in the block, by site and name, copied."""
        return {
            name: {
                leaf: value.detach().clone()
                for leaf, value in module.tensors().items()
                if leaf != "bias"
            }
            for name, module in self.factored.items()
        }

    def install(self, tensors: dict[LinearSite, dict[str, Tensor]]) -> None:
        for name, module in self.factored.items():
            held = module.tensors()
            for leaf, value in tensors[name].items():
                held[leaf].data = value.to(held[leaf].dtype)

    def disturb(self, share: float, seed: int = 0) -> None:
        """Add noise to every factor, relative to its own size."""
        random = torch.Generator().manual_seed(seed)
        for module in self.factored.values():
            for leaf, value in module.named_parameters():
                if leaf != "bias":
                    noise = torch.randn(value.shape, generator=random).to(value.dtype)
                    value.data = value + share * value.square().mean().sqrt() * noise

    def held_out_loss(self) -> float:
        """By its definition, of what runs in the block now."""
        losses = []
        for window in (0, 8):
            output = self.loaded.run(self.data.inputs(window), self.data.layer_inputs).double()[0]
            target = self.data.targets(window).double()[0]
            metrics = [torch.eye(HIDDEN, dtype=torch.float64)]
            if self.data.gradient is not None:
                wide = self.data.gradient.double()
                metrics.append(wide / wide.diagonal().mean() + GRADIENT_DAMPING * metrics[0])
            for metric in metrics:
                error, lengths = (
                    ((rows @ metric) * rows).sum(1) for rows in (output - target, target)
                )  # (seq,) each
                losses.append(float((error / lengths).mean()))
        return sum(losses) / len(losses)


@contextmanager
def problem(
    folder: Path,
    form: str = "pivot",
    *,
    windows: int = WINDOWS,
    weighted: bool = False,
    reachable: bool = False,
    streams_differ: bool = True,
) -> Iterator[Problem]:
    """Block 1; where its target is ``reachable``, the factors that it starts from reach it."""
    skeleton = open_skeleton(folder)
    streamer = BlockStreamer(skeleton, CPU)
    random = torch.Generator().manual_seed(0)
    dense, layer_inputs = streamer.capture(pico_tokens(windows, 16))
    one_window = streamer.capture(pico_tokens(1, 16))[1][1]
    noise = torch.randn(dense.shape, generator=random).to(dense.dtype)
    compressed = dense + 0.1 * dense.std() * noise if streams_differ else dense
    rows = torch.randn(64, HIDDEN, generator=random) * torch.logspace(0, -2, HIDDEN)
    with streamer.block(1) as loaded:
        target = loaded.run(dense, layer_inputs[1])
        sites = find_sites(skeleton, 1).linears
        modules = {site: install(loaded, site, form) for site in sites}
        if reachable:
            target = loaded.run(compressed, layer_inputs[1])
        data = TrainingData(
            windows,
            lambda w: compressed[w : w + 1],
            lambda w: target[w : w + 1],
            one_window,
            rows.T @ rows if weighted else None,
        )
        yield Problem(loaded, modules, data)


def install(loaded: LoadedBlock, site: LinearSite, form: str) -> FactoredLinear:
    """The truncated SVD of half the rank instead of the weight."""
    weight, rank = site.weight(loaded), min(site.rows, site.columns) // 2
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    tensors = find_form(form)().encode(
        left[:, :rank], values[:rank, None] * right[:rank], weight.dtype
    )
    site.install(loaded, tensors, {"form": form, "rank": rank})
    return site.factored(loaded)


def refine(given: Problem, steps: int, **settings: Any) -> Any:
    form = find_form(next(iter(given.factored.values())).form)()
    sites = list(given.factored)
    return refine_block(given.loaded, sites, given.data, steps, form=form, **settings)


def same(
    one: dict[LinearSite, dict[str, Tensor]], other: dict[LinearSite, dict[str, Tensor]]
) -> bool:
    assert one.keys() == other.keys()
    return all(
        one[name].keys() == other[name].keys()
        and all(
            torch.equal(one[name][leaf].float(), other[name][leaf].float()) for leaf in one[name]
        )
        for name in one
    )


# -- it never gets worse


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "opt"])
@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.1, 1.0])
def test_the_held_out_loss_is_the_least_of_those_measured(
    rate: float, architecture: str, form: str, weighted: bool, pico: Callable[..., Path]
) -> None:
    with problem(pico(architecture), form, weighted=weighted) as given:
        start, before = given.tensors(), given.held_out_loss()

        refined = refine(given, 8, rate=rate)

        assert refined.before == pytest.approx(before, rel=1e-4)
        assert refined.after <= refined.before
        assert refined.steps in (0, 2, 4, 6, 8)
        assert (refined.after < refined.before) == (refined.steps > 0)
        assert same(refined.tensors, start) == (refined.steps == 0)
        floats = [
            t for ts in refined.tensors.values() for t in ts.values() if t.dtype.is_floating_point
        ]
        assert all(t.dtype == torch.float32 for t in floats)
        assert same(given.tensors(), start)  # the block itself is not touched
        given.install(refined.tensors)
        assert given.held_out_loss() == pytest.approx(refined.after, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_no_steps_are_the_closed_form(form: str, pico: Callable[..., Path]) -> None:
    with problem(pico("llama"), form) as given:
        refined = refine(given, 0)

        assert refined.steps == 0
        assert refined.after == refined.before > 0
        assert same(refined.tensors, given.tensors())


@pytest.mark.parametrize("rate", [1e-3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_training_that_does_harm_is_thrown_away(
    form: str, weighted: bool, rate: float, pico: Callable[..., Path]
) -> None:
    with problem(pico("llama"), form, reachable=True, weighted=weighted) as given:
        refined = refine(given, 8, rate=rate)

        assert refined.steps == 0
        assert refined.after == refined.before < 1e-9  # nothing is left to gain
        assert same(refined.tensors, given.tensors())


@pytest.mark.parametrize("rate", [1e6, 1e38, math.inf, math.nan])
def test_training_that_leaves_the_numbers_is_thrown_away(
    rate: float, pico: Callable[..., Path]
) -> None:
    with problem(pico("llama")) as given:
        refined = refine(given, 8, rate=rate)

        assert refined.steps == 0
        assert refined.after == refined.before < math.inf
        assert same(refined.tensors, given.tensors())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("window", [0, 1])
def test_a_target_that_is_no_number_changes_nothing(
    window: int, value: float, pico: Callable[..., Path]
) -> None:
    """Whether it is held out (0) or trained on (1)."""
    with problem(pico("llama")) as given:
        targets = given.data.targets

        def damaged(w: int) -> Tensor:
            return torch.full_like(targets(w), value) if w == window else targets(w)

        given.data = replace(given.data, targets=damaged)
        refined = refine(given, 40)

        assert all(bool(t.isfinite().all()) for ts in refined.tensors.values() for t in ts.values())
        if window == 0:
            assert refined.steps == 0 and same(refined.tensors, given.tensors())
        else:
            assert refined.after <= refined.before < math.inf


def test_one_window_alone_cannot_be_judged(pico: Callable[..., Path]) -> None:
    with problem(pico("llama"), windows=1) as given:
        refined = refine(given, 8)

        assert refined.steps == 0
        assert same(refined.tensors, given.tensors())


def test_two_windows_are_enough(pico: Callable[..., Path]) -> None:
    with problem(pico("llama"), windows=2, reachable=True) as given:
        given.disturb(0.1)

        assert refine(given, 40).steps > 0


@pytest.mark.parametrize("gradient", ["zero", "one direction"])
def test_a_moment_of_few_gradients_is_damped(gradient: str, pico: Callable[..., Path]) -> None:
    with problem(pico("llama"), reachable=True) as given:
        moment = torch.zeros(HIDDEN, HIDDEN)
        if gradient == "one direction":
            moment[3, 3] = 7.0
        given.data = replace(given.data, gradient=moment)
        given.disturb(0.1)

        refined = refine(given, 40)

        assert refined.steps > 0
        assert refined.after < refined.before


# -- it gets better


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_disturbed_factors_are_led_back(
    architecture: str, form: str, weighted: bool, pico: Callable[..., Path]
) -> None:
    with problem(pico(architecture), form, reachable=True, weighted=weighted) as given:
        given.disturb(0.05)

        refined = refine(given, 200)

        assert refined.steps > 100
        assert refined.after < 0.5 * refined.before


@pytest.mark.parametrize("form", FORMS)
def test_factors_that_know_nothing_of_the_data_get_better(
    form: str, pico: Callable[..., Path]
) -> None:
    with problem(pico("llama"), form, streams_differ=False) as given:
        refined = refine(given, 100)

        assert refined.after < 0.95 * refined.before


@pytest.mark.parametrize("form", FORMS)
def test_it_works_on_the_metric_that_it_is_given(form: str, pico: Callable[..., Path]) -> None:
    found = {}
    for weighted in (False, True):
        with problem(pico("llama"), form, weighted=True) as given:
            moment = given.data.gradient
            given.data = replace(given.data, gradient=moment if weighted else None)
            refined = refine(given, 100)
            given.install(refined.tensors)
            for name, metric in (("weighted", moment), ("plain", None)):
                given.data = replace(given.data, gradient=metric)
                found[weighted, name] = given.held_out_loss()

    assert found[True, "weighted"] < found[False, "weighted"]
    assert found[False, "plain"] < found[True, "plain"]


# -- it can be repeated


def test_the_same_seed_gives_the_same_bits(pico: Callable[..., Path]) -> None:
    found: list[Any] = []
    for seed in (3, 3, 4):
        with problem(pico("llama"), reachable=True) as given:
            given.disturb(0.1)
            torch.manual_seed(len(found))  # whatever else drew numbers before
            found.append(refine(given, 12, seed=seed))

    assert found[0].steps > 0
    assert found[0].after == found[1].after
    assert same(found[0].tensors, found[1].tensors)
    assert not same(found[0].tensors, found[2].tensors)


def test_progress_is_told_for_every_step(pico: Callable[..., Path]) -> None:
    with problem(pico("llama")) as given:
        shares: list[float] = []
        refine(given, 5, progress=shares.append)

    assert shares == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_held_out_windows_are_never_trained_on(pico: Callable[..., Path]) -> None:
    with problem(pico("llama")) as given:
        read, inputs = [], given.data.inputs

        def watched(window: int) -> Tensor:
            read.append((window, torch.is_grad_enabled()))
            return inputs(window)

        given.data = replace(given.data, inputs=watched)
        refine(given, 20)

    counts = {window: sum(1 for w, _ in read if w == window) for window in range(WINDOWS)}
    # before, as two factors, four times on the way, and at the end what will be stored
    assert counts[0] == counts[8] == 1 + 1 + 4 + 1
    trained = [counts[w] for w in range(WINDOWS) if w not in (0, 8)]
    assert sum(trained) in (20, 40) and max(trained) - min(trained) <= 1


# -- in narrow dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_measured_is_what_is_stored(
    form: str, dtype: torch.dtype, pico: Callable[..., Path]
) -> None:
    with problem(pico("llama", dtype=dtype), form, weighted=True) as given:
        given.disturb(0.05)

        refined = refine(given, 40)

        assert refined.after < refined.before
        given.install(refined.tensors)  # rounded to the dtype of the block
        assert given.held_out_loss() == pytest.approx(refined.after, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_closed_form_that_stays_keeps_its_bits(
    form: str, dtype: torch.dtype, pico: Callable[..., Path]
) -> None:
    with problem(pico("llama", dtype=dtype), form) as given:
        start = given.tensors()
        refined = refine(given, 0)

    for name, tensors in start.items():
        for leaf, value in tensors.items():
            assert torch.equal(refined.tensors[name][leaf].to(dtype), value)


# -- a whole job


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "calibration.txt", 20_000)


@pytest.mark.parametrize("rate", [1e-3, 1.0])
@pytest.mark.parametrize("method", ["two-sided", "svd-llm"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_a_job_stores_the_closed_form_or_what_was_measured_to_be_better(
    dtype: torch.dtype,
    method: str,
    rate: float,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    dense = pico("llama", dtype=dtype)
    settings: dict[str, Any] = {"method": method, "samples": 64, "ratio": 0.4}

    compress(dense, tmp_path / "plain", text, **settings)
    report = compress(dense, tmp_path / "refined", text, refine=40, rate=rate, **settings).report

    plain, refined = (stored_tensors(tmp_path / name) for name in ("plain", "refined"))
    found = {item["block"]: item for item in report["refined"]}
    assert factored_modules(tmp_path / "plain") == factored_modules(tmp_path / "refined")
    assert plain.keys() == refined.keys() and list(found) == [0, 1]
    for block, result in found.items():
        assert (result["after"] < result["before"]) == (result["steps"] > 0)
        for name in (name for name in plain if f"layers.{block}." in name):
            assert plain[name].dtype == refined[name].dtype
            trained = name.rpartition(".")[0] in factored_modules(tmp_path / "plain")
            if not trained or result["steps"] == 0:
                assert torch.equal(plain[name], refined[name]), name
    steps = [result["steps"] for result in found.values()]
    assert steps == [0, 0] if rate == 1 else max(steps) > 0
