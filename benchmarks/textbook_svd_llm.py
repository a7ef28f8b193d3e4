"""Plain SVD-LLM, whole model in memory: the reference that streamcomp is measured against.

Follows the published code (arXiv 2403.07378, https://github.com/AIoT-MLSys-Lab/SVD-LLM) step by
step, without its parameter update: one fp32 forward over the calibration windows gathers
H = X X^T of every linear; per linear H = S S^T (Cholesky, fp64), SVD(W S) in fp32, the top
``rank`` singular triplets, and S^-1 (fp64) folded into the right factor. On purpose it
shares no code with streamcomp but the choice of windows; it needs all moments, 4 n^2 bytes a
linear, at once.

    python benchmarks/textbook_svd_llm.py MODEL --calibration valid.txt --text test.txt --ratio 0.2
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamcomp.calibration.corpus import load_windows
from streamcomp.errors import StreamcompError


class Decomposition(NamedTuple):
    """How a factorisation went."""

    energy: float  # ||W X||_F^2, of which the loss is a part
    damping: float  # added to the diagonal of H; 0 where Cholesky succeeded at once
    whitening_seconds: float
    svd_seconds: float


class Factors(NamedTuple):
    """W' = U V and its loss ||W X - W' X||_F^2, the sum of the cut sigma^2."""

    U: Tensor  # (m, r) float32
    V: Tensor  # (r, n) float32
    loss: float
    info: Decomposition


class Compression(TypedDict):
    """What ``compress`` did, by linear and by stage."""

    relative_loss: dict[str, float]  # ||W X - W' X||^2 / ||W X||^2
    damping: dict[str, float]  # only linears that needed some
    seconds: dict[str, float]


def decoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every nn.Linear inside the decoder layers, by full name."""
    depth = model.config.num_hidden_layers
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            inner = module.named_modules(prefix=prefix)
            return {name: linear for name, linear in inner if isinstance(linear, nn.Linear)}
    raise ValueError(f"{type(model).__name__} holds no list of {depth} decoder layers")


