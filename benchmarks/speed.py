"""How fast, side by side in one run, as ratios: a machine's own seconds mean little elsewhere.

    python benchmarks/speed.py .cache/SmolLM2-135M Llama-2-7B --text valid.txt

MODEL is a folder, or one of the shapes of ``shapes.py``, of which one block with random weights is
made. Parts, all of them or those of ``--parts``:

- textbook: against SVD-LLM as published (``textbook_svd_llm.py``), same windows, threads and ratio;
  the loss of every linear as it is stored is compared too;
- roofline: seconds of each stage against what the planner counts at the machine's measured rates;
- ratios: three outputs from one job against one output;
- linear: seconds of a block from first to last, and of a job over its windows;
- inference (shapes): tokens per second of one block, dense and factored, prompt and decoding.

Prints tables in Markdown, and writes everything measured to ``--json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import SHAPES, make_shape
from textbook_svd_llm import Factors
from textbook_svd_llm import compress as textbook_compress
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from streamcomp.calibration.corpus import load_windows
from streamcomp.checkpoint.index import read_index
from streamcomp.forms import FORMS, find_form
from streamcomp.forms.runtime import PivotLinear
from streamcomp.units import format_seconds

PARTS = ("textbook", "roofline", "ratios", "linear", "inference")
PRODUCTS = [name for name, form in FORMS.items() if form.is_product]
RATIOS = (0.2, 0.4, 0.6)
SOLVING = ("decomposing", "factorizing")
_ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a folder, or {list(SHAPES)}")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--samples", type=int, default=64, help="windows; of a shape, an eighth")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens; of a shape, twice")
    parser.add_argument("--work", type=Path, default=Path("."), help="where folders are made")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--textbook-child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.textbook_child:
        print(json.dumps(_textbook(Path(options.models[0]), options)))
        return
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    work = Path(tempfile.mkdtemp(prefix="speed-", dir=options.work))
    try:
        for name in options.models:
            found[name] = _of_model(options, name, work)
    finally:
        shutil.rmtree(work)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


def _of_model(options: argparse.Namespace, name: str, work: Path) -> dict[str, Any]:
    shaped = name in SHAPES
    if shaped:
        options.samples, options.seq_len = options.samples // 8, 2 * options.seq_len
    model = make_shape(name, work / "model", 1) if shaped else Path(name)
    title = f"{name}, one block" if shaped else model.name
    found: dict[str, Any] = {"samples": options.samples, "seq_len": options.seq_len}
    parts = options.parts.split(",")
    if "textbook" in parts:
        found["textbook"] = _against_textbook(options, title, model, work)
    if "roofline" in parts:
        methods = ("svd-llm", "two-sided")
        found["roofline"] = {m: _roofline(options, title, model, work, m) for m in methods}
    if "ratios" in parts:
        found["ratios"] = _several_ratios(options, title, model, work)
    if "linear" in parts and not shaped:
        found["linear"] = _linear(options, title, model, work)
    if "inference" in parts and shaped:
        found["inference"] = _inference(title, model)
    if shaped:
        options.samples, options.seq_len = 8 * options.samples, options.seq_len // 2
        shutil.rmtree(model)
    return found


# -- against the reference ---------------------------------------------------------------


def _textbook(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    windows = load_windows(model, [str(options.text)], options.samples, options.seq_len, 0)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")

    def keep(name: str, moment: torch.Tensor, found: Factors) -> None:
        tensors = {"H": moment, "U": found.U.to(whole.dtype), "V": found.V.to(whole.dtype)}
        tensors = {leaf: tensor.contiguous() for leaf, tensor in tensors.items()}
        save_file(tensors, options.textbook_child / f"{name}.safetensors")

    return dict(textbook_compress(whole, windows.tokens.long(), RATIOS[0], keep))


def _against_textbook(
    options: argparse.Namespace, title: str, model: Path, work: Path
) -> dict[str, Any]:
    """Both in a process of their own; losses of the stored factors under the textbook's moments."""
    print(f"\n## {title}: SVD-LLM, form uv, ratio {RATIOS[0]}\n", flush=True)
    sizes = ("--samples", str(options.samples), "--seq-len", str(options.seq_len))
    kept, out = work / "textbook", work / "out"
    kept.mkdir()
    child = (__file__, str(model), "--text", str(options.text), *sizes, "--textbook-child")
    theirs = json.loads(_python(*child, str(kept)))
    ours = _job(options, model, work, "--method", "svd-llm", "--form", "uv", keep=True)
    losses = {name: _losses(model, name, kept, out) for name in theirs["relative_loss"]}
    shutil.rmtree(kept)
    shutil.rmtree(out)
    solving = theirs["seconds"]["whiten"] + theirs["seconds"]["svd"]
    whole = sum(theirs["seconds"].values())
    above = sum(own > 1.001 * loss for loss, own in losses.values())
    worse = max(own - loss for loss, own in losses.values())
    whole_loss = [math.fsum(side) for side in zip(*losses.values(), strict=True)]
    stages = _stages(ours)
    own_solving = sum(stages.get(stage, 0.0) for stage in SOLVING)
    own_whole = sum(stages.values())
    print("| | textbook | streamcomp | times faster |\n|---|---|---|---|")
    for what, one, other in (
        ("forward and moments", whole - solving, own_whole - own_solving),
        ("decompositions", solving, own_solving),
        ("all", whole, own_whole),
    ):
        print(f"| {what} | {one:.1f} s | {other:.1f} s | {one / other:.2f} |")
    print(
        f"\nloss of what is stored, over the textbook's: {whole_loss[1] / whole_loss[0] - 1:+.2%} "
        f"in sum; {above} of {len(losses)} linears lose over 0.1% more, and none more than "
        f"{worse:.1e} of its energy more",
        flush=True,
    )
    return {"textbook": theirs, "stages": stages, "losses": losses}


