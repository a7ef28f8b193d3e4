from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from streamcomp.calibration.observe import MomentGroup, Observer, group_moments
from streamcomp.checkpoint.index import TensorInfo
from streamcomp.errors import NonFiniteError
from streamcomp.linalg.dtypes import moment_dtype
from streamcomp.model.sites import LinearSite, find_sites
from streamcomp.model.streamer import BlockStreamer, LoadedBlock
from streamcomp.model.tracing import trace_block
from tests.model.folders import CPU, open_skeleton
from tests.pico import ARCHITECTURES, pico_tokens


def linear(name: str, rows: int, columns: int) -> LinearSite:
    source = TensorInfo(f"{name}.weight", "F32", (rows, columns), Path("x"), 0, 4 * rows * columns)
    return LinearSite(name, f"block.{name}", rows, columns, source)


def captured(
    folder: Path, side: str | None = None
) -> list[tuple[MomentGroup[LinearSite], Tensor, Tensor, Tensor]]:
    """Per moment of block 1: its group, its value, and the linear's inputs and outputs (T, ...).

    ``side`` overrules what is chosen by size.
    """
    skeleton = open_skeleton(folder)
    streamer = BlockStreamer(skeleton, CPU)
    linears = find_sites(skeleton, 1).linears
    block = skeleton.block(1)
    hidden, layer_inputs = skeleton.dry_capture(1, 8)
    shared = trace_block(block, linears, hidden, layer_inputs[1]).groups
    groups = group_moments(linears, shared)
    if side == "outputs":
        groups = tuple(MomentGroup("outputs", one.rows, (one,)) for one in linears)
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def watch(name: str) -> None:
        inputs, outputs = seen.setdefault(name, ([], []))

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(args[0].flatten(0, -2).clone())
            outputs.append(output.flatten(0, -2).clone())

        block.get_submodule(name).register_forward_hook(hook)

    for one in linears:
        watch(one.name)
    with streamer.block(1) as loaded, Observer(loaded, groups, CPU) as observer:
        for seed in range(3):
            hidden, layer_inputs = streamer.capture(pico_tokens(seed=seed))
            loaded.run(hidden, layer_inputs[1])
        return [
            (
                group,
                observer.take(group).value,
                torch.cat(seen[group.sites[0].name][0]),
                torch.cat(seen[group.sites[0].name][1]),
            )
            for group in groups
        ]


def close(moment: Tensor, rows: Tensor) -> bool:
    expected = rows.double().T @ rows.double()
    return bool((moment.double() - expected).abs().max() < 1e-4 * expected.diagonal().max())


# -- observing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_are_those_of_what_flows_through_the_linears(
    architecture: str, pico: Callable[..., Path]
) -> None:
    found = captured(pico(architecture))

    assert {group.side for group, *_ in found} <= {"inputs", "outputs"}
    for group, moment, inputs, _ in found:
        assert len(inputs) == 3 * 3 * 16
        assert moment.shape == (group.size, group.size)
        if group.side == "inputs":
            assert close(moment, inputs)


def test_linears_that_share_a_moment_were_fed_the_same(pico: Callable[..., Path]) -> None:
    found = captured(pico("llama"))

    sharing = [{one.name for one in group.sites} for group, *_ in found if group.side == "inputs"]
    assert {"mlp.gate_proj", "mlp.up_proj"} in sharing


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_a_moment_of_outputs_is_without_bias(architecture: str, pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico(architecture))
    streamer = BlockStreamer(skeleton, CPU)
    with streamer.block(1) as block:
        weights = {n: p.detach().clone() for n, p in block.module.named_parameters()}

    for group, moment, inputs, outputs in captured(pico(architecture), "outputs"):
        (one,) = group.sites
        assert close(moment, inputs @ weights[f"{one.name}.weight"].T)
        if f"{one.name}.bias" in weights:
            assert not close(moment, outputs)


def test_half_precision_is_observed_in_fp32(pico: Callable[..., Path]) -> None:
    for group, moment, inputs, outputs in captured(pico("llama", dtype=torch.bfloat16)):
        assert moment.dtype == torch.float32
        assert close(moment, inputs if group.side == "inputs" else outputs)


