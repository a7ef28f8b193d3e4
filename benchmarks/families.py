"""Which types of causal language models streamcomp works with, tried on a tiny model of each.

    python benchmarks/families.py --jobs 2 --json out/families.json
    python benchmarks/families.py --only llama mixtral

Run it in the root of the repository: what is built and checked is in ``tests/families``. Every type
that the installed transformers knows is tried in a process of its own, which a crash or a lack of
time ends alone. A line is printed for each type, and exit code 1 tells that something is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.families

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.families.checks import TRACEBACK, WRONG, Family, Step, check_family  # noqa: E402
from tests.families.tiny import causal_types  # noqa: E402

FAULTS = (WRONG, TRACEBACK)
_FORK = multiprocessing.get_context("fork")


def main() -> int:
    options = _options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    kinds = options.only or sorted(causal_types())
    families: list[Family] = []
    for family, seconds in _all(kinds, options.jobs, options.timeout):
        families.append(family)
        print(_line(family, seconds), flush=True)
        if options.json:
            found = sorted(families, key=lambda family: family.kind)
            options.json.write_text(json.dumps([family.to_dict() for family in found], indent=1))
    counts = Counter(family.verdict for family in families)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return 1 if any(counts[fault] for fault in FAULTS) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types alone")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for a type")
    parser.add_argument("--json", type=Path, help="all that came out, rewritten after each type")
    return parser.parse_args()


# -- one process a type ------------------------------------------------------------------


class _Child:
    """A process that checks one type and tells after each step what it has so far."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.family, self.started = Family(kind), time.perf_counter()
        self.folder = folder
        self.pipe, end = _FORK.Pipe(duplex=False)
        self.process = _FORK.Process(target=_check, args=(kind, folder, end), daemon=True)
        self.process.start()
        end.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def listen(self) -> bool:
        """Take what the child has told; False when it has ended."""
        with suppress(EOFError):
            while self.pipe.poll():
                self.family = self.pipe.recv()
            return True
        return False

    def end(self, fault: str = "") -> Family:
        """Wait for the child, or kill it for ``fault``."""
        if fault:
            self.process.kill()
        self.process.join()
        if not fault and self.process.exitcode:
            fault = f"the process ended with exit code {self.process.exitcode}"
        if fault:
            last = self.family.steps[-1].name if self.family.steps else "the start"
            self.family.steps.append(Step("process", TRACEBACK, f"{fault}, after {last}"))
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.family


def _check(kind: str, folder: Path, end: Connection) -> None:
    folder.mkdir(parents=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):  # what transformers has to say would drown the lines
        os.dup2(log, stream)
    check_family(kind, folder, end.send)


def _all(kinds: Sequence[str], jobs: int, timeout: float) -> Iterator[tuple[Family, float]]:
    """Check ``kinds``, ``jobs`` at a time; each family with its seconds as it ends."""
    waiting, running = list(kinds), list[_Child]()
    with tempfile.TemporaryDirectory(prefix="families-") as work:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind = waiting.pop(0)
                running.append(_Child(kind, Path(work) / kind))
            wait([child.pipe for child in running], timeout=1.0)
            for child in list(running):
                slow = child.seconds > timeout
                if child.listen() and not slow:
                    continue
                running.remove(child)
                yield child.end(f"no end after {timeout:.0f} s" if slow else ""), child.seconds


# -- what is told ------------------------------------------------------------------------


def _line(family: Family, seconds: float) -> str:
    line = f"{family.kind:24} {family.verdict:10} {seconds:5.1f} s"
    reason = family.reason
    if reason is not None:
        return f"{line}  {reason.name}: {reason.detail[:160]} {reason.where}".rstrip()
    exact = "exact" if family.exact else "rounding"
    return f"{line}  {family.share or 0.0:4.0%} in reach, streamed {exact}"


if __name__ == "__main__":
    sys.exit(main())
