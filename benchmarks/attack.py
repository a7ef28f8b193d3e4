"""Attack every reader of files with damaged ones: a fuzzer with seeds.

    python benchmarks/attack.py --cases 100000 --jobs 2
    python benchmarks/attack.py --cases 2000 --targets config tokenizer
    python benchmarks/attack.py --only 1234

Each case damages one file (a safetensors header, an index, a config, a tokenizer, a journal, a
report, a compressed model) and has it read as a command would. A case may be accepted or end in one
of streamcomp's own errors. A fault is: any other exception; more than 5 seconds, twice; a process
that dies; more than 200 MB of memory; a header that the safetensors library refuses; a damaged
factor that is loaded; a continued job that finishes with other bytes. Prints a table of targets,
and a line with case numbers for each kind of fault; exits with 1 if there is one.

A case is decided by ``--seed`` and its number alone: ``--only`` repeats it in this process, shows
the whole traceback and leaves the damaged files to look at.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.attack

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.attack.targets import TARGETS, Case, make_bases  # noqa: E402
from tests.attack.workers import Limits, Result, draw, run_cases  # noqa: E402

_SHOWN_CASES = 5  # numbers per kind of fault
_NOTE_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, metavar="TARGET",
                        help=f"skip the cases of all others; of {', '.join(TARGETS)}")  # fmt: skip
    parser.add_argument("--only", type=int, metavar="CASE", help="repeat one case, and show it")
    parser.add_argument("--seconds", type=float, default=5.0, help="that one case may take")
    parser.add_argument("--work", type=Path, help="where folders are made (default: TMPDIR)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="attack-", dir=options.work) as work:
        bases, scratch = Path(work, "bases").absolute(), Path(work, "cases").absolute()
        bases.mkdir()
        scratch.mkdir()
        os.chdir(bases)  # names of files in journals are relative, so that each run has the same
        make_bases(bases)
        if options.only is not None:
            _repeat(options, bases)
            return
        numbers = range(options.first, options.first + options.cases)
        chosen = options.targets or list(TARGETS)
        attacked = [number for number in numbers if draw(options.seed, number)[0] in chosen]
        limits = Limits(seconds=options.seconds)
        started = time.monotonic()
        results = list(
            _noted(run_cases(attacked, options.seed, bases, scratch, limits, options.jobs))
        )
        os.chdir("/")
    faults = [result for result in results if result.fault]
    Console(width=120).print(_table(results))
    print(f"seed {options.seed}: {len(results)} cases in {time.monotonic() - started:.0f} s, "
          f"{len(faults)} faults")  # fmt: skip
    _print_faults(faults)
    sys.exit(bool(faults))


def _repeat(options: argparse.Namespace, bases: Path) -> None:
    """One case in this process."""
    target, random = draw(options.seed, options.only)
    folder = Path(tempfile.mkdtemp(prefix=f"case-{options.only}-", dir=options.work))
    print(f"case {options.only} of seed {options.seed}: {target}, in {folder}", flush=True)
    try:
        TARGETS[target][1](Case(random, bases, folder.absolute()))
    except BaseException:
        traceback.print_exc()
    else:
        print("accepted")


def _noted(results: Iterable[Result]) -> Iterable[Result]:
    """``results``, with a line about them every minute."""
    count = faults = 0
    told = time.monotonic()
    for result in results:
        count, faults = count + 1, faults + bool(result.fault)
        if time.monotonic() - told > _NOTE_SECONDS:
            told = time.monotonic()
            print(f"{count} cases, {faults} faults", file=sys.stderr, flush=True)
        yield result


def _table(results: list[Result]) -> Table:
    table = Table("target", "cases", "accepted", "refused", "faults", "slowest", "largest growth")
    for target in TARGETS:
        of_target = [result for result in results if result.target == target]
        if not of_target:
            continue
        sound = [result for result in of_target if not result.fault]
        refused = sum(result.refused for result in sound)
        slowest = max(of_target, key=lambda result: result.seconds)
        table.add_row(
            target,
            str(len(of_target)),
            str(len(sound) - refused),
            str(refused),
            str(len(of_target) - len(sound)),
            f"{slowest.seconds:.1f} s, case {slowest.number}",
            f"{max(result.growth_bytes for result in of_target) / 1e6:.0f} MB",
        )
    return table


def _print_faults(faults: list[Result]) -> None:
    """A line for each kind of fault, the most frequent first."""
    kinds: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in faults:
        kinds[result.target, result.fault.partition(": ")[0]].append(result)
    for (target, _), of_kind in sorted(kinds.items(), key=lambda item: -len(item[1])):
        cases = ", ".join(str(result.number) for result in of_kind[:_SHOWN_CASES])
        more = f" and {len(of_kind) - _SHOWN_CASES} more" if len(of_kind) > _SHOWN_CASES else ""
        print(f"{target}: {of_kind[0].fault}\n    cases {cases}{more}")


if __name__ == "__main__":
    main()
