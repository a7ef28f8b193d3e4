from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from streamcomp.errors import UnsupportedModelError
from streamcomp.model.feed_forward import in_chunks, whole
from streamcomp.model.streamer import BlockStreamer
from streamcomp.model.taps import LayerInputs
from streamcomp.model.tracing import BlockTrace, trace_block
from tests.model.folders import CPU, open_skeleton
from tests.pico import ARCHITECTURES, pico_tokens

DENSE = [name for name in ARCHITECTURES if name != "mixtral"]  # which routes in fp32


class Block(nn.Module):
    """A residual block around ``inner``, which notes the shapes that it is called with."""

    def __init__(self, inner: Callable[..., Any], **given: Any) -> None:
        super().__init__()
        self.mlp, self.given = Noting(inner), given

    def forward(self, hidden: Tensor) -> Any:
        output = self.mlp(hidden, **self.given)
        return hidden + (output[0] if isinstance(output, tuple) else output)


class Noting(nn.Module):
    def __init__(self, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.shapes = inner, list[tuple[int, ...]]()

    def forward(self, hidden: Tensor, **_: Any) -> Any:
        self.shapes.append(tuple(hidden.shape))
        return self.inner(hidden)


def through_blocks(folder: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states (3, 16, hidden) behind all blocks, and the gradient of their sum of squares."""
    streamer = BlockStreamer(open_skeleton(folder), CPU, tokens)
    hidden, layer_inputs = streamer.capture(pico_tokens())
    states = [hidden]
    for number, inputs in enumerate(layer_inputs):
        with streamer.block(number) as block:
            states.append(block.run(states[-1], inputs))
    gradient = 2 * states[-1]
    for number, inputs in reversed(list(enumerate(layer_inputs))):
        with streamer.block(number) as block:
            gradient = block.differentiate(states[number], inputs, gradient)
    return states[-1], gradient


@pytest.mark.parametrize("tokens", [1, 5, 8, 15])
@pytest.mark.parametrize("architecture", DENSE)
def test_chunks_change_neither_outputs_nor_gradients(
    architecture: str, tokens: int, pico: Callable[..., Path]
) -> None:
    folder = pico(architecture, dtype=torch.float64)

    output, gradient = through_blocks(folder, tokens)

    expected = through_blocks(folder, 0)
    assert torch.allclose(output, expected[0], rtol=1e-12, atol=1e-13)
    assert torch.allclose(gradient, expected[1], rtol=1e-12, atol=1e-13)


def test_experts_are_chosen_for_each_position_alone(pico: Callable[..., Path]) -> None:
    output, gradient = through_blocks(pico("mixtral"), 5)

    expected = through_blocks(pico("mixtral"), 0)
    assert torch.allclose(output, expected[0], atol=1e-5)
    assert torch.allclose(gradient, expected[1], atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 3, 4, 12, 20])
def test_as_many_positions_run_at_a_time_as_were_asked_for(tokens: int, random: Generator) -> None:
    block, hidden = Block(torch.sin), torch.randn(2, 12, 4, generator=random)

    with in_chunks(block, tokens):
        output = block(hidden)

    assert torch.equal(output, hidden + hidden.sin())
    size = min(tokens or 12, 12)
    assert block.mlp.shapes == [(2, min(size, 12 - start), 4) for start in range(0, 12, size)]


def test_it_is_whole_inside_and_behind(random: Generator) -> None:
    block, hidden = Block(torch.sin), torch.randn(2, 12, 4, generator=random)

    with in_chunks(block, 6):
        with whole(block):
            block(hidden)
        block(hidden)
    block(hidden)

    assert [shape[1] for shape in block.mlp.shapes] == [12, 6, 6, 12]


@pytest.mark.parametrize(
    ("inner", "given"),
    [(lambda x: (x.sin(), None), {}), (torch.sin, {"state": 1}), (torch.sin, {"flat": True})],
    ids=["two outputs", "an argument more", "flat"],
)
def test_what_is_more_than_hidden_states_runs_at_once(
    inner: Callable[..., Any], given: dict[str, Any], random: Generator
) -> None:
    flat = given.pop("flat", False)
    block, hidden = Block(inner, **given), torch.randn(2, 12, 4, generator=random)
    hidden = hidden[0] if flat else hidden

    with in_chunks(block, 6):
        output = block(hidden)

    assert torch.equal(output, hidden + hidden.sin())
    assert block.mlp.shapes[-1] == hidden.shape


def test_what_is_watched_is_never_seen_twice(random: Generator) -> None:
    block, hidden = Block(lambda x: (x.sin(), None)), torch.randn(2, 12, 4, generator=random)
    block.mlp.register_forward_pre_hook(lambda module, args: None)

    with in_chunks(block, 6), pytest.raises(UnsupportedModelError, match="allow more memory"):
        block(hidden)


def test_a_block_without_a_feed_forward_runs_as_ever(random: Generator) -> None:
    block, hidden = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 12, 4, generator=random)
    expected = block(hidden)

    with in_chunks(block, 6):
        assert torch.equal(block(hidden), expected)
        with whole(block):
            assert torch.equal(block(hidden), expected)


def test_less_is_alive_at_a_time() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=1024, num_attention_heads=2,
        num_hidden_layers=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("meta")
    hidden = torch.empty(1, 256, 64, device="meta")
    place = tuple(torch.zeros(1, 256, 32) for _ in range(2))
    inputs = LayerInputs((), {"position_embeddings": place})

    def traced(tokens: int) -> BlockTrace:
        found = trace_block(model.model.layers[0], [], hidden, inputs, tokens)
        assert found.exact
        return found

    once, few = traced(0), traced(32)
    widened = 4 * 256 * 1024  # of one linear, in fp32
    assert once.activation_bytes > 3 * widened
    assert few.activation_bytes < widened
    assert once.autograd_bytes > 4 * widened
    assert few.autograd_bytes < 2 * widened
    assert few.flops == once.flops
