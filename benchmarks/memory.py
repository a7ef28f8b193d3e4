"""A job inside a cgroup of exactly its budget, without swap: the kernel is the judge.

    python benchmarks/memory.py .cache/SmolLM2-135M --text valid.txt --max-ram 1G

Prints what the plan predicted, what the job measured (VmHWM), the most the cgroup held in
memory that cannot be dropped (anonymous, shared and dirty pages), and how often the kernel
had to kill. Exits with 1 if the job did not finish, or held more than it was allowed. Where no
cgroup can be made it says so and skips.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from cgroup import CgroupRun, CgroupUnavailable, run_limited
from rich.console import Console
from rich.table import Table

from streamcomp.recipe import METHODS
from streamcomp.units import format_bytes, format_seconds, parse_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="calibration; default: Python's reference")
    parser.add_argument("--max-ram", default="1G")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--form", default="pivot", choices=("pivot", "uv"))
    parser.add_argument("--method", default="two-sided", choices=METHODS)
    parser.add_argument("--refine", default="0", metavar="STEPS")
    options = parser.parse_args()
    limit = parse_bytes(options.max_ram)
    table = Table("job", "budget", "predicted", "measured", "cgroup held", "oom kills", "time")
    work = Path(tempfile.mkdtemp(prefix="memory-", dir="."))
    try:
        sound = _compress(options, limit, work, table) and _evaluate(options, limit, work, table)
    except CgroupUnavailable as error:
        print(f"skipped: {error}")
        return
    finally:
        shutil.rmtree(work)
    Console().print(table)
    sys.exit(not sound)


def _compress(options: argparse.Namespace, limit: int, work: Path, table: Table) -> bool:
    text = ("--calibration", str(options.text)) if options.text else ()
    run = run_limited(
        [
            *(
                sys.executable,
                "-m",
                "streamcomp",
                "compress",
                str(options.model),
                str(work / "out"),
            ),
            *("--max-ram", str(limit), "--samples", options.samples, "--form", options.form),
            *("--method", options.method, "--refine", options.refine),
            *("--json", *text),
        ],
        limit,
    )
    memory = json.loads(run.stdout)["memory"] if run.returncode == 0 else {}
    return _row(
        table,
        f"compress, {options.method}",
        limit,
        memory.get("predicted_bytes"),
        memory.get("peak_bytes"),
        run,
    )


def _evaluate(options: argparse.Namespace, limit: int, work: Path, table: Table) -> bool:
    command = [sys.executable, "-m", "streamcomp", "eval", str(work / "out"), "--json"]
    run = run_limited([*command, "--max-ram", str(limit), "--windows", "16"], limit)
    found = json.loads(run.stdout) if run.returncode == 0 else {}
    return _row(table, "eval", limit, found.get("predicted_bytes"), found.get("peak_bytes"), run)


def _row(
    table: Table, job: str, limit: int, predicted: int | None, measured: int | None, run: CgroupRun
) -> bool:
    """Add a row; whether the job finished within its budget."""
    if predicted is None or measured is None:
        print(run.stderr, file=sys.stderr)
    table.add_row(
        job,
        format_bytes(limit),
        format_bytes(predicted) if predicted else "-",
        format_bytes(measured) if measured else "-",
        format_bytes(run.peak_held_bytes),
        str(run.oom_kills),
        format_seconds(run.seconds),
    )
    return (
        run.returncode == 0
        and run.oom_kills == 0
        and measured is not None
        and predicted is not None
        and measured <= predicted <= limit
    )


if __name__ == "__main__":
    main()
