"""How fast factored experts are next to dense ones: a layer of Qwen3-30B-A3B, bf16, random weights.

    python benchmarks/experts.py --forms uv,pivot

128 experts, 8 for each token, n 2048, m 768. Each ratio is tried with equal ranks, and with ranks
up to half smaller or larger: in steps of a sixteenth, as jobs choose them, in multiples of 8, and
as they come. Dense and factored layers take turns in one process; a row gives the median seconds of
the dense layer, by the faster of ``eager`` and ``grouped_mm``, and how many times faster each
factored one is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from streamcomp.forms import find_form
from streamcomp.forms.expert_module import FactoredExperts
from streamcomp.forms.experts import matrices_of

RATIOS = (0.2, 0.4, 0.6)
TOKENS = (256, 1)
# Ranks by their mean, how far they are from it at most, how many, and the smaller side.
SPREADS: dict[str, Callable[[int, int, int, int], list[int]]] = {
    "equal": lambda rank, width, count, side: [_rounded(rank, 8)] * count,
    "of 16": lambda rank, width, count, side: _spread(rank, width, count, 8 * (side // 128)),
    "by 8": lambda rank, width, count, side: _spread(rank, width, count, 8),
    "by 1": lambda rank, width, count, side: _spread(rank, width, count, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--forms", default="uv,pivot")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = Qwen3MoeConfig(num_experts=options.experts)
    config._experts_implementation = "grouped_mm"
    dense = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    _fill(dense)
    measured = {}
    print(f"| form | ratio | tokens | dense | {' | '.join(SPREADS)} |")
    print("|---|---|---|---|" + "---|" * len(SPREADS))
    for form in options.forms.split(","):
        for ratio in RATIOS:
            layers = {spread: _factored(dense, form, ratio, spread) for spread in SPREADS}
            for tokens in TOKENS:
                row = _row(dense, layers, tokens, options.rounds)
                best = min(row["eager"], row["grouped_mm"])
                times = [f"{best / row[spread]:.2f}" for spread in SPREADS]
                print(
                    f"| {form} | {ratio} | {tokens} | {1e3 * best:.1f} ms | {' | '.join(times)} |"
                )
                measured[f"{form} {ratio} {tokens}"] = row
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


def _fill(module: nn.Module) -> None:
    """Numbers of a small table again and again: products take as long as with other numbers."""
    table = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)) * 0.02
    for parameter in module.parameters():
        for part in parameter.view(-1).split(len(table)):
            part.copy_(table[: len(part)])


def _factored(dense: nn.Module, form: str, ratio: float, spread: str) -> FactoredExperts:
    """Experts that store 1 - ``ratio`` of the numbers, with random factors."""
    ranks = {}
    for name, (rows, columns) in matrices_of(dense).items():
        rank = find_form(form)().largest_rank(rows, columns, (1 - ratio) * rows * columns)
        width = min(rank // 2, min(rows, columns) - rank)
        ranks[name] = SPREADS[spread](
            rank, width, len(dense.get_parameter(name)), min(rows, columns)
        )
    factored = FactoredExperts(dense, form, ranks).requires_grad_(False)
    _fill(factored)
    for matrices in factored.matrices.values():
        if matrices.pivots:
            places = torch.stack([torch.randperm(matrices.rows) for _ in matrices.ranks])
            factored.get_buffer(matrices.pivots).copy_(places)
    return factored


def _spread(rank: int, width: int, count: int, step: int) -> list[int]:
    """Multiples of ``step`` at most ``width`` from ``rank``, in an order that is not theirs."""
    ranks = torch.linspace(rank - width, rank + width, count).int()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return [_rounded(rank, step) for rank in ranks[order].tolist()]


def _rounded(rank: int, step: int) -> int:
    return max(step, step * (rank // step))


@torch.no_grad()
def _row(
    dense: Qwen3MoeExperts, layers: dict[str, FactoredExperts], tokens: int, rounds: int
) -> dict[str, float]:
    """Median seconds of the dense layer by implementation, and of each of ``layers``."""
    random = torch.Generator().manual_seed(2)
    count = dense.num_experts
    hidden = torch.randn(tokens, dense.hidden_dim, generator=random).to(torch.bfloat16)
    weights, index = torch.rand(tokens, count, generator=random).topk(8)
    given = (hidden, index, (weights / weights.sum(1, keepdim=True)).to(torch.bfloat16))
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name in ("eager", "grouped_mm"):
            dense.config._experts_implementation = name
            seconds.setdefault(name, []).append(_seconds(dense, given, tokens))
        for spread, layer in layers.items():
            seconds.setdefault(spread, []).append(_seconds(layer, given, tokens))
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def _seconds(layer: nn.Module, given: tuple[Tensor, ...], tokens: int) -> float:
    repeats = max(1, 16 // tokens)
    started = time.perf_counter()
    for _ in range(repeats):
        layer(*given)
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main()
