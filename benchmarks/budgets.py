"""Run jobs with many budgets in memory cgroups of that size: none may be killed.

    python benchmarks/budgets.py
    python benchmarks/budgets.py .cache/SmolLM2-135M narrow --budgets 10 --ways alone ulimit

For each model, budgets are spread from too small to ample. Each is tried in one of four ways, in
turn:

- alone: a cgroup of the budget, without swap, and ``--max-ram`` of that size;
- beside: a cgroup of the budget and as much again as another program takes there meanwhile;
- free: the other program has its memory first, and the job is given no ``--max-ram``;
- ulimit: no cgroup but ``ulimit -v``, the budget on top of what an idle process has mapped. A job
  maps more than what becomes resident, so it has to be refused where the budget alone would do.

A job must finish within its budget and its plan, or exit with 5 before it has made anything, naming
a least budget, a least ``ulimit -v`` or both; the least and the largest that were named are then
tried (budgets alone) and must finish. Where not even a plan can be made, the limit that it needs is
named; with that the job itself may be refused, and the limit named then must do.
Whatever the kernel kills is a fault, and so is a traceback. Prints a table; exits with 1 if there
is a fault. Where no cgroup can be made it says so, and tries ``ulimit`` alone.

MODEL is a folder, or one of the shapes of benchmarks/shapes.py and of this file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cgroup import CgroupRun, CgroupUnavailable, run_limited
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, make_shape

from streamcomp.units import format_bytes, parse_bytes

# As in shapes.py: hidden, feed-forward, heads, key-value heads, vocabulary, blocks.
SHAPES |= {
    "narrow": (768, 2050, 12, 1, 8000, 2),
    "words": (128, 256, 4, 4, 262_144, 2),
}
_BLOCKS = 1  # of the larger shapes
WAYS = ("alone", "beside", "free", "ulimit")
_OTHER_BYTES = 200 * 2**20  # that the other program takes
_AMPLE_SHARE = 1.25  # of the peak that a job with any budget has
_DEFAULT_SHARE = 0.8  # of free memory, without --max-ram
_BUDGET_EXIT = 5
_NAMED = re.compile(r"(?:--max-ram (\d+)M)?(?: with )?(?:ulimit -v (\d+))? fits$", re.M)

# Takes memory in 20 steps, then holds it; the first argument is bytes, the second seconds.
_OTHER = """
import sys, time
held, steps = [], 20
size, pause = (int(sys.argv[1]) - 12 * 2**20) // steps, float(sys.argv[2]) / steps
for _ in range(steps):
    held.append(bytearray(b"x") * size)
    time.sleep(pause)
