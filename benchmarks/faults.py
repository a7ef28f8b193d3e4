"""Let every durable operation of a job fail once: the disk is full or breaks, or the process dies.

    python benchmarks/faults.py --jobs 2
    python benchmarks/faults.py --kinds keep-work --faults kill --every 3
    python benchmarks/faults.py --only "swsc/no space/57"

Durable operations are those that change a disk: files opened for writing, writes, syncs, reserved
lengths, new names, removals, new folders. A job on a tiny model counts them; then, for each number
n, the job runs again with a fault at its n-th operation: SIGKILL (before it, or where bytes are
written, in the middle of it), "no space" or "broken" (EIO) once, or either at the n-th and at all
later ones. It must finish with the right bytes, die of the signal, or end in one line that says
what is wrong. The same command without a fault must then leave the bytes of a job that nothing
disturbed, and no temporary file.

Prints a table, and a line for each fault; exits with 1 if there is one. ``--only`` repeats a case
by the name that the line gives, and shows what the commands said. ``tests/crash`` kills jobs at
named points, ``benchmarks/kill.py`` at random moments of a real model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.attack

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tests.attack.jobs import KINDS, Ended, Place, model_digests, prepare, run_forked  # noqa: E402
from tests.attack.operations import FAULTS, Operations  # noqa: E402

DEFAULT = ("kill", "no space", "broken for good")
KEPT = "kept work"  # a job of another ratio, on the work that "keep-work" leaves
_OTHER_RATIO = 0.6


@dataclass(frozen=True)
class Job:
    """A job that is disturbed: its kind, what is in its folder before, and what it should leave."""

    name: str
    start: Place
    expected: dict[str, str]
    operations: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return arguments_of(self.name, self.start)


@dataclass(frozen=True)
class FaultCase:
    job: Job
    fault: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.job.name}/{self.fault}/{self.number}"

    def run(self, scratch: Path, *, tell: bool = False) -> tuple[FaultCase, str, str]:
        """The case, how the disturbed job ended, and what was wrong; "" if nothing was."""
        folder = Path(tempfile.mkdtemp(dir=scratch))
        place = self.job.start.at(folder / "job")
        try:
            shutil.copytree(self.job.start.folder, place.folder)
            operations = Operations(place.folder, self.number, self.fault)
            arguments = arguments_of(self.job.name, place)
            first = run_forked(arguments, before=operations.install)
            ended, fault = self._judged_first(first, place)
            second = run_forked(arguments)
            if tell:
                print(f"{self.job.operations[self.number]}: exit {first.code}\n{first.error}")
                print(f"then: exit {second.code}\n{second.error}")
            return self, ended, fault or self._judged_second(second, place)
        finally:
            shutil.rmtree(folder)

    def _judged_first(self, first: Ended, place: Place) -> tuple[str, str]:
        if first.code == 0:
            other = other_files(place, self.job.expected)
            return "finished", other and f"exit 0 with other bytes in {other}"
        if first.code == -signal.SIGKILL:
            return "killed", "" if self.fault == "kill" else str(first)
        return "one line", "" if first.refused else str(first)

    def _judged_second(self, second: Ended, place: Place) -> str:
        if second.code:
            return f"then {second}"
        if other := other_files(place, self.job.expected):
            return f"then other bytes in {other}"
        hidden = [path.name for path in place.out.rglob(".*")]
        hidden += [path.name for path in place.folder.rglob("*.tmp")]
        return f"left {', '.join(sorted(set(hidden))[:3])}" if hidden else ""


def kind_of(name: str) -> str:
    return "keep-work" if name == KEPT else name


def arguments_of(name: str, place: Place) -> list[str]:
    if name == KEPT:
        return place.command(KINDS[kind_of(name)], ratio=_OTHER_RATIO)
    return place.command(KINDS[name])


def other_files(place: Place, expected: dict[str, str]) -> str:
    """Names of some files that are not as they should be."""
    now = model_digests(place.out)
    names = sorted(name for name in {*now, *expected} if now.get(name) != expected.get(name))
    return ", ".join(names[:3])


def make_job(name: str, place: Place) -> Job:
    """Run a job undisturbed, and count its operations."""
    folder = place.folder / f"job {name}"
    start, whole = place.at(folder / "start"), place.at(folder / "whole")
    start.folder.mkdir(parents=True)
    if name == KEPT:
        before = place.at(folder / "before")
        before.folder.mkdir()
        _undisturbed(before, before.command(KINDS[kind_of(name)]))
        shutil.copytree(before.folder / "work", start.folder / "work")
    shutil.copytree(start.folder, whole.folder)
    names = folder / "operations"
    _undisturbed(whole, arguments_of(name, whole), names)
    return Job(name, start, model_digests(whole.out), tuple(names.read_text().split()))


def _undisturbed(place: Place, arguments: list[str], names: Path | None = None) -> None:
    before = None
    if names is not None:
        before = Operations(place.folder, names=names).install
    done = run_forked(arguments, before=before)
    if done.code:
        raise SystemExit(f"a job that nothing disturbs failed: {done.error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = [*KINDS, KEPT]
    parser.add_argument("--kinds", nargs="+", choices=jobs, default=jobs, metavar="KIND",
                        help=f"of {', '.join(jobs)} (default: all)")  # fmt: skip
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=DEFAULT, metavar="FAULT",
                        help=f"of {', '.join(FAULTS)} (default: {', '.join(DEFAULT)})")  # fmt: skip
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th number")
    parser.add_argument("--cases", type=int, help="only so many, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="draws --cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", metavar="NAME", help="repeat one case, and show what it said")
    parser.add_argument("--work", type=Path, help="where folders are made (default: TMPDIR)")
    options = parser.parse_args()
    kinds, faults = options.kinds, options.faults
    if options.only:
        kind, fault, _ = options.only.split("/")
        kinds, faults = [kind], [fault]
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.work) as work:
        place = prepare(Path(work).resolve())
        made = [make_job(kind, place) for kind in kinds]
        cases = [
            FaultCase(job, fault, number)
            for job in made
            for fault in faults
            for number in range(0, len(job.operations), options.every)
            if not options.only or number == int(options.only.rpartition("/")[2])
        ]
        if options.cases:
            cases = Random(options.seed).sample(cases, min(options.cases, len(cases)))
        run = partial(FaultCase.run, scratch=place.folder, tell=bool(options.only))
        if options.only:
            results = [run(case) for case in cases]
        else:
            forks = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(options.jobs, mp_context=forks) as pool:
                results = list(pool.map(run, cases))
    Console(width=120).print(_table(results))
    faulty = [(case, wrong) for case, _, wrong in results if wrong]
    print(f"{len(results)} cases, {len(faulty)} faults")
    for case, wrong in faulty:
        print(f'--only "{case.name}" ({case.job.operations[case.number]})\n    {wrong}')
    sys.exit(bool(faulty) or not results)


def _table(results: list[tuple[FaultCase, str, str]]) -> Table:
    """A row for each job and fault."""
    table = Table("job", "operations", "fault", "cases", "finished", "killed", "one line", "faults")
    rows: dict[tuple[str, str], list[tuple[FaultCase, str, str]]] = {}
    for result in results:
        rows.setdefault((result[0].job.name, result[0].fault), []).append(result)
    order = [*KINDS, KEPT]
    for (name, fault), row in sorted(rows.items(), key=lambda item: order.index(item[0][0])):
        count = Counter("fault" if wrong else ended for _, ended, wrong in row)
        operations = len(row[0][0].job.operations)
        ends = (count["finished"], count["killed"], count["one line"], count["fault"])
        table.add_row(name, str(operations), fault, str(len(row)), *map(str, ends))
    return table


if __name__ == "__main__":
    main()
