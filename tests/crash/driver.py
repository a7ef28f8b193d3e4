"""Kills jobs at numbered points, continues them, and says what was there; run by the tests.

``python -m tests.crash.driver MODEL TEXT FOLDER KIND`` prints one JSON object a line.
Each job is a process of its own, forked from this one so that nothing is imported again,
and ends itself with SIGKILL when it comes to its point: no timing is involved. Points lie
before, within and after everything that a job does to a disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from streamcomp.checkpoint import writer
from streamcomp.job.journal import JOURNAL, Journal, _line
from streamcomp.job.rows import StepRow
from streamcomp.machine.kernels import warm_up
from tests.jobs import compress, tree

# Of the first, points from beginning to end are tried; of the others, those between the embeddings
# and the rest, for what lies before and behind does not depend on the method.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"method": "svd-llm"},
    "compressed": {"method": "svd-llm", "statistics": "compressed"},
    "refined": {"update": True, "refine": 2, "store_every": 2, "include": "k_proj|down_proj"},
}

# Every ninth point is tried, and each of these. ``benchmarks/faults.py`` tries all.
_EVERY_POINT = 9
_ALWAYS = re.compile(
    r"committed|a shard|journal line|config\.json|k_proj\.safetensors|gradient-\d+\.bin"
)
_EVERY_WRITE = 8  # of the writes to a shard: there is one for each tensor
_MOST_POINTS = 30  # that one process comes to: enough to finish a block or to publish


class Points:
    """Counts the points that a job comes to, and kills it at the one numbered ``last``."""

    def __init__(self, last: int | None, only: str = "") -> None:
        self.last, self.only = last, only
        self.names: list[str] = []

    def __call__(self, name: str, damage: Callable[[], Any] | None = None) -> None:
        """The point ``name``; ``damage`` is done before the process dies there."""
        if not re.search(self.only, name):
            return
        if len(self.names) == self.last:
            if damage:
                damage()
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


def watch(point: Points) -> None:
    """Put points around all that a job does to a disk."""
    replace, pwrite, reserve = os.replace, os.pwrite, os.posix_fallocate
    unlink, rmdir, mkdir = Path.unlink, Path.rmdir, Path.mkdir
    commit, write = Journal.commit, writer._Write.__call__
    writes = 0

    def points_at_replace(source: Path, target: Path) -> None:
        point(f"before {Path(target).name} gets its name")
        replace(source, target)
        point(f"after {Path(target).name} got its name")

    def points_at_commit(journal: Journal, row: StepRow) -> None:
        line = _line(row)

        def tear() -> None:
            with journal.path.open("a") as file:
                file.write(line[: len(line) // 2])

        point(f"before {row.step} is committed")
        point(f"within the journal line of {row.step}", tear)
        commit(journal, row)
        point(f"after {row.step} is committed")

    def points_at_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        half = len(data) // 2
        point("within hidden states", lambda: pwrite(descriptor, data[:half], offset))
        return pwrite(descriptor, data, offset)

    def points_at_reserve(descriptor: int, offset: int, length: int) -> None:
        reserve(descriptor, offset, length)
        point("after hidden states got their length")

    def points_at_write(self: writer._Write, data: bytes | memoryview) -> None:
        nonlocal writes
        writes += 1

        def tear() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        if writes % _EVERY_WRITE == 0:
            point("within a shard", tear)
        write(self, data)

    def points_at_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            point(f"before {path.name} is removed")
        unlink(path, missing_ok)

    def points_at_rmdir(path: Path) -> None:
        point(f"before {path.name} is removed")
        rmdir(path)

    def points_at_mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(path, *args, **kwargs)
        point(f"after {path.name} is made")

    system: Any = os
    paths: Any = Path
    system.replace, system.pwrite, system.posix_fallocate = (
        points_at_replace,
        points_at_pwrite,
        points_at_reserve,
    )
    paths.unlink, paths.rmdir, paths.mkdir = (
        points_at_unlink,
        points_at_rmdir,
        points_at_mkdir,
    )
    Journal.commit = points_at_commit  # type: ignore[method-assign, assignment]
    writer._Write.__call__ = points_at_write  # type: ignore[method-assign]
    # A sync only matters to a power cut, which a test cannot make.
    system.fsync = system.fdatasync = lambda descriptor: None


class Driver:
    """Runs jobs of one kind on one model."""

    def __init__(self, model: Path, text: Path, folder: Path, kind: str) -> None:
        self.model, self.text, self.folder, self.kind = model, text, folder, kind

    def job(self, out: Path, last: int | None = None, only: str = "") -> tuple[bool, list[str]]:
        """One process: whether it was killed at its point, and the points it passed."""
        names = self.folder / "points.json"
        names.write_text("[]")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                points = Points(last, only)
                watch(points)
                compress(self.model, out, self.text, batch=4, **KINDS[self.kind])
                names.write_text(json.dumps(points.names))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.waitstatus_to_exitcode(status) != 0:
            raise SystemExit(f"the job in {out} failed")
        return killed, json.loads(names.read_text())

    def whole(self) -> None:
        """A run that nothing interrupts: what it writes, and at which points it can be killed."""
        _, self.points = self.job(self.folder / "whole")
        self.expected = model_files(self.folder / "whole")

    def kill_at(self, number: int, start: Path | None = None) -> dict[str, Any]:
        """Kill a job at a point, continue it to the end, and tell what was there."""
        out = self.folder / f"killed{number}"
        if start:
            shutil.copytree(start, out)
        killed, _ = self.job(out, number)
        loads = (out / "config.json").exists()
        whole = loads and model_files(out) == self.expected
        self.job(out)
        result = {
            "point": number,
            "killed": killed,
            "loads_before_the_end": loads and not whole,
            **self.compare(out),
        }
        shutil.rmtree(out)
        return result

    def compare(self, out: Path) -> dict[str, Any]:
        """What is wrong with a finished ``out``."""
        found = model_files(out)
        return {
            "different": sorted(
                name
                for name in {*found, *self.expected}
                if found.get(name) != self.expected.get(name)
            ),
            "left_over": sorted(
                str(path.relative_to(out)) for path in out.rglob("*") if path.name.startswith(".")
            ),
        }

    def every_step(self) -> dict[str, Any]:
        """Kill one job after each of its steps in turn."""
        out, runs = self.folder / "steps", 0
        while self.job(out, 0, only="after .* is committed")[0]:
            runs += 1
        return {"runs": runs, **self.compare(out)}

    def again_and_again(self, seed: int) -> dict[str, Any]:
        """Kill one job at random points until it is through."""
        out, draw, kills = self.folder / f"again{seed}", random.Random(seed), 0
        while self.job(out, draw.randrange(_MOST_POINTS))[0]:
            kills += 1
        return {"kills": kills, **self.compare(out)}


def model_files(out: Path) -> dict[str, bytes]:
    """All files of the model, but for the two that tell times and their summary."""
    told = ("streamcomp_report.json", "streamcomp_report.html", "README.md")
    return {
        name: data
        for name, data in tree(out).items()
        if name not in told and not name.startswith(".")
    }


def main() -> None:
    model, text, folder = map(Path, sys.argv[1:4])
    driver = Driver(model, text, folder, sys.argv[4])
    AutoModelForCausalLM.from_pretrained(model)  # imports what every job would import
    torch.set_num_threads(1)
    warm_up(torch.device("cpu"), torch.float32, gradients=True, training=True)
    driver.whole()

    def tell(kind: str, result: dict[str, Any]) -> None:
        print(json.dumps({"kind": kind, **result}), flush=True)

    blocks = (
        driver.points.index("after embed is committed"),
        driver.points.index("after block 1 is committed"),
    )
    for number, name in enumerate(driver.points):
        tried = number % _EVERY_POINT == 0 or _ALWAYS.search(name)
        if tried and (driver.kind == "dense" or blocks[0] <= number <= blocks[1]):
            tell("point", {"name": name, **driver.kill_at(number)})
    if driver.kind == "dense":
        return
    torn = folder / "torn"
    driver.job(torn, 0, only="within the journal line of block 0")
    line = (torn / ".streamcomp" / JOURNAL).read_bytes().splitlines(keepends=True)[-1]
    tell("torn", {"whole_line": line.endswith(b"\n")})
    for number in range(6):
        tell("point of a resumed job", driver.kill_at(number, start=torn))
    tell("every step", driver.every_step())
    for seed in range(3):
        tell("again and again", driver.again_and_again(seed))


if __name__ == "__main__":
    main()