time.sleep(3600)
"""
# Starts the other program, waits for it if so told, runs the command and ends both.
_BESIDE = """
"$1" -c "$2" "$3" "$4" & other=$!
sleep "$5"
shift 5
"$@"
code=$?
kill $other
exit $code
"""
_MAPPED = """
import streamcomp, torch, transformers, psutil
process = psutil.Process().memory_info()
print(process.vms - process.rss)
"""


@dataclass(frozen=True)
class Row:
    model: str
    way: str
    budget: int
    run: CgroupRun
    predicted: int = 0
    measured: int = 0
    least: int = 0  # budget that was named
    limit: int = 0  # KiB for ulimit -v that were named
    only_plan: bool = False  # they are for a plan alone
    fault: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL",
                        default=["narrow", "words", "TinyLlama-1.1B"],
                        help="default: narrow words TinyLlama-1.1B")  # fmt: skip
    parser.add_argument("--budgets", type=int, default=30, help="per model (default 30)")
    parser.add_argument("--smallest", default="420M", metavar="SIZE",
                        help="least budget that is tried (default 420M): the interpreter with its "
                        "libraries alone takes more than 300M")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--method", default="two-sided")
    parser.add_argument("--samples", default="16")
    parser.add_argument("--seq-len", default="128")
    parser.add_argument("--work", type=Path, default=Path("."), help="where folders are made")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="budgets-", dir=options.work)).resolve()
    rows: list[Row] = []
    try:
        for model in options.models:
            for row in _of_model(options, model, work):
                _tell(row)
                rows.append(row)
    finally:
        shutil.rmtree(work)
    Console(width=140).print(_table(rows))
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} jobs, {len(faults)} faults")
    for row in faults:
        print(f"{row.model}, {row.way}, {format_bytes(row.budget)}: {row.fault}")
    sys.exit(bool(faults))


def _of_model(options: argparse.Namespace, model: str, work: Path) -> Iterator[Row]:
    """Every budget on one model, which is made here where it is a shape."""
    folder, ways = Path(model), list(options.ways)
    if model in SHAPES:
        blocks = 0 if SHAPES[model][0] < 2048 else _BLOCKS
        folder = make_shape(model, work / "model", blocks)
    jobs = Jobs(options, Path(model).name, folder, work)
    if set(ways) - {"ulimit"}:
        try:
            run_limited(["true"], 2**26)
        except CgroupUnavailable as error:
            print(f"only with ulimit: {error}")
            ways = ["ulimit"]
    try:
        named: list[int] = []
        limits: list[Row] = []
        for number, budget in enumerate(jobs.budgets()):
            row = jobs.run(ways[number % len(ways)], budget)
            limits += [row] if row.limit else []
            named += [row.least] if row.least and not row.limit else []
            yield row
        for least in sorted({min(named), max(named)}) if named else ():
            yield jobs.run(ways[0], least, must_fit=True)
        limits.sort(key=lambda row: row.limit)
        for row in dict.fromkeys((limits[0], limits[-1])) if limits else ():
            yield (again := jobs.run_named(row))
            if again.limit:
                yield jobs.run_named(again)
    finally:
        if model in SHAPES:
            shutil.rmtree(folder)


class Jobs:
    """Jobs on one model, each in a fresh OUT."""

    def __init__(self, options: argparse.Namespace, name: str, folder: Path, work: Path) -> None:
        self.options, self.name, self.folder, self.out = options, name, folder, work / "out"
        self.mapped = int(_output([sys.executable, "-c", _MAPPED]))
        self.seconds = 20.0  # of a job, as far as is known

    def budgets(self) -> list[int]:
        """From too small to ample, evenly, in whole MiB."""
        command = [*self._command("plan"), "--max-ram", "64G"]
        peak = json.loads(_output(command))["peak_bytes"]
        smallest, count = parse_bytes(self.options.smallest), self.options.budgets
        largest = max(_AMPLE_SHARE * peak, 1.1 * smallest)
        step = (largest - smallest) / max(1, count - 1)
        return [int(smallest + number * step) // 2**20 * 2**20 for number in range(count)]

    def run_named(self, row: Row) -> Row:
        """A job with the limit of addresses that one before was refused with."""
        budget = max(row.least, row.budget)
        return self.run("ulimit", budget, row.limit, must_fit=not row.only_plan)

    def run(self, way: str, budget: int, limit: int = 0, *, must_fit: bool = False) -> Row:
        """One job, judged; ``limit`` is for ulimit, in KiB, instead of what the budget makes it."""
        shutil.rmtree(self.out, ignore_errors=True)
        kib = 0
        command = self._command("compress", str(self.out))
        if way != "free":
            command += ["--max-ram", str(budget)]
        if way == "ulimit":
            kib = limit or (self.mapped + budget) // 1024
            run = _run([*("sh", "-c", f'ulimit -v {kib} && exec "$@"', "sh"), *command])
        elif way == "alone":
            run = run_limited(command, budget)
        else:
            first = way == "free"
            fills = 2.0 if first else self.seconds  # seconds until it has all its memory
            other = ["sh", "-c", _BESIDE, "sh", sys.executable, _OTHER]
            other += [str(_OTHER_BYTES), str(fills), str(fills + 1 if first else 0)]
            run = run_limited([*other, *command], budget + _OTHER_BYTES)
        if run.returncode == 0:
            self.seconds = run.seconds
            return self._finished(way, budget, run)
        row = Row(self.name, way, budget, run)
        named = _NAMED.search(run.stderr)
        if must_fit or run.returncode != _BUDGET_EXIT or named is None or run.oom_kills:
            return replace(row, fault=_last(run))
        least, limit = int(named[1] or 0) * 2**20, int(named[2] or 0)
        fault = "made OUT before it refused" if self.out.exists() else ""
        if 0 < least <= (_DEFAULT_SHARE if way == "free" else 1) * budget:
            fault = f"names {format_bytes(least)}, which is not more than it has"
        if 0 < limit <= (kib if way == "ulimit" else limit):
            fault = f"names ulimit -v {limit}, which is not more than it has"
        only_plan = "for a plan" in run.stderr
        return replace(row, least=least, limit=limit, only_plan=only_plan, fault=fault)

    def _finished(self, way: str, budget: int, run: CgroupRun) -> Row:
        memory = json.loads(run.stdout)["memory"]
        predicted, measured = memory["predicted_bytes"], memory["peak_bytes"]
        fault = f"{run.oom_kills} processes were killed" if run.oom_kills else ""
        if not measured <= predicted <= budget:
            fault = "took more than its plan or its budget"
        return Row(self.name, way, budget, run, predicted, measured, fault=fault)

    def _command(self, command: str, *out: str) -> list[str]:
        settings = self.options
        return [
            *(sys.executable, "-m", "streamcomp", command, str(self.folder), *out, "--json"),
            *("--method", settings.method, "--samples", settings.samples),
            *("--seq-len", settings.seq_len, "--quiet"),
        ]


def _run(command: list[str]) -> CgroupRun:
    """A command without a cgroup."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    return CgroupRun(done.returncode, done.stdout, done.stderr, 0, 0, 0, seconds)


def _output(command: list[str]) -> str:
    """What a command that cannot fail prints."""
    done = _run(command)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def _last(run: CgroupRun) -> str:
    line = (run.stderr.strip().splitlines() or [""])[-1]
    killed = f", {run.oom_kills} killed for memory" if run.oom_kills else ""
    return f"exit {run.returncode}{killed}: {line[:160]}"


def _ending(row: Row) -> str:
    if row.fault:
        return "FAULT"
    named = [format_bytes(row.least)] if row.least else []
    named += [f"ulimit -v {row.limit}"] if row.limit else []
    return f"refused, {' with '.join(named)} fits" if named else "finished"


def _tell(row: Row) -> None:
    print(f"{row.model}, {row.way}, {format_bytes(row.budget)}: {_ending(row)} {row.fault}",
          file=sys.stderr, flush=True)  # fmt: skip


def _table(rows: list[Row]) -> Table:
    """A row for each job."""
    table = Table("model", "way", "budget", "ends", "predicted", "measured", "held", "seconds")
    for row in rows:
        done = row.measured > 0
        table.add_row(
            row.model,
            row.way,
            format_bytes(row.budget),
            _ending(row),
            format_bytes(row.predicted) if done else "-",
            format_bytes(row.measured) if done else "-",
            format_bytes(row.run.peak_held_bytes) if row.run.peak_held_bytes else "-",
            f"{row.run.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
