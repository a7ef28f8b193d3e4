"""What the sweeps leave behind is what autograd finds on the whole model, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import streamcomp
from streamcomp import CompressResult, Resources
from streamcomp.calibration.corpus import load_windows
from streamcomp.calibration.hidden_states import HiddenStates, StreamShape
from streamcomp.job.block_plan import BlockPlan, plan_blocks
from streamcomp.job.folders import WORK_FOLDER
from streamcomp.job.journal import Journal
from streamcomp.job.kept import read_moment, read_output_gradient
from streamcomp.job.ledger import Ledger
from streamcomp.linalg.low_rank import GRADIENT_DAMPING
from streamcomp.methods import Moment
from streamcomp.model.sites import Site
from streamcomp.model.skeleton import Skeleton
from tests.jobs import (
    BUDGET,
    SMALL,
    Interrupt,
    Interrupted,
    factored_modules,
    load_dense,
    products,
    quick_plan,
    set_levers,
    small_recipe,
)
from tests.model.folders import CPU, open_skeleton, save_edited
from tests.pico import HIDDEN, UNUSUAL

F64 = torch.float64
# Biases, soft-capped logits and attention, tied embeddings, norms behind, other block layouts.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie": True}),
    ("qwen2", {}),
    ("gemma2", {"tie": True}),
    ("opt", {}),
    ("gpt_neox", {}),
    ("phi3", {}),
]
NAMES = ["-".join([name, *settings]) for name, settings in MODELS]
# Norms run in fp32 whatever the model's dtype is, in the same order in both.
TOLERANCE = 1e-9


@dataclass
class Flow:
    """What flowed through one module: (T, ...), fp64."""

    inputs: Tensor
    gradient: Tensor  # of its output
    input_gradient: Tensor


def whole_flows(folder: Path, text: Path) -> tuple[dict[str, Flow], list[Flow], float]:
    """Of every linear by name and every block of the whole model, and the loss over all tokens."""
    tokens = tokens_of(folder, text)
    model = load_dense(folder)
    layers = next(
        module
        for _, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    watched: dict[nn.Module, list[Tensor]] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = out[0] if isinstance(out, tuple) else out
        for tensor in (given, made):
            tensor.retain_grad()
        watched[module] = [given, made]

    linears = {n: m for n, m in layers.named_modules() if type(m) is nn.Linear}
    for module in (*linears.values(), *layers):
        module.register_forward_hook(watch, with_kwargs=True)
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()

    def flow(module: nn.Module) -> Flow:
        given, made = watched[module]
        assert made.grad is not None and given.grad is not None
        given_rows, *gradients = (
            tensor.detach().double().flatten(0, -2) for tensor in (given, made.grad, given.grad)
        )
        return Flow(given_rows, *gradients)

    prefix = next(name for name, module in model.named_modules() if module is layers)
    found = {f"{prefix}.{n}": flow(m) for n, m in linears.items() if m in watched}
    return found, [flow(layer) for layer in layers], float(loss.detach())


def tokens_of(folder: Path, text: Path) -> Tensor:
    return load_windows(folder, [str(text)], SMALL["samples"], SMALL["seq_len"], 0).tokens.long()


def run(
    folder: Path,
    out: Path,
    text: Path,
    *,
    levers: dict[str, int] | None = None,
    progress: Any = None,
    **settings: Any,
) -> CompressResult:
    """A two-sided job that keeps its work, with other ``levers`` than would be chosen."""
    resources = Resources(BUDGET, threads=1, keep_work=True)
    recipe = small_recipe(text, **{"ratio": 0.4, **settings})
    with quick_plan(), set_levers(**(levers or {})):
        return streamcomp.compress(folder, out, recipe, resources, progress=progress)


def block_plans(folder: Path, text: Path, **settings: Any) -> list[BlockPlan]:
    shape = StreamShape(SMALL["samples"], SMALL["seq_len"], HIDDEN, F64)
    return plan_blocks(open_skeleton(folder), small_recipe(text, **settings), shape)


def ledger_of(out: Path) -> Ledger:
    """What a job has kept."""
    journal = Journal.read(out / WORK_FOLDER)
    assert journal is not None
    return Ledger(out / WORK_FOLDER, journal)


def kept_moments(folder: Path, out: Path, text: Path) -> dict[str, tuple[Site, Moment]]:
    return {
        linear.full_name: (
            linear,
            read_moment(ledger_of(out), block.number, group, linear, CPU),
        )
        for block in block_plans(folder, text)
        for group in block.groups
        for linear in group.sites
    }


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((found.double() - expected).norm() <= tolerance * expected.norm())


def check_moments(folder: Path, out: Path, text: Path, tolerance: float = TOLERANCE) -> None:
    """Every kept moment against those of the whole model."""
    flows, blocks, _ = whole_flows(folder, text)
    weights = dict(load_dense(folder).named_parameters())
    kept = kept_moments(folder, out, text)
    assert kept
    for name, (linear, moment) in kept.items():
        flow, weight = flows[name], weights[f"{name}.weight"].detach().double()
        rows = flow.inputs if moment.side == "inputs" else flow.inputs @ weight.T
        assert moment.rows == len(rows)
        assert close(moment.value, rows.T @ rows, tolerance), name
        assert moment.gradient is not None
        gradient = flow.gradient
        assert moment.gradient.energy == pytest.approx(
            float(gradient.square().sum()), rel=tolerance
        )
        own = gradient @ weight if linear.rows > linear.columns else gradient
        assert moment.gradient.value.shape == (min(linear.rows, linear.columns),) * 2
        assert close(moment.gradient.value, own.T @ own, tolerance), name
    for number, block in enumerate(blocks):
        found = read_output_gradient(ledger_of(out), number, CPU)
        assert close(found, block.gradient.T @ block.gradient, tolerance)


@pytest.mark.parametrize(("architecture", "settings"), MODELS, ids=NAMES)
def test_moments_are_those_of_the_whole_model(
    architecture: str,
    settings: dict[str, Any],
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    folder = pico(architecture, dtype=F64, **settings)

    run(folder, tmp_path / "out", text)

    check_moments(folder, tmp_path / "out", text)


def test_they_are_where_experts_are_no_linears(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("mixtral")  # torch multiplies groups in fp32 at most

    run(folder, tmp_path / "out", text)

    check_moments(folder, tmp_path / "out", text, 1e-4)


@pytest.mark.parametrize(
    "levers",
    [
        {"batch": 1, "reverse_batch": 1, "head_tokens": 1},
        {"batch": 4, "reverse_batch": 3, "head_tokens": 7},
        {"batch": 3, "reverse_batch": 4, "head_tokens": 15},
        {"head_tokens": 16},
        {"groups": 1},
        {"groups": 4, "batch": 3},
        {"feed_forward_tokens": 5},
        {"feed_forward_tokens": 1, "batch": 3, "reverse_batch": 4, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_they_do_not_depend_on_what_runs_at_a_time(
    architecture: str, levers: dict[str, int], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico(architecture, dtype=F64)

    run(folder, tmp_path / "out", text, levers=levers)

    check_moments(folder, tmp_path / "out", text)


@pytest.mark.parametrize("every", [2, 3, 5, 7])
def test_they_do_not_depend_on_how_many_states_are_stored(
    every: int, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("gemma2", dtype=F64, blocks=5)

    run(folder, tmp_path / "out", text, store_every=every)

    check_moments(folder, tmp_path / "out", text)


@pytest.mark.parametrize("blocks", ["first:2", "last:2", "1-3"])
def test_they_do_not_depend_on_which_blocks_are_compressed(
    blocks: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("llama", dtype=F64, blocks=5)

    run(folder, tmp_path / "out", text, blocks=blocks, store_every=2, ratio=0.1)

    flows, _, _ = whole_flows(folder, text)
    found = 0
    for block in block_plans(folder, text, blocks=blocks):
        for group in block.groups:
            for linear in group.sites:
                moment = read_moment(ledger_of(tmp_path / "out"), block.number, group, linear, CPU)
                assert moment.gradient is not None
                energy = float(flows[linear.full_name].gradient.square().sum())
                assert moment.gradient.energy == pytest.approx(energy, rel=TOLERANCE)
                found += 1
    assert found == 7 * {"first:2": 2, "last:2": 2, "1-3": 3}[blocks]


@pytest.mark.parametrize("head_tokens", [1, 4, 16])
@pytest.mark.parametrize(("architecture", "settings"), MODELS, ids=NAMES)
def test_the_gradient_of_the_loss_enters_behind_the_last_block(
    architecture: str,
    settings: dict[str, Any],
    head_tokens: int,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    folder, out = pico(architecture, dtype=F64, **settings), tmp_path / "out"

    with pytest.raises(Interrupted, match="gradient of the loss"):
        levers = {"head_tokens": head_tokens}
        run(folder, out, text, levers=levers, progress=Interrupt(after=4))

    _, blocks, _ = whole_flows(folder, text)
    found = read_stream(out, "gradient-00002")
    assert close(found.flatten(0, 1), blocks[-1].gradient)
    assert not found[:, -1].any()  # nothing is predicted from the last position


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_gradients_between_blocks_are_those_of_the_whole_model(
    architecture: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder, out = pico(architecture, dtype=F64, blocks=4), tmp_path / "out"
    _, blocks, _ = whole_flows(folder, text)

    for step, number in ((7, 3), (8, 2), (9, 1)):
        with pytest.raises(Interrupted, match=f"reverse {number}"):
            run(folder, out, text, levers={"reverse_batch": 3}, progress=Interrupt(after=step))

        gradient = read_stream(out, f"gradient-{number:05d}").flatten(0, 1)
        assert close(gradient, blocks[number - 1].gradient)
        assert close(gradient, blocks[number].input_gradient)


def read_stream(out: Path, key: str) -> Tensor:
    shape = StreamShape(SMALL["samples"], SMALL["seq_len"], HIDDEN, F64)
    states = HiddenStates(out / WORK_FOLDER / f"{key}.bin", shape)
    states.open()
    try:
        return states.read(0, shape.windows)
    finally:
        states.close()


# -- factors


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    raised: Tensor = (vectors * values**exponent) @ vectors.T
    return raised


def textbook(weight: Tensor, inputs: Tensor, gradients: Tensor, rank: int) -> Tensor:
    """W' by the SVD of Gamma^1/2 W H^1/2 and both inverses."""
    whitened = power(gradients, 0.5) @ weight @ power(inputs, 0.5)
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    cut: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return power(gradients, -0.5) @ cut @ power(inputs, -0.5)


