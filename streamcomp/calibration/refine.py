"""Refinement of a block's factors by gradient descent, one block in memory at a time.

The closed form looks at each linear by itself. Here all factors of a block are trained together
on the compressed stream's inputs against the dense block's outputs on the dense stream, so that
they also correct errors of earlier blocks (as AA-SVD, arXiv 2604.02119, does). An error d of a
token's output y counts as d^T d / y^T y, and where the reverse sweep has stored the moment Gamma
of the loss's gradient there, as the mean of that and d^T Gamma d / y^T Gamma y: Gamma describes
the effect of a small error on the loss, but not of a large one. Both are relative to each token
because a few massive activations dominate plain squared errors.

The optimizer is Muon (torch.optim), which gives every direction of a factor's gradient the same
weight; otherwise the few large directions of the inputs would dominate it.

The factors that do best on held-out windows are kept. The closed form is among the candidates, so
that on these windows a block never gets worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from streamcomp.forms import Form
from streamcomp.forms.runtime import FactoredLinear, LowRankLinear
from streamcomp.linalg.dtypes import solve_dtype
from streamcomp.linalg.low_rank import GRADIENT_DAMPING
from streamcomp.model.sites import LinearSite
from streamcomp.model.streamer import LoadedBlock
from streamcomp.model.taps import LayerInputs

__all__ = [
    "Refined",
    "TrainingData",
    "balancing_bytes",
    "factor_bytes",
    "optimizer_flops",
    "refine_block",
]

# Root mean square of a step, relative to that of the tensor: _RATE times the block's loss to the
# power of _POWER, so that blocks with a small loss take small steps.
_RATE, _POWER = 4.5e-2, 0.75

_WINDOWS_PER_STEP = 1  # run one at a time, their gradients added up
_HELD_OUT_EVERY = 8  # one window out of this many is held out
_CHECKS = 4  # number of measurements on the held-out windows
_WARM_UP = 0.1  # share of the steps in which the rate grows; then it falls as a cosine
_MOMENTUM = 0.9
_MUON_RMS = 0.2  # of a step of torch's Muon at a learning rate of 1


@dataclass(frozen=True)
class TrainingData:
    """Data to refine a block on: both functions return window w as (1, seq, hidden)."""

    windows: int
    inputs: Callable[[int], Tensor]  # the compressed stream, before the block
    targets: Callable[[int], Tensor]  # the dense stream, after the block
    layer_inputs: LayerInputs  # the block's, of one window
    gradient: Tensor | None  # Gamma (hidden, hidden), or None


@dataclass(frozen=True)
class Refined:
    """The best factors in stored form, by site and name, and the held-out loss."""

    tensors: dict[LinearSite, dict[str, Tensor]]
    before: float
    after: float
    steps: int  # training steps after which they were best; 0 is the closed form


def refine_block(
    loaded: LoadedBlock,
    sites: Sequence[LinearSite],
    data: TrainingData,
    steps: int,
    *,
    form: Form,
    rate: float = 0.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Refined:
    """Train the factors at ``sites`` for ``steps`` steps of Muon.

    In every form, the two factors U sqrt(S) and sqrt(S) V of the product's SVD are trained: each
    number of the pivot rows, which span all others, would change the whole matrix. The block runs
    in the dtype of its weights, on copies rounded from fp32. At the end the factors are converted
    to their form, and measured as they will be stored. Holds, in addition to the block, both
    factors of its sites five times in fp32 (with gradient, momentum, the best so far and the
    rounded copies), the largest three times more, and the graph of one window.
    """
    factored = {site: site.factored(loaded) for site in sites}
    closed = {site: _stored(module) for site, module in factored.items()}
    held_out = list(range(0, data.windows, _HELD_OUT_EVERY)) if data.windows > 1 else []
    measure = _Measure(loaded, data)
    before = measure.mean({}, held_out)
    if not held_out or not steps:
        return Refined(closed, before, before, 0)
    parameters = {
        site.parameter(leaf): value.requires_grad_()
        for site, module in factored.items()
        for leaf, value in _balanced(module).items()
    }
    with _as_two_factors(loaded, factored):
        best, kept = _train(
            measure,
            parameters,
            held_out,
            steps,
            rate or _RATE * before**_POWER,
            seed,
            progress,
        )
    if not kept:
        return Refined(closed, before, before, 0)
    refined = {
        site: form.encode(
            best[site.parameter("U")].to(solve_dtype(module.weight.dtype)),
            best[site.parameter("weight")].to(solve_dtype(module.weight.dtype)),
            module.weight.dtype,
        )
        for site, module in factored.items()
    }
    after = measure.mean(
        {site.parameter(k): v for site, ts in refined.items() for k, v in ts.items()}, held_out
    )
    if not after < before:
        return Refined(closed, before, before, 0)
    return Refined(refined, before, after, kept)


def factor_bytes(ranks: Mapping[LinearSite, int], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of both factors of the sites in ``ranks``, while training and while converting.

    In fp32 or wider. Training holds them with gradient, momentum, the best so far and the rounded
    copies, plus Muon's work on the largest factor; converting holds them, gradient and best.
    """
    item = max(torch.float32.itemsize, dtype.itemsize)
    numbers = sum(rank * (m.rows + m.columns) for m, rank in ranks.items())
    largest = max((rank * max(m.rows, m.columns) for m, rank in ranks.items()), default=0)
    return item * (5 * numbers + 3 * largest), 3 * item * numbers


