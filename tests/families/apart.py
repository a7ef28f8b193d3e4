"""A model run block by block with the experts of each block one by one, as jobs run them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.routing import Routing
from streamcomp.model.experts import ExpertBank, find_bank
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.streamer import BlockStreamer
from streamcomp.model.taps import LayerInputs
from tests.model.folders import CPU, open_skeleton

__all__ = ["banks_of", "run_apart"]


def banks_of(skeleton: Skeleton) -> dict[int, ExpertBank]:
    """The experts that can be run one by one, by the number of their block."""
    banks = {number: find_bank(skeleton, number)[0] for number in range(len(skeleton))}
    return {number: bank for number, bank in banks.items() if bank is not None}


def run_apart(
    folder: Path, tokens: Tensor, loss: Callable[[Tensor, Tensor], Tensor], scratch: Path
) -> tuple[Tensor, Tensor]:
    """Logits of ``tokens``, and the gradient of ``loss`` at the first block's input."""
    skeleton = open_skeleton(folder)
    streamer, banks = BlockStreamer(skeleton, CPU), banks_of(skeleton)
    hidden, layer_inputs = streamer.capture(tokens)
    windows, seq_len, size = hidden.shape
    stream = StreamShape(windows, seq_len, size, hidden.dtype)
    states, routings = [hidden], dict[int, Routing]()
    with ExitStack() as stack:
        for number, inputs in enumerate(layer_inputs):
            bank = banks.get(number)
            if bank is not None:
                routing = stack.enter_context(Routing(bank, stream, hidden.dtype, scratch))
                routings[number] = routing
            states.append(_forward(streamer, number, routings.get(number), states[-1], inputs))
        last = states[-1].detach().requires_grad_()
        with streamer.head() as head:
            logits = head(last)
            gradient = torch.autograd.grad(loss(logits, tokens), last)[0]
        for number in reversed(range(len(skeleton))):
            given = states[number], layer_inputs[number], gradient
            gradient = _backward(streamer, number, routings.get(number), *given)
    return logits.detach(), gradient


def _forward(
    streamer: BlockStreamer,
    number: int,
    routing: Routing | None,
    hidden: Tensor,
    inputs: LayerInputs,
) -> Tensor:
    if routing is None:
        with streamer.block(number) as block:
            return block.run(hidden, inputs)
    with streamer.block(number, routing.bank) as block:
        routing.capture(block, 0, hidden, inputs)
        _each(streamer, routing.bank, routing.forward)
        with routing.replayed(block, 0, len(hidden)):
            return block.run(hidden, inputs)


def _backward(
    streamer: BlockStreamer,
    number: int,
    routing: Routing | None,
    hidden: Tensor,
    inputs: LayerInputs,
    gradient: Tensor,
) -> Tensor:
    if routing is None:
        with streamer.block(number) as block:
            return block.differentiate(hidden, inputs, gradient)
    with streamer.block(number, routing.bank) as block:
        routing.descend(block, 0, hidden, inputs, gradient)
        _each(streamer, routing.bank, routing.differentiate)
        with routing.replayed(block, 0, len(hidden)):
            return block.differentiate(hidden, inputs, gradient)


def _each(streamer: BlockStreamer, bank: ExpertBank, run: Callable[[Any, int], None]) -> None:
    for number in range(bank.count):
        with streamer.experts(bank, number, number + 1) as experts:
            run(experts, number)
