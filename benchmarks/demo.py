"""Compress a model under 1 GiB of RAM, evaluate it before and after, and print one table.

    python benchmarks/demo.py .cache/SmolLM2-135M out/SmolLM2-135M

Each of the three jobs is a process of its own, run through the command line like anybody's;
what is done already is not done again: evaluations lie beside OUT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from streamcomp.units import format_bytes, format_seconds

RATIO = "0.2"
BUDGET = "1G"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    paths = parser.parse_args()
    _streamcomp("compress", str(paths.model), str(paths.out), "--ratio", RATIO, "--max-ram", BUDGET)
    report = json.loads((paths.out / "streamcomp_report.json").read_text("utf-8"))
    dense = _evaluated(paths.model, paths.out.with_name(f"{paths.out.name}.dense.json"))
    compressed = _evaluated(paths.out, paths.out.with_name(f"{paths.out.name}.compressed.json"))
    _print_table(paths.out, report, dense, compressed)


def _evaluated(model: Path, kept: Path) -> dict[str, Any]:
    """The evaluation of ``model`` on held-out text, from ``kept`` where it was done before."""
    config = model / "config.json"
    if not kept.is_file() or kept.stat().st_mtime < config.stat().st_mtime:
        options = ("--windows", "0", "--max-ram", BUDGET)
        text = _streamcomp("eval", str(model), *options, "--json", capture=True)
        kept.write_text(text, "utf-8")
    result: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    return result


def _streamcomp(command: str, *arguments: str, capture: bool = False) -> str:
    """Run the command line; end with its exit code where it fails."""
    print(f"$ streamcomp {command} {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "streamcomp", command, *arguments],
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def _print_table(
    out: Path, report: dict[str, Any], dense: dict[str, Any], compressed: dict[str, Any]
) -> None:
    model, memory = report["model"], report["memory"]
    stages = [f"{name} {format_seconds(seconds)}" for name, seconds in report["stages"].items()]
    stages += [
        f"evaluating {format_seconds(dense['seconds'])} + {format_seconds(compressed['seconds'])}"
    ]
    table = Table("", "dense", "compressed", title=f"{out.name}, ratio {model['ratio']:.4f}")
    table.add_row(
        "linear parameters",
        f"{model['linear_parameters']:,}",
        f"{model['linear_parameters_kept']:,}",
    )
    table.add_row("bytes on disk", format_bytes(model["bytes"]), format_bytes(model["bytes_kept"]))
    table.add_row(
        f"perplexity ({dense['windows']} held-out windows)",
        f"{dense['perplexity']:.2f}",
        f"{compressed['perplexity']:.2f}",
    )
    table.add_row(
        "peak RAM, evaluating",
        format_bytes(dense["peak_bytes"]),
        format_bytes(compressed["peak_bytes"]),
    )
    table.add_row(
        "peak RAM, compressing",
        "",
        f"{format_bytes(memory['peak_bytes'])} measured, "
        f"{format_bytes(memory['predicted_bytes'])} predicted, "
        f"{format_bytes(memory['budget_bytes'])} allowed",
    )
    table.add_row("seconds", "", "\n".join(stages))
    console = Console()
    console.print(table)
    console.print("load it:", style="bold")
    console.print(
        "  import streamcomp; from transformers import AutoModelForCausalLM; "
        f'model = AutoModelForCausalLM.from_pretrained("{out}")',
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
