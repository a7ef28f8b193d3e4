from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamcomp.model.sites import find_sites
from streamcomp.model.tracing import BlockTrace, trace_block
from tests.model.folders import open_skeleton
from tests.pico import ARCHITECTURES

TRACEABLE = [name for name in ARCHITECTURES if name != "mixtral"]


def trace(folder: Path, batch: int, seq_len: int = 32) -> BlockTrace:
    skeleton = open_skeleton(folder)
    block = skeleton.block(0)
    hidden, layer_inputs = skeleton.dry_capture(batch, seq_len)
    return trace_block(block, find_sites(skeleton, 0).linears, hidden, layer_inputs[0])


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        (
            "llama",
            (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            ),
        ),
        (
            "phi3",
            (
                ("self_attn.qkv_proj",),
                ("self_attn.o_proj",),
                ("mlp.gate_up_proj",),
                ("mlp.down_proj",),
            ),
        ),
        (
            "opt",
            (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.out_proj",),
                ("fc1",),
                ("fc2",),
            ),
        ),
    ],
)
def test_linears_fed_the_same_tensor_are_grouped(
    architecture: str, groups: tuple[tuple[str, ...], ...], pico: Callable[..., Path]
) -> None:
    result = trace(pico(architecture), 2)

    assert result.exact
    assert tuple(tuple(sorted(g)) for g in result.groups) == tuple(tuple(sorted(g)) for g in groups)


@pytest.mark.parametrize("architecture", TRACEABLE)
def test_bytes_and_operations_grow_with_the_batch(
    architecture: str, pico: Callable[..., Path]
) -> None:
    folder = pico(architecture)
    one, two, four = (trace(folder, batch) for batch in (1, 2, 4))

    assert one.exact and two.exact and four.exact
    assert four.flops == 2 * two.flops == 4 * one.flops > 0
    per_window = two.activation_bytes - one.activation_bytes
    assert per_window > 0
    assert four.activation_bytes - two.activation_bytes == 2 * per_window


@pytest.mark.parametrize("architecture", TRACEABLE)
def test_every_linear_is_in_one_group(architecture: str, pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico(architecture))

    names = [name for group in trace(pico(architecture), 1).groups for name in group]

    assert sorted(names) == sorted(linear.name for linear in find_sites(skeleton, 0).linears)


def test_bytes_alive_are_at_least_those_no_run_can_do_without(pico: Callable[..., Path]) -> None:
    tokens = 2 * 32
    # The residual, and the outputs of gate and up together.
    least = tokens * (32 + 48 + 48) * 4

    assert least <= trace(pico("llama"), 2).activation_bytes < 4 * least


def test_operations_are_at_least_those_of_the_linears(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))
    numbers = sum(linear.numel for linear in find_sites(skeleton, 0).linears)

    assert 2 * 64 * numbers <= trace(pico("llama"), 2).flops < 4 * 64 * numbers


def test_half_precision_needs_half_of_the_bytes(pico: Callable[..., Path]) -> None:
    wide, narrow = (trace(pico("opt", dtype=dtype), 2) for dtype in (torch.float32, torch.bfloat16))

    assert narrow.flops == wide.flops
    assert 0.4 * wide.activation_bytes < narrow.activation_bytes < 0.8 * wide.activation_bytes


def test_a_block_whose_code_depends_on_data_is_estimated(pico: Callable[..., Path]) -> None:
    result = trace(pico("mixtral"), 2)

    assert not result.exact
    assert {len(group) for group in result.groups} == {1}
    assert len(result.groups) == 4
    assert result.activation_bytes > 2 * 32 * 32 * 4
    assert result.flops > 0


def test_tracing_touches_no_weight_and_leaves_no_hook(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))
    block = skeleton.block(0)
    hidden, layer_inputs = skeleton.dry_capture(1, 8)

    trace_block(block, find_sites(skeleton, 0).linears, hidden, layer_inputs[0])

    assert all(value.is_meta for value in block.parameters())
    assert not any(module._forward_pre_hooks for module in block.modules())