def test_only_a_model_in_fp64_has_moments_in_fp64() -> None:
    assert moment_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert moment_dtype(dtype) == torch.float32


def test_observing_ends_with_the_context(random: Generator) -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    (group,) = group_moments([linear("0", 4, 4)], [])

    with Observer(LoadedBlock(block, "block"), [group], CPU) as observer:
        block(torch.ones(1, 4))
    block(torch.full((1, 4), 7.0))

    assert torch.equal(observer.take(group).value, torch.ones(4, 4))
    assert not block[0]._forward_hooks and not block[0]._forward_pre_hooks


def test_a_moment_taken_is_forgotten() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    (group,) = group_moments([linear("0", 4, 4)], [])

    with Observer(LoadedBlock(block, "block"), [group], CPU) as observer:
        observer.take(group)
        with pytest.raises(KeyError):
            observer.take(group)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_named(side: str, value: float) -> None:
    only = nn.Linear(4, 4)
    nn.init.eye_(only.weight)
    block = nn.Sequential(only)
    group = MomentGroup(side, 4, (linear("0", 4, 4),))  # type: ignore[arg-type]
    hidden = torch.zeros(3, 4)
    hidden[1, 2] = value

    with Observer(LoadedBlock(block, "model.layers.7"), [group], CPU) as observer:
        block(hidden)
        with pytest.raises(NonFiniteError, match=rf"model\.layers\.7\.0: its {side} are NaN"):
            observer.take(group)


# -- grouping


def test_linears_with_one_input_share_its_moment() -> None:
    gate, up, down = linear("gate", 96, 32), linear("up", 96, 32), linear("down", 32, 96)

    groups = group_moments([gate, up, down], [("gate", "up"), ("down",)])

    assert groups == (  # those of outputs first
        MomentGroup("outputs", 32, (down,)),
        MomentGroup("inputs", 32, (gate, up)),
    )


@pytest.mark.parametrize(
    ("tokens", "side"),
    [(0, "inputs"), (4 * 3 * 3 * 32 // 2 - 1, "outputs"), (4 * 3 * 3 * 32 // 2, "inputs")],
)
def test_outputs_are_observed_where_that_takes_less_time(tokens: int, side: str) -> None:
    # two more moments of 32 x 32 for each token, against three W H W^T of 3 x 32^3 operations, each
    # of which takes as long as four of a moment
    three = [linear(name, 32, 32) for name in "qkv"]

    groups = group_moments(three, ["qkv"], tokens=tokens)

    assert {group.side for group in groups} == {side}


def test_outputs_larger_than_the_inputs_are_never_observed() -> None:
    tall = linear("up", 96, 32)

    assert group_moments([tall], [], tokens=1) == (MomentGroup("inputs", 32, (tall,)),)


def test_linears_not_said_to_share_have_a_moment_each() -> None:
    gate, up = linear("gate", 96, 32), linear("up", 96, 32)

    assert {group.sites for group in group_moments([gate, up], [])} == {(gate,), (up,)}


def test_names_that_are_not_eligible_are_passed_over() -> None:
    query = linear("q", 32, 32)

    groups = group_moments([query], [("q", "k", "v"), ("router",)])

    assert groups == (MomentGroup("inputs", 32, (query,)),)


@pytest.mark.parametrize("rows", list(itertools.product((8, 16, 24, 32, 40), repeat=3)))
def test_the_moments_take_the_fewest_bytes(rows: tuple[int, ...]) -> None:
    columns = 32
    linears = [linear(name, m, columns) for name, m in zip("qkv", rows, strict=True)]
    options = [columns * columns]  # one moment of the inputs
    if max(rows) <= columns:  # or one each of the outputs
        options.append(sum(m * m for m in rows))

    groups = group_moments(linears, ["qkv"])

    assert sum(group.nbytes(torch.bfloat16) for group in groups) == 4 * min(options)
    assert sorted(one.name for group in groups for one in group.sites) == list("kqv")
    for group in groups:
        for one in group.sites:
            assert group.size == (one.columns if group.side == "inputs" else one.rows)
            assert group.side == "inputs" or one.rows <= one.columns
