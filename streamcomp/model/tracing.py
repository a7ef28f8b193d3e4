"""Trace of a block's forward, without weights and without computing.

The block runs on fake tensors: shapes, dtypes and the choice of kernels are real, but there
is no data. One such forward tells which linears are called, which sites are fed the same tensor,
how many bytes are alive at the peak, and how many floating-point operations it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from streamcomp.errors import UnsupportedModelError
from streamcomp.memory_errors import lacks_memory
from streamcomp.model.experts import ExpertBank, answering, expert_modules
from streamcomp.model.feed_forward import in_chunks
from streamcomp.model.sites import LinearSite, linear_modules
from streamcomp.model.taps import LayerInputs, Returned, hidden_of, input_bytes, is_state

__all__ = ["BlockTrace", "BlockUse", "CaptureTrace", "trace_block", "trace_capture", "use_of_block"]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The CPU's attention kernel, which torch's counter of operations does not know.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class BlockTrace:
    """One forward of a block on ``batch`` windows."""

    groups: tuple[tuple[str, ...], ...]  # sites that share an input, in running order
    activation_bytes: int  # peak of the bytes alive, with the input, without weights
    autograd_bytes: int  # that peak for a forward followed by the backward to the input
    flops: int
    exact: bool  # False: the block could not be traced, and these are estimates


@dataclass(frozen=True)
class BlockUse:
    """How a block uses its linears and returns its hidden states."""

    called: frozenset[str]  # linears that the forward calls; of others it may read the weight
    returned: Returned
    chosen: Mapping[str, int]  # modules of experts by name -> experts that each token is sent to


@dataclass(frozen=True)
class CaptureTrace:
    """Inputs of the blocks besides the hidden states of one window: masks, positions."""

    layer_inputs: list[LayerInputs]  # of each block; tensors without data
    nbytes: int  # of all tensors together
    peak_bytes: int  # most bytes alive during the capture, these tensors included


def trace_capture(capture: Callable[[], list[LayerInputs]]) -> CaptureTrace:
    """Trace ``capture``, which returns the layer inputs of all blocks for one window."""
    with _LiveBytes([]) as live:
        layer_inputs = capture()
    empty = [
        LayerInputs(*tree_map_only(Tensor, lambda t: t.to("meta"), (inputs.args, inputs.kwargs)))
        for inputs in layer_inputs
    ]
    return CaptureTrace(empty, input_bytes(layer_inputs), live.peak)


def use_of_block(block: nn.Module, hidden: Tensor, inputs: LayerInputs) -> BlockUse | None:
    """Which linears ``block`` calls, and what it returns; None where it cannot run without data.

    UnsupportedModelError where the block uses a state that is not streamed.
    """
    called: set[str] = set()
    chosen: dict[str, int] = {}
    linears = linear_modules(block)
    error: Exception | None = None

    def route(name: str, module: nn.Module) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows, index = (*args, *kwargs.values())[:2]
            if rows.shape[:-1] == (hidden.shape[0] * hidden.shape[1],):
                chosen[name] = index.shape[-1]

        return module.register_forward_pre_hook(before, with_kwargs=True)

    for choice in (None, "batched_mm"):  # the kernel of grouped experts takes no fake fp32 tensors
        called.clear()
        with ExitStack() as stack:
            for name, linear in linears.items():
                hook = linear.register_forward_pre_hook(lambda *_, name=name: called.add(name))
                stack.callback(hook.remove)
            for name, module in expert_modules(block).items():
                stack.callback(route(name, module).remove)
            stack.enter_context(_experts_run_by(block, choice))
            stack.enter_context(_quiet())
            try:
                with torch.no_grad(), FakeTensorMode():
                    state, start, args, kwargs = _faked(block, hidden, inputs)
                    output = torch.func.functional_call(block, state, (start, *args), kwargs)
                return BlockUse(frozenset(called), Returned.of(output), chosen)
            except UnsupportedModelError:
                raise
            except Exception as fault:  # model code may raise anything on fake tensors
                if lacks_memory(fault):
                    raise
                error = fault
    if any(map(is_state, inputs.leaves)):
        raise UnsupportedModelError(
            "a block is given a state besides the hidden states, and cannot be run without data to "
            "see whether it uses it: not supported yet"
        ) from error
    return None


@contextmanager
def _experts_run_by(block: nn.Module, implementation: str | None) -> Iterator[None]:
    """Run experts with one of transformers' implementations; None: the one in the config."""
    configs = {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}
    name = "_experts_implementation_internal"
    before = [(c, getattr(c, name)) for c in configs.values() if hasattr(c, name)]
    try:
        for config, _ in before:
            if implementation is not None:
                setattr(config, name, implementation)
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of kernels that do not support fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _faked(
    block: nn.Module, hidden: Tensor, inputs: LayerInputs
) -> tuple[dict[str, Tensor], Tensor, tuple[Any, ...], dict[str, Any]]:
    """Weights, hidden states and other inputs without data; call it in a FakeTensorMode."""
    state = {
        name: torch.empty(value.shape, dtype=value.dtype)
        for name, value in (*block.named_parameters(), *block.named_buffers())
    }
    args, kwargs = tree_map_only(Tensor, _without_data, (inputs.args, inputs.kwargs))
    return state, torch.empty(hidden.shape, dtype=hidden.dtype), args, kwargs