@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize(("architecture", "settings"), MODELS, ids=NAMES)
def test_factors_are_those_that_moments_of_the_whole_model_lead_to(
    architecture: str,
    settings: dict[str, Any],
    form: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    folder, out = pico(architecture, dtype=F64, **settings), tmp_path / "out"

    report = run(folder, out, text, form=form).report

    flows, _, _ = whole_flows(folder, text)
    weights = dict(load_dense(folder).named_parameters())
    linears = {m.disk_name: m.full_name for m, _ in kept_moments(folder, out, text).values()}
    stored, ranks = products(out), factored_modules(out)
    losses = {item["name"]: item for item in report["linears"]}
    assert stored and losses.keys() == stored.keys()
    for name, found in stored.items():
        weight, flow = weights[f"{linears[name]}.weight"].detach(), flows[linears[name]]
        inputs, gradients = flow.inputs.T @ flow.inputs, flow.gradient.T @ flow.gradient
        gradients.diagonal().add_(GRADIENT_DAMPING * gradients.diagonal().mean())
        if inputs.diagonal().all():  # behind a ReLU some channels are never used
            expected = textbook(weight, inputs, gradients, ranks[name]["rank"])
            assert close(found, expected, 1e-6), name
        for key, error in (("loss", weight - found), ("energy", weight)):
            lost = float((gradients @ error @ inputs @ error.T).trace())
            assert losses[name][key] == pytest.approx(lost, rel=1e-6), (name, key)


def test_the_loss_that_is_reported_is_that_of_the_whole_model(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = pico("qwen2", dtype=F64)

    report = run(folder, tmp_path / "out", text).report

    _, _, loss = whole_flows(folder, text)
    (step,) = [step for step in report["steps"] if step["step"] == "gradient of the loss"]
    tokens = SMALL["samples"] * (SMALL["seq_len"] - 1)
    assert step["nll"] == pytest.approx(loss / tokens, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("architecture", UNUSUAL)
def test_what_no_checkpoint_holds_stays_as_it_is(
    architecture: str,
    dtype: torch.dtype,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    """Tables that blocks make for themselves: they serve every sweep, and none may round them."""
    folder, opened = pico(architecture, dtype=dtype), []

    def remembered(*given: Any) -> Skeleton:
        opened.append(Skeleton(*given))
        return opened[-1]

    with mock.patch("streamcomp.job.run.Skeleton", remembered):
        run(folder, tmp_path / "out", text, refine=2)

    expected = open_skeleton(folder)
    for number in range(2):
        tables = dict(expected.block(number).named_buffers())
        found = dict(opened[0].block(number).named_buffers())
        assert tables and found.keys() == tables.keys()
        for name, table in tables.items():
            assert found[name].dtype == table.dtype and torch.equal(found[name], table), name


@pytest.mark.parametrize("settings", [{}, {"update": True}, {"refine": 4}], ids=str)
@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("zero", ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj", "mlp"])
def test_linears_that_put_out_nothing_or_that_no_gradient_reaches_are_survived(
    zero: str, form: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """A branch of zeros, as depth pruning leaves it: what lies before it gets no gradient."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if f"layers.1.{zero}" in name and name.endswith("weight"):
                tensors[name] = torch.zeros_like(tensors[name])

    folder, out = save_edited(tmp_path / "model", change, dtype=F64), tmp_path / "out"

    report = run(folder, out, text, form=form, allocation="uniform", **settings).report

    found = {m["name"].partition("layers.1.")[2]: m for m in report["linears"]}
    unreached = {name for name, m in found.items() if m["fallback"]}
    expected = {
        "mlp.down_proj": {"mlp.gate_proj", "mlp.up_proj"},
        "mlp.up_proj": {"mlp.gate_proj"},
        "self_attn.q_proj": {"self_attn.k_proj"},
        "mlp": {"mlp.gate_proj", "mlp.up_proj"},
    }[zero]
    assert unreached == expected
    assert all(found[name]["energy"] == 0 for name in unreached)
    assert any("no gradient arrives" in note for note in report["notes"])
    for name, weight in products(out).items():
        assert weight.isfinite().all(), name
        if f"layers.1.{zero}" in name and "refine" not in settings:
            assert not weight.any(), name