def _losses(model: Path, name: str, textbook: Path, out: Path) -> tuple[float, float]:
    """||W X - U V X||^2 over ||W X||^2 of the textbook's factors and of streamcomp's, in fp64."""
    theirs = load_file(textbook / f"{name}.safetensors")
    moment = theirs["H"].double()
    weight = _tensor(model, f"{name}.weight").double()
    whole = float((weight @ moment).mul_(weight).sum())

    def lost(left: torch.Tensor, right: torch.Tensor) -> float:
        error = weight - left.double() @ right.double()
        return float((error @ moment).mul_(error).sum()) / whole

    own = _tensor(out, f"{name}.U"), _tensor(out, f"{name}.weight")
    return lost(theirs["U"], theirs["V"]), lost(*own)


def _tensor(folder: Path, name: str) -> torch.Tensor:
    with safe_open(read_index(folder).tensors[name].shard, "pt") as shard:
        tensor: torch.Tensor = shard.get_tensor(name)
    return tensor


def _roofline(
    options: argparse.Namespace, title: str, model: Path, work: Path, method: str
) -> dict[str, Any]:
    """Stages of a job beside their limits; the whole job, whatever it did, over their sum."""
    print(f"\n## {title}: stages and their limits, {method}\n", flush=True)
    report = _job(options, model, work, "--method", method)
    limits = report["limits"]
    print("| stage | time | limit | share |\n|---|---|---|---|")
    for stage, seconds in sorted(report["stages"].items(), key=lambda item: -item[1]):
        limit = limits.get(stage, 0.0)
        share = f"{limit:.1f} s | {limit / seconds:.0%}" if limit and seconds else " | "
        print(f"| {stage} | {seconds:.1f} s | {share} |")
    whole, least = sum(report["stages"].values()), sum(limits.values())
    print(f"| all | {whole:.1f} s | {least:.1f} s | {least / whole:.0%} |")
    print(f"\nthe whole takes {whole / least:.2f} times the sum of the limits", flush=True)
    return {key: report[key] for key in ("stages", "limits", "rates")}


def _several_ratios(
    options: argparse.Namespace, title: str, model: Path, work: Path
) -> dict[str, Any]:
    """Both jobs keep their analysis, as a job of several ratios does."""
    print(f"\n## {title}: several ratios from one job, svd-llm\n", flush=True)
    one = _stages(_job(options, model, work, "--method", "svd-llm", "--ratio", "0.2"))
    text = ",".join(map(str, RATIOS))
    several = _stages(_job(options, model, work, "--method", "svd-llm", "--ratio", text))
    alone, together = sum(one.values()), sum(several.values())
    print(f"| one ratio | three ratios | over one |\n|---|---|---|\n| {alone:.1f} s |", end="")
    print(f" {together:.1f} s | {together / alone:.2f} |", flush=True)
    return {"one": one, "several": several}


# -- growth ------------------------------------------------------------------------------