def trace_block(
    block: nn.Module,
    sites: Sequence[LinearSite],
    hidden: Tensor,
    inputs: LayerInputs,
    tokens: int = 0,
    *,
    without: ExpertBank | None = None,
) -> BlockTrace:
    """Trace ``block`` on hidden states shaped like ``hidden`` (batch, seq, hidden).

    With ``tokens`` its feed-forward runs that many positions at a time. What the experts
    ``without`` would compute is left out.

    A block whose code depends on the data (a mixture's routing) cannot be traced: then no
    sharing is assumed, and bytes and operations are estimated from its weights.
    """
    try:
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            if without is not None:
                stack.enter_context(answering(block.get_submodule(without.name), _as_given))
            else:
                stack.enter_context(in_chunks(block, tokens))
            return _trace(block, sites, hidden, inputs)
    except Exception as error:  # model code may raise anything on fake tensors
        if lacks_memory(error):
            raise
        return _estimate(block, sites, hidden)


def _as_given(tokens: Tensor, _: Tensor, weights: Tensor) -> Tensor:
    """What stands for the output of experts: as large, and with a gradient for both."""
    return tokens * weights.sum(-1, keepdim=True).to(tokens.dtype)


def _trace(
    block: nn.Module, sites: Sequence[LinearSite], hidden: Tensor, inputs: LayerInputs
) -> BlockTrace:
    groups: list[list[str]] = []
    by_input = WeakIdKeyDictionary()  # weak, so that watching keeps no tensor alive

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] not in by_input:
                by_input[args[0]] = []
                groups.append(by_input[args[0]])
            by_input[args[0]].append(name)

        return hook

    hooks = [site.traced(block).register_forward_pre_hook(note(site.name)) for site in sites]
    try:
        with torch.no_grad(), FakeTensorMode():
            state, start, args, kwargs = _faked(block, hidden, inputs)
            counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
            with counter, _LiveBytes([start]) as live:
                torch.func.functional_call(block, state, (start, *args), kwargs)
            for hook in hooks:
                hook.remove()
            with torch.enable_grad(), _LiveBytes([start]) as both:
                named = {f"block.{name}": value for name, value in state.items()}
                start.requires_grad_()
                torch.func.functional_call(_Backward(block), named, (start, *args), kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return BlockTrace(
        tuple(tuple(names) for names in groups),
        live.peak,
        both.peak,
        counter.get_total_flops(),
        exact=True,
    )


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _Backward(nn.Module):
    """A forward of ``block``, then a backward to its input from a gradient of ones."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, start: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = hidden_of(self.block(start, *args, **kwargs))
        gradient: Tensor = torch.autograd.grad(output, start, torch.ones_like(output))[0]
        return gradient


def _estimate(block: nn.Module, sites: Sequence[LinearSite], hidden: Tensor) -> BlockTrace:
    """Estimate without a trace: no sites share an input. Alive at once are four fp32 copies of the
    input, and every linear's output in fp32 or the inputs and outputs of a token's experts."""
    tokens = hidden.shape[0] * hidden.shape[1]
    outputs = sum(linear.out_features for linear in linear_modules(block).values())
    chosen = max((getattr(module, "top_k", 0) for module in block.modules()), default=0)
    expert = sum(sum(value.shape[1:]) for value in block.parameters() if value.dim() == 3)
    numbers = sum(value.numel() for value in block.parameters())
    alive = max(4 * outputs, hidden.element_size() * chosen * expert)
    return BlockTrace(
        tuple((site.name,) for site in sites),
        tokens * (alive + 16 * hidden.shape[-1]),
        2 * tokens * (alive + 32 * hidden.shape[-1]),
        2 * tokens * numbers,
        exact=False,
    )


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages made while it is on; ``peak`` is their maximum."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = WeakIdKeyDictionary()
        self.peak = 0
        for tensor in held:
            self._alive[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        storages = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in tree_leaves(result):
            if _is_tensor(tensor) and id(tensor.untyped_storage()) not in storages:
                storage = tensor.untyped_storage()
                self._alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
