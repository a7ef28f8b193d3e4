"""The outline of a job, from which its steps count their bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.forms import Form, form_of
from streamcomp.job.block_plan import BlockPlan
from streamcomp.job.outputs import OutputPlan
from streamcomp.machine.rates import MachineRates
from streamcomp.methods import Method, find_method
from streamcomp.model.sites import LinearSite, Site
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Recipe

__all__ = ["Outline"]


@dataclass(frozen=True)
class Outline:
    """One job before it runs: its model, windows, settings and outputs."""

    skeleton: Skeleton
    recipe: Recipe
    stream: StreamShape  # of the dense hidden states
    blocks: Sequence[BlockPlan]
    outputs: Sequence[OutputPlan]  # none in an evaluation
    analysis: bool  # decompositions are kept in the work folder before any factor is written
    rates: MachineRates

    @property
    def method(self) -> Method:
        return find_method(self.recipe.method)

    @property
    def form(self) -> Form:
        return form_of(self.recipe)

    @property
    def eligible(self) -> list[Site]:
        """The sites that could be factored, block after block."""
        return [site for block in self.blocks for site in block.sites.eligible]

    @property
    def chosen(self) -> list[Site]:
        """The sites to factor."""
        return [site for block in self.blocks for site in block.targets]

    @property
    def left(self) -> dict[str, str]:
        """Why others are left as they are, by full name."""
        return {name: why for block in self.blocks for name, why in block.sites.left.items()}

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return self.stream.tokens

    @property
    def vocabulary(self) -> int:
        return int(self.skeleton.embedding_source.shape[0])

    def forward_seconds(self, block: int) -> float:
        """All windows through a block."""
        flops = self.stream.windows * self.blocks[block].trace.flops
        return flops / self.rates.model_flops

    def read_seconds(self, block: int) -> float:
        """Reading a block from disk."""
        return self.blocks[block].read_bytes / self.rates.disk_bytes

    def ranks(self, block: int, output: int, *, most: bool = False) -> dict[LinearSite, int]:
        """Ranks of the linears of a block that one output factors.

        Equal shares until all spectra are known; with ``most`` the largest ranks that may follow.
        """
        plan, form = self.outputs[output], self.form
        ranks = {
            site: plan.most_rank(site, form) if most else plan.rank(site)
            for group in self.blocks[block].groups
            for site in group.sites
        }
        return {site: rank for site, rank in ranks.items() if rank is not None}