def _linear(options: argparse.Namespace, title: str, model: Path, work: Path) -> dict[str, Any]:
    """A line through seconds over block number, and over windows."""
    print(f"\n## {title}: growth, svd-llm\n", flush=True)
    seconds = {}
    for samples in (options.samples // 4, options.samples // 2, options.samples):
        report = _job(options, model, work, "--method", "svd-llm", samples=samples)
        seconds[samples] = [s["seconds"] for s in report["steps"] if "block" in s]
    last = seconds[options.samples]
    slope, level, _ = _fit(list(range(len(last))), last)
    print(f"a block takes {level:.2f} s, and {slope / level:+.2%} more with each block behind it")
    totals = [sum(blocks) for blocks in seconds.values()]
    slope, level, error = _fit(list(seconds), totals)
    print(f"a job takes {level:.1f} s and {slope:.3f} s a window; off that line by {error:.1%}")
    return {"blocks": seconds, "per_window": slope, "fixed": level, "off_the_line": error}


def _fit(places: list[int], values: list[float]) -> tuple[float, float, float]:
    """Slope, value at 0, and the largest relative distance from the line of least squares."""
    x, y = torch.tensor(places, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    matrix = torch.stack((x, torch.ones_like(x)), dim=1)
    line = torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]
    error = float(((matrix @ line - y) / y).abs().max())
    return float(line[0]), float(line[1]), error


# -- inference ---------------------------------------------------------------------------


@torch.no_grad()
def _inference(title: str, model: Path, prompt: int = 512) -> dict[str, Any]:
    """Tokens per second of one block: ``prompt`` at once, and one by one behind it."""
    print(f"\n## {title}: inference, tokens per second\n", flush=True)
    config = AutoConfig.from_pretrained(model)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    block, rotary = whole.model.layers[0], whole.model.rotary_emb
    dense = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    forms = [("dense", 0.0), *((f, r) for r in RATIOS for f in PRODUCTS)]
    linears = {
        (form, ratio): {name: _factored(linear, form, ratio) for name, linear in dense.items()}
        for form, ratio in forms
    }
    seconds: dict[tuple[str, float, int], float] = {}
    for _ in range(_ROUNDS):  # in turns: what else the machine does hits all alike
        for form, ratio in forms:
            for name, module in linears[form, ratio].items():
                block.set_submodule(name, module)
            for tokens in (prompt, 1):
                hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16)
                place = rotary(hidden, torch.arange(tokens)[None])
                best = _best(partial(block, hidden, position_embeddings=place))
                key = form, ratio, tokens
                seconds[key] = min(best, seconds.get(key, best))
    print("| | ratio | prompt | over dense | decode | over dense |\n|---|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for form, ratio in forms:
        rates = [tokens / seconds[form, ratio, tokens] for tokens in (prompt, 1)]
        found[f"{form} {ratio}"] = rates
        base = found["dense 0.0"]
        cells = " | ".join(f"{r:.1f} | {r / b:.2f}" for r, b in zip(rates, base, strict=True))
        print(f"| {form} | {ratio or ''} | {cells} |", flush=True)
    return found


def _factored(linear: nn.Linear, form: str, ratio: float) -> nn.Module:
    if form == "dense":
        return linear
    rows, columns = linear.weight.shape
    stored = find_form(form)()
    rank = stored.largest_rank(rows, columns, (1 - ratio) * rows * columns)
    module = stored.module(columns, rows, rank, dtype=linear.weight.dtype)
    for value in module.parameters():
        nn.init.normal_(value, std=0.02)
    if isinstance(module, PivotLinear):
        pivots, rest = torch.randperm(rows).split((rank, rows - rank))
        order = torch.cat((pivots.sort().values, rest.sort().values))  # as factors are written
        module.pivots[order] = torch.arange(rows, dtype=module.pivots.dtype)
    return module.requires_grad_(False)


def _best(work: Callable[[], Any], least: float = 1.0) -> float:
    """Seconds of the fastest of the runs that fit into ``least`` seconds, five at least."""
    work()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < least:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


# -- jobs --------------------------------------------------------------------------------


def _job(
    options: argparse.Namespace,
    model: Path,
    work: Path,
    *settings: str,
    samples: int = 0,
    keep: bool = False,
) -> dict[str, Any]:
    """The report of a job of ``streamcomp compress``; with ``keep`` its output stays."""
    out = work / "out"
    sizes = ("--samples", str(samples or options.samples), "--seq-len", str(options.seq_len))
    text = ("--calibration", str(options.text))
    _python("-m", "streamcomp", "compress", str(model), str(out), *sizes, *text, *settings, "-q")
    report: dict[str, Any] = json.loads(
        next(iter(sorted(out.rglob("streamcomp_report.json")))).read_text("utf-8")
    )
    print(f"  ({' '.join(settings)}: {format_seconds(report['seconds'])})", file=sys.stderr)
    if not keep:
        shutil.rmtree(out)
    return report


def _stages(report: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a job, over all its steps."""
    total: dict[str, float] = {}
    for step in report["steps"]:
        for stage, seconds in step["stages"].items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def _python(*arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