def balancing_bytes(rows: int, columns: int, rank: int) -> int:
    """Peak of sharing a product's singular values between its factors, in fp64."""
    return torch.float64.itemsize * (3 * rank * (rows + columns) + 5 * rank * rank)


def optimizer_flops(ranks: Mapping[LinearSite, int]) -> float:
    """Operations of one step of Muon: five Newton-Schulz iterations for each factor, in bf16."""
    return sum(
        5 * (4.0 * (m.rows + m.columns) * rank**2 + 4.0 * rank**3) for m, rank in ranks.items()
    )


def _train(
    measure: _Measure,
    parameters: dict[str, Tensor],
    held_out: list[int],
    steps: int,
    rate: float,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[dict[str, Tensor], int]:
    """The factors that did best on the held-out windows, and after how many steps."""
    best, kept, lowest = parameters, 0, measure.mean(parameters, held_out)
    optimizer = torch.optim.Muon(
        [{"params": [p], "lr": _scale(p) * rate / _MUON_RMS} for p in parameters.values()],
        momentum=_MOMENTUM,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_at(step, steps))
    order = _order([w for w in range(measure.windows) if w not in held_out], seed)
    for step in range(steps):
        progress(step / steps)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(_WINDOWS_PER_STEP):
            measure.loss(parameters, next(order)).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
            now = measure.mean(parameters, held_out)
            if now < lowest:
                lowest, kept = now, step + 1
                best = {name: value.detach().clone() for name, value in parameters.items()}
    return best, kept


def _stored(module: FactoredLinear) -> dict[str, Tensor]:
    """The tensors of a factored linear in a checkpoint, except its bias."""
    return {name: value.detach() for name, value in module.tensors().items() if name != "bias"}


def _balanced(module: FactoredLinear) -> dict[str, Tensor]:
    """``U`` (m, r) and ``weight`` (r, n), each with the square roots of the singular values."""
    left = torch.linalg.qr(module.left_factor().double())
    right = torch.linalg.qr(module.weight.detach().double().T)
    inner = torch.linalg.svd(left.R @ right.R.T)
    root = inner.S.sqrt()
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    return {
        "U": (left.Q @ (inner.U * root)).to(wide),
        "weight": ((inner.Vh.T * root).T @ right.Q.T).to(wide),
    }


@contextmanager
def _as_two_factors(
    loaded: LoadedBlock, factored: Mapping[LinearSite, FactoredLinear]
) -> Iterator[None]:
    """Replace the modules ``factored`` by ones of form ``uv`` without weights, while open."""
    for site, module in factored.items():
        with torch.device("meta"):
            empty = LowRankLinear(site.columns, site.rows, module.rank)
        empty.bias = module.bias
        site.put(loaded, empty)
    try:
        yield
    finally:
        for site, module in factored.items():
            site.put(loaded, module)


class _Measure:
    """The loss of a block's output on one window."""

    def __init__(self, loaded: LoadedBlock, data: TrainingData) -> None:
        self._loaded, self._data = loaded, data
        self._root = None if data.gradient is None else _root(data.gradient)
        self.windows = data.windows

    @torch.enable_grad()
    def loss(self, parameters: Mapping[str, Tensor], window: int) -> Tensor:
        output = self._loaded.run_with(
            parameters, self._data.inputs(window), self._data.layer_inputs
        )
        target = self._data.targets(window).to(output.device).float()
        error = output.float() - target  # (1, seq, hidden)
        relative = _relative(error, target)
        if self._root is not None:
            weighted = _relative(error @ self._root, target @ self._root)
            relative = (relative + weighted) / 2
        return relative

    @torch.no_grad()
    def mean(self, parameters: Mapping[str, Tensor], windows: list[int]) -> float:
        losses = [float(self.loss(parameters, window).detach()) for window in windows]
        return math.fsum(losses) / max(1, len(losses))


def _relative(error: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |d|^2 / |y|^2; ``error`` d and ``target`` y are (1, seq, hidden)."""
    lengths = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    mean: Tensor = (error.square().sum(-1) / lengths).mean()
    return mean


def _root(gradient: Tensor) -> Tensor:
    """R (hidden, hidden) fp32 with R R^T = Gamma, damped and scaled to a mean diagonal of 1."""
    wide = gradient.double()
    mean = wide.diagonal().mean()
    if not bool(mean > 0):
        return torch.eye(len(wide), device=wide.device)
    wide = wide / mean
    wide.diagonal().add_(GRADIENT_DAMPING)
    root: Tensor = torch.linalg.cholesky(wide / (1 + GRADIENT_DAMPING))
    return root.float()


def _scale(parameter: Tensor) -> float:
    """Root mean square of a tensor; 1 where it is zero, or empty."""
    size = float(parameter.detach().square().mean()) if parameter.numel() else 0.0
    return math.sqrt(size) if size > 0 else 1.0


def _rate_at(step: int, steps: int) -> float:
    """The scheduled learning rate at ``step``, relative to its maximum."""
    rising = max(1.0, _WARM_UP * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def _order(windows: list[int], seed: int) -> Iterator[int]:
    """The windows over and over, each time in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (windows[i] for i in torch.randperm(len(windows), generator=generator).tolist())
