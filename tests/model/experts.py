"""A kind of site that the package does not have: one expert's weight, a slice of a fused tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from streamcomp.forms.runtime import FactoredLinear
from streamcomp.model.sites import Site
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.streamer import LoadedBlock

EXPERTS, CHOSEN = 4, 2  # of a pico mixtral: experts in a block, and how many a token is sent to


class PartlyFactored(nn.Module):
    """Mixtral's experts, some of whose weights are factored."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense, self.factors = dense, nn.ModuleDict()
        self.act_fn = dense.act_fn

    def multiply(self, rows: Tensor, expert: int, leaf: str) -> Tensor:
        key = f"{expert}-{leaf}"
        if key in self.factors:
            output: Tensor = self.factors[key](rows)
            return output
        return functional.linear(rows, self.dense.get_parameter(leaf)[expert])

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            tokens, place = torch.where(index == expert)
            inner = gated(self, self.multiply(hidden[tokens], expert, "gate_up_proj"))
            output = self.multiply(inner, expert, "down_proj")
            result = result.index_add(0, tokens, output * weights[tokens, place, None])
        return result


def gated(module: Any, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    result: Tensor = module.act_fn(gate) * up
    return result


@dataclass(frozen=True)
class ExpertSite(Site):
    """``gate_up_proj`` or ``down_proj`` of one expert of Mixtral."""

    module: str  # the module of all experts, within the block
    expert: int

    def tokens(self, stream: int) -> int:
        return -(-stream * CHOSEN // EXPERTS)

    def traced(self, block: nn.Module) -> None:
        return None

    def weight(self, block: LoadedBlock) -> Tensor:
        return block.original(self.module).get_parameter(self.leaf)[self.expert].detach()

    def bias(self, block: LoadedBlock) -> None:
        return None

    def watch_inputs(self, block: LoadedBlock, see: Callable[[Tensor], None]) -> RemovableHandle:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(self._inputs(block, module, args[0][self._rows(block, args[1])[0]]))

        return block.running(self.module).register_forward_pre_hook(before)

    def watch_outputs(
        self, block: LoadedBlock, see: Callable[[Tensor, Tensor | None], None]
    ) -> RemovableHandle:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = self._inputs(block, module, args[0][self._rows(block, args[1])[0]])
            see(functional.linear(inputs, self.weight(block)), None)

        return block.running(self.module).register_forward_pre_hook(before)

    def watch_gradients(self, block: LoadedBlock, see: Callable[[Tensor], None]) -> RemovableHandle:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def back(gradient: Tensor) -> None:
                hidden, index, weights = (arg.detach() for arg in args)
                tokens, place = self._rows(block, index)
                behind = gradient[tokens] * weights[tokens, place, None]
                if self.leaf == "gate_up_proj":
                    with torch.enable_grad():
                        first = functional.linear(hidden[tokens], self.weight(block))
                        first.requires_grad_()
                        down = block.original(self.module).get_parameter("down_proj")[self.expert]
                        second = functional.linear(gated(module, first), down)
                    (behind,) = torch.autograd.grad(second, first, behind)
                see(behind)

            if output.requires_grad:
                output.register_hook(back)

        return block.running(self.module).register_forward_hook(after)

    def put(self, block: LoadedBlock, module: FactoredLinear) -> None:
        experts = block.running(self.module)
        if not isinstance(experts, PartlyFactored):
            experts = PartlyFactored(experts)
            block.replace(self.module, experts)
        experts.factors[f"{self.expert}-{self.leaf}"] = module

    def factored(self, block: LoadedBlock) -> FactoredLinear:
        experts = block.running(self.module)
        assert isinstance(experts, PartlyFactored)
        module = experts.factors[f"{self.expert}-{self.leaf}"]
        assert isinstance(module, FactoredLinear)
        return module

    def parameter(self, leaf: str) -> str:
        return f"{self.module}.factors.{self.expert}-{self.leaf}.{leaf}"

    def free(self, block: LoadedBlock) -> None:
        raise NotImplementedError

    def _rows(self, block: LoadedBlock, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens come here, and at which place of their choice; as in the dense block."""
        dense: Any = block.original(self.module)
        if block.running(self.module) is dense:
            dense.last_index = index
        tokens, place = torch.where(dense.last_index == self.expert)
        return tokens, place

    def _inputs(self, block: LoadedBlock, module: nn.Module, rows: Tensor) -> Tensor:
        """From the ``rows`` of the experts' inputs, as ``module`` computes them."""
        if self.leaf == "gate_up_proj":
            return rows
        if isinstance(module, PartlyFactored):
            first = module.multiply(rows, self.expert, "gate_up_proj")
        else:
            first = functional.linear(rows, module.get_parameter("gate_up_proj")[self.expert])
        return gated(module, first)


def expert_sites(skeleton: Skeleton, number: int) -> list[ExpertSite]:
    """All of a block of Mixtral."""
    experts = skeleton.block(number).get_submodule("mlp.experts")
    sites = []
    for expert in range(EXPERTS):
        for leaf in ("gate_up_proj", "down_proj"):
            name = f"mlp.experts.{expert}.{leaf}"
            full_name = f"{skeleton.block_name(number)}.{name}"
            source = skeleton.sources[f"{skeleton.block_name(number)}.mlp.experts.{leaf}"][expert]
            rows, columns = experts.get_parameter(leaf).shape[1:]
            sites.append(ExpertSite(name, full_name, source, rows, columns, "mlp.experts", expert))
    return sites
