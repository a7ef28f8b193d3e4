"""Jobs inside a cgroup of exactly their budget, without swap: the kernel is the judge.

    python benchmarks/memory.py .cache/SmolLM2-135M --max-ram 700M --text valid.txt
    python benchmarks/memory.py Llama-2-7B Llama-3-8B Llama-3-70B --blocks 2 --samples 8
    python benchmarks/memory.py Qwen3-30B-A3B gpt-oss-120b Mixtral-8x7B --blocks 1 --samples 4

MODEL is a folder, or one of the shapes of ``shapes.py``, of which a checkpoint with ``--blocks``
blocks of random weights is made first; shapes have a budget of their own where ``--max-ram`` gives
none. Prints what the plan predicted, what the job measured (VmHWM), the most the cgroup held in
memory that cannot be dropped (anonymous, shared and dirty pages), how often the kernel had to
kill, and the seconds of a block (its share of all sweeps). Exits with 1 if a job did not finish, or
held more than it was allowed. Where no cgroup can be made it says so and skips.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from cgroup import CgroupRun, CgroupUnavailable, run_limited
from rich.console import Console
from rich.table import Table
from shapes import make_shape

from streamcomp.recipe import METHODS
from streamcomp.units import format_bytes, format_seconds, parse_bytes

BUDGETS = {
    "TinyLlama-1.1B": "1G",
    "Llama-2-7B": "2560M",
    "Llama-3-8B": "2560M",
    "Llama-3-70B": "8G",
    "Llama-3.1-405B": "18G",
    "Qwen3-30B-A3B": "2G",
    "gpt-oss-120b": "4G",
    "Qwen3-235B-A22B": "4G",
    "Mixtral-8x7B": "4G",
    "DeepSeek-V3": "8G",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a folder, or {list(BUDGETS)}")
    parser.add_argument("--text", type=Path, help="calibration; default: Python's reference")
    parser.add_argument("--max-ram", help="default: 1G, or the shape's own")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2], help="of a shape")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0: its own")
    parser.add_argument("--samples", nargs="+", default=["64"])
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--form", default="pivot", choices=("pivot", "uv"))
    parser.add_argument("--methods", nargs="+", default=["svd-llm", "two-sided"], choices=METHODS)
    parser.add_argument("--refine", default="0", metavar="STEPS")
    parser.add_argument("--eval", action="store_true", help="evaluate what came out as well")
    parser.add_argument("--work", type=Path, default=Path("."), help="where folders are made")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    work = Path(tempfile.mkdtemp(prefix="memory-", dir=options.work))
    try:
        for model in options.models:
            for blocks in options.blocks if model in BUDGETS else (0,):
                rows += _of_model(options, model, blocks, work)
    except CgroupUnavailable as error:
        print(f"skipped: {error}")
        return
    finally:
        shutil.rmtree(work)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    Console(width=160).print(_table(rows))
    sys.exit(not all(row["sound"] for row in rows))


def _of_model(
    options: argparse.Namespace, model: str, blocks: int, work: Path
) -> list[dict[str, Any]]:
    """Every method on one checkpoint, which is made and deleted here where it is a shape."""
    if model not in BUDGETS:
        return _jobs(options, Path(model).name, Path(model), work)
    name = f"{model}, {blocks} blocks" if blocks > 1 else f"{model}, 1 block"
    name += f", {options.experts} experts" if options.experts else ""
    folder = make_shape(model, work / "model", blocks, experts=options.experts)
    try:
        return _jobs(options, name, folder, work, BUDGETS[model])
    finally:
        shutil.rmtree(folder)


def _jobs(
    options: argparse.Namespace, name: str, model: Path, work: Path, budget: str = "1G"
) -> list[dict[str, Any]]:
    limit = parse_bytes(options.max_ram or budget)
    rows = []
    for method in options.methods:
        for samples in options.samples:
            job = f"{name}: {method}, {samples} windows"
            rows.append(_row(job, limit, *_compress(options, model, method, samples, limit, work)))
            if options.eval:
                rows.append(_row(f"{name}: eval", limit, *_evaluate(limit, work)))
            shutil.rmtree(work / "out", ignore_errors=True)
    return rows


def _compress(
    options: argparse.Namespace, model: Path, method: str, samples: str, limit: int, work: Path
) -> tuple[CgroupRun, dict[str, Any]]:
    text = ("--calibration", str(options.text)) if options.text else ()
    run = run_limited(
        [
            *(sys.executable, "-m", "streamcomp", "compress", str(model), str(work / "out")),
            *("--max-ram", str(limit), "--samples", samples, "--seq-len", options.seq_len),
            *("--form", options.form, "--method", method, "--refine", options.refine),
            *("--json", *text),
        ],
        limit,
    )
    if run.returncode:
        return run, {}
    report = json.loads(run.stdout)
    steps = [step for step in report["steps"] if "block" in step]
    blocks = {step["block"] for step in steps}
    return run, {
        "predicted": report["memory"]["predicted_bytes"],
        "measured": report["memory"]["peak_bytes"],
        "seconds_per_block": sum(step["seconds"] for step in steps) / len(blocks),
    }


def _evaluate(limit: int, work: Path) -> tuple[CgroupRun, dict[str, Any]]:
    command = [sys.executable, "-m", "streamcomp", "eval", str(work / "out"), "--json"]
    run = run_limited([*command, "--max-ram", str(limit), "--windows", "16"], limit)
    if run.returncode:
        return run, {}
    found = json.loads(run.stdout)
    return run, {"predicted": found["predicted_bytes"], "measured": found["peak_bytes"]}


def _row(job: str, limit: int, run: CgroupRun, found: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a job; ``sound``: it finished within its budget and its plan."""
    if not found:
        print(run.stderr, file=sys.stderr)
    return {
        "job": job,
        "budget": limit,
        **found,
        "held": run.peak_held_bytes,
        "oom_kills": run.oom_kills,
        "seconds": run.seconds,
        "sound": bool(found)
        and run.oom_kills == 0
        and found["measured"] <= found["predicted"] <= limit,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("job", "budget", "predicted", "measured", "cgroup held", "oom kills", "ends")
    table.add_column("a block")
    table.add_column("in all")
    for row in rows:
        done = "measured" in row
        block = row.get("seconds_per_block")
        table.add_row(
            row["job"],
            format_bytes(row["budget"]),
            format_bytes(row["predicted"]) if done else "-",
            format_bytes(row["measured"]) if done else "-",
            format_bytes(row["held"]),
            str(row["oom_kills"]),
            "finished" if done else "refused or killed",
            format_seconds(block) if block else "-",
            format_seconds(row["seconds"]),
        )
    return table


if __name__ == "__main__":
    main()