@torch.no_grad()
def calibrate(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """H = X X^T, (n, n) float32, of each linear's inputs over ``windows`` (windows, seq) int64.

    The forward runs in the model's dtype: hand over an fp32 model.
    """
    moments: dict[str, Tensor] = {}
    handles = []
    for name, linear in decoder_linears(model).items():
        n = linear.in_features
        moment = moments[name] = torch.zeros(n, n)

        def add(_: nn.Module, inputs: tuple[Tensor, ...], moment: Tensor = moment) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()  # (tokens, n)
            moment.addmm_(x.T, x)

        handles.append(linear.register_forward_pre_hook(add))
    for window in windows:
        model.base_model(input_ids=window[None], use_cache=False)  # the head is not needed
    for handle in handles:
        handle.remove()
    return moments


def _whiten(H: Tensor) -> tuple[Tensor, Tensor, float]:
    """S and S^-1 in fp64 with H + damping I = S S^T, and the damping."""
    H = H.double()
    damping = 0.0
    try:
        S = torch.linalg.cholesky(H)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The published remedy: lift the smallest eigenvalue to 1e-6.
        damping = 1e-6 - torch.linalg.eigvalsh(H)[0].item()
        S = torch.linalg.cholesky(H + damping * torch.eye(len(H), dtype=H.dtype))
    return S, torch.linalg.inv(S), damping


@torch.no_grad()
def factorize(weight: Tensor, H: Tensor, rank: int) -> Factors:
    """The best W' = U V of rank ``rank`` for ``weight`` (m, n) and its moments H (n, n)."""
    start = time.perf_counter()
    S, S_inverse, damping = _whiten(H)
    whitened = time.perf_counter()
    left, sigma, right = torch.linalg.svd(weight.float() @ S.float(), full_matrices=False)
    root = sigma[:rank].sqrt()  # the published code gives each factor half of sigma
    U = left[:, :rank] * root  # (m, r)
    V = root[:, None] * (right[:rank] @ S_inverse.float())  # (r, n)
    finished = time.perf_counter()
    energies = sigma.double().square()
    info = Decomposition(energies.sum().item(), damping, whitened - start, finished - whitened)
    return Factors(U, V, energies[rank:].sum().item(), info)


def rank_for(m: int, n: int, ratio: float) -> int:
    """Rank at which two factors hold 1 - ratio of the m x n parameters."""
    return max(1, math.floor((1 - ratio) * m * n / (m + n)))


def compress(
    model: PreTrainedModel,
    windows: Tensor,
    ratio: float,
    keep: Callable[[str, Tensor, Factors], None] = lambda name, moment, factors: None,
) -> Compression:
    """Replace each decoder linear of ``model`` by two, in place, in the dtype it was stored in.

    ``keep`` is handed each linear's name, moment and factors.
    """
    start = time.perf_counter()
    # A copy, because casting the model down again would round its fp32 rotary buffers too.
    moments = calibrate(nn.Module.float(copy.deepcopy(model)), windows)
    seconds = {"calibrate": time.perf_counter() - start, "whiten": 0.0, "svd": 0.0}
    done: Compression = {"relative_loss": {}, "damping": {}, "seconds": seconds}
    for name, linear in decoder_linears(model).items():
        rank = rank_for(linear.out_features, linear.in_features, ratio)
        found = factorize(linear.weight, moments[name], rank)
        keep(name, moments[name], found)
        U, V, loss, info = found
        model.set_submodule(name, _two_linears(linear, U, V))
        seconds["whiten"] += info.whitening_seconds
        seconds["svd"] += info.svd_seconds
        done["relative_loss"][name] = loss / info.energy
        if info.damping:
            done["damping"][name] = info.damping
    return done


def _two_linears(dense: nn.Linear, U: Tensor, V: Tensor) -> nn.Sequential:
    """x -> U (V x) + bias, stored like ``dense``."""
    (m, rank), n = U.shape, V.shape[1]
    like = {"dtype": dense.weight.dtype}
    first = nn.Linear(n, rank, bias=False, **like)
    second = nn.Linear(rank, m, bias=dense.bias is not None, **like)
    with torch.no_grad():
        first.weight.copy_(V)
        second.weight.copy_(U)
        if dense.bias is not None:
            second.bias.copy_(dense.bias)
    return nn.Sequential(first, second)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean loss over all seq - 1 predictions of each of ``windows`` (windows, seq)."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def _windows(args: argparse.Namespace, text: Path, count: int, seed: int | None) -> Tensor:
    """The same windows, (windows, seq) int64, that streamcomp takes from ``text``."""
    return load_windows(args.model, [str(text)], count, args.seq_len, seed).tokens.long()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SVD-LLM as published, for comparison.")
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--text", type=Path, required=True, help="text file for the perplexity")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=0, help="first windows of --text; 0: all")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of parameters removed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    try:
        if not (args.model / "config.json").is_file():
            raise ValueError(f"{args.model} holds no config.json: no checkpoint folder")
        if not 0 < args.ratio < 1:
            raise ValueError(f"--ratio {args.ratio} must lie between 0 and 1")
        calibration = _windows(args, args.calibration, args.samples, args.seed)
        test = _windows(args, args.text, args.windows, None)
    except StreamcompError as error:
        sys.exit(f"error: {error}")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    start = time.perf_counter()
    dense = perplexity(model, test)
    dense_seconds = time.perf_counter() - start
    done = compress(model, calibration, args.ratio)
    start = time.perf_counter()
    compressed = perplexity(model, test)
    losses = done["relative_loss"].values()
    result = {
        "dense_perplexity": dense,
        "compressed_perplexity": compressed,
        "mean_relative_loss": sum(losses) / len(losses),
        "damping": done["damping"],
        "seconds": {
            "dense_perplexity": dense_seconds,
            **done["seconds"],
            "compressed_perplexity": time.perf_counter() - start,
        },
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
