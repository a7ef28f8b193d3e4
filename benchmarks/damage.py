"""Damage every kind of file after every kind of step, continue the job, and see what it does.

    python benchmarks/damage.py --jobs 2
    python benchmarks/damage.py --kinds swsc rom --per-kind 2
    python benchmarks/damage.py --only "swsc/block 0/model/flip/0"

A job on a tiny model is stopped after each of its steps. Of each kind of file that is there then,
in OUT and in the work folder, one is damaged: a flipped bit, the last third zeroed, the second half
cut off, or the whole file deleted. Then the same command runs again. Sound are: the bytes of a job
that nothing disturbed (the step was done again, or the file was not needed any more), and exit code
6 with one line; the command once more must not finish with other bytes either. After the last step,
``streamcomp verify`` must notice every damage to OUT, and the command itself every file that is
missing or too short. (Of a model card, which anybody may edit, and of a report that is not there,
``verify`` tells in a note and exits with 0.) Where work is kept, it is also damaged before a job of
another ratio uses it; a journal that is cut short may then pass for that of a killed job: exit 7.

Prints a table of kinds of job and of damages, and a line for each fault; exits with 1 if there is
one. ``--only`` repeats a case by the name that the line gives, and shows what the command said.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.attack

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from streamcomp.job.journal import JOURNAL  # noqa: E402
from streamcomp.job.progress import SilentProgress  # noqa: E402
from streamcomp.job.publish import REPORT  # noqa: E402
from tests.attack.jobs import (  # noqa: E402
    KINDS,
    Ended,
    Place,
    model_digests,
    prepare,
    run_forked,
    run_here,
)

DAMAGES = ("flip", "zero", "cut", "delete")
_DAMAGED_EXIT, _USAGE_EXIT, _OTHER_JOB_EXIT = 6, 2, 7
_OTHER_RATIO = 0.6  # of the job that uses kept work
FINISHED, KEPT = "finished", "kept work"
RIGHT, NOTICED, FAULT = "right bytes", "noticed", "fault"


@dataclass(frozen=True)
class State:
    """What a job has left after one of its steps; the job goes on in a copy of ``place``."""

    kind: str
    step: str
    place: Place
    expected: dict[str, str]  # digests of the files of the model in the end

    def command(self, place: Place) -> list[str]:
        kind = KINDS[self.kind]
        if self.step != KEPT:
            return place.command(kind)
        return place.command(kind, ratio=_OTHER_RATIO)

    def files(self) -> Iterator[tuple[str, list[Path]]]:
        """Kinds of files with the paths of each, relative to the job's folder."""
        kinds: dict[str, list[Path]] = {}
        for path in sorted(self.place.folder.rglob("*")):
            if path.is_file() and path.stat().st_size:
                # hidden-00001.bin and hidden-00002.bin are of a kind, and so are all shards
                kind = re.split(r"[-.]\d", path.name)[0]
                kinds.setdefault(kind, []).append(path.relative_to(self.place.folder))
        yield from kinds.items()


@dataclass(frozen=True)
class Outcome:
    name: str  # of the case
    kind: str
    damage: str
    outcome: str
    fault: str = ""


@dataclass(frozen=True)
class DamageCase:
    state: State
    file_kind: str
    path: Path
    damage: str
    number: int

    @property
    def name(self) -> str:
        state = self.state
        return f"{state.kind}/{state.step}/{self.file_kind}/{self.damage}/{self.number}"

    def run(self, scratch: Path, *, tell: bool = False) -> Outcome:
        """Damage a copy and continue it."""
        folder = Path(tempfile.mkdtemp(dir=scratch))
        place = self.state.place.at(folder / "job")
        try:
            shutil.copytree(self.state.place.folder, place.folder)
            damage_file(place.folder / self.path, self.damage, Random(self.name))
            judge = self._finished if self.state.step == FINISHED else self._continued
            outcome, fault = judge(place, tell)
            if fault:
                outcome, fault = FAULT, f"{self.path}: {fault}"
            return Outcome(self.name, self.state.kind, self.damage, outcome, fault)
        finally:
            shutil.rmtree(folder)

    def _continued(self, place: Place, tell: bool) -> tuple[str, str]:
        """How the job went on, and what was wrong with that; "" if nothing was."""
        command = self.state.command(place)
        done = _told(run_forked(command), tell)
        if done.code == 0:
            return RIGHT, self._other_bytes(place)
        cut_journal = self.state.step == KEPT and self.file_kind == JOURNAL
        if cut_journal and done.code == _OTHER_JOB_EXIT and done.refused:
            return NOTICED, ""
        if done.code != _DAMAGED_EXIT or not done.refused:
            return NOTICED, str(done)
        again = _told(run_forked(command), tell)
        wrong = self._other_bytes(place) if again.code == 0 else ""
        if again.code != 0 and not again.refused:
            wrong = str(again)
        return NOTICED, wrong and f"noticed, then {wrong}"

    def _finished(self, place: Place, tell: bool) -> tuple[str, str]:
        if self.path.parts[0] != "out":
            return RIGHT, ""  # kept work, which a finished job does not need
        verified = _told(run_forked(["verify", str((place.folder / self.path).parent)]), tell)
        noted = self.file_kind == "README.md" or (self.file_kind, self.damage) == (REPORT, "delete")
        refused = verified.code == _DAMAGED_EXIT or (
            verified.refused and verified.code != _USAGE_EXIT
        )
        if not (refused or (noted and verified.code == 0)):
            return NOTICED, f"verify: {verified}"
        done = _told(run_forked(self.state.command(place)), tell)
        if done.code == _DAMAGED_EXIT and done.refused:
            return NOTICED, ""
        shows = self.damage in ("cut", "delete")
        if done.code or (shows and self._other_bytes(place)):
            return NOTICED, f"compress: {done}"
        return NOTICED, ""

    def _other_bytes(self, place: Place) -> str:
        now, wanted = model_digests(place.out), self.state.expected
        other = sorted(name for name in {*now, *wanted} if now.get(name) != wanted.get(name))
        return f"exit 0 with other bytes in {', '.join(other[:3])}" if other else ""


def _told(ended: Ended, tell: bool) -> Ended:
    if tell:
        print(f"exit {ended.code}\n{ended.error}")
    return ended


def damage_file(path: Path, damage: str, random: Random) -> None:
    """Damage ``path`` in its place."""
    if damage == "delete":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif damage == "zero":
        start = 2 * len(data) // 3
        # where there are zeros already, nothing would change
        data[start:] = (b"\0" if any(data[start:]) else b"\xff") * (len(data) - start)
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)


class Snapshots(SilentProgress):
    """Copies a job's folder after each step."""

    def __init__(self, place: Place, into: Path) -> None:
        self.place, self.into = place, into

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        shutil.copytree(self.place.folder, self.into / f"{step:02d} {name}")


def make_states(kind: str, place: Place) -> list[State]:
    """The states of one job after each of its steps."""
    job, steps = place.at(place.folder / kind / "job"), place.folder / kind / "steps"
    job.folder.mkdir(parents=True)
    run_here(lambda: job.compress(KINDS[kind], Snapshots(job, steps)))
    expected = model_digests(job.out)
    states = [
        State(kind, path.name.partition(" ")[2], place.at(path), expected)
        for path in sorted(steps.iterdir())
    ]
    states.append(State(kind, FINISHED, job, expected))
    if KINDS[kind].keep_work:
        kept = place.at(place.folder / kind / "kept")
        shutil.copytree(job.folder / "work", kept.folder / "work")
        other = State(kind, KEPT, kept, {})
        whole = place.at(place.folder / kind / "whole")
        shutil.copytree(kept.folder, whole.folder)
        if run_forked(other.command(whole)).code:
            raise SystemExit("a job with kept work that nothing disturbs failed")
        states.append(replace(other, expected=model_digests(whole.out)))
    return states


def all_cases(states: list[State], per_kind: int, seed: int) -> Iterator[DamageCase]:
    """Cases for ``per_kind`` files of each kind, after each step."""
    for state in states:
        for file_kind, paths in state.files():
            random = Random(f"{seed} {state.kind} {state.step} {file_kind}")
            random.shuffle(paths)
            for number, path in enumerate(paths[:per_kind]):
                for damage in DAMAGES:
                    yield DamageCase(state, file_kind, path, damage, number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
                        help=f"of {', '.join(KINDS)} (default: all)")  # fmt: skip
    parser.add_argument("--per-kind", type=int, default=1, metavar="FILES",
                        help="files of each kind after each step (default 1)")  # fmt: skip
    parser.add_argument("--cases", type=int, help="only so many, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="draws files, bits and --cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", metavar="NAME", help="repeat one case, and show what it said")
    parser.add_argument("--work", type=Path, help="where folders are made (default: TMPDIR)")
    options = parser.parse_args()
    kinds = [options.only.partition("/")[0]] if options.only else options.kinds
    with tempfile.TemporaryDirectory(prefix="damage-", dir=options.work) as work:
        place = prepare(Path(work).absolute())
        states = [state for kind in kinds for state in make_states(kind, place)]
        cases = list(all_cases(states, options.per_kind, options.seed))
        if options.cases:
            cases = Random(options.seed).sample(cases, min(options.cases, len(cases)))
        run = partial(DamageCase.run, scratch=place.folder, tell=bool(options.only))
        if options.only:
            outcomes = [run(case) for case in cases if case.name == options.only]
        else:
            forks = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(options.jobs, mp_context=forks) as pool:
                outcomes = list(pool.map(run, cases))
    faults = [outcome for outcome in outcomes if outcome.fault]
    Console(width=120).print(_table(outcomes))
    print(f"seed {options.seed}: {len(outcomes)} cases, {len(faults)} faults")
    for outcome in faults:
        print(f'--only "{outcome.name}"\n    {outcome.fault}')
    sys.exit(bool(faults) or not outcomes)


def _table(outcomes: list[Outcome]) -> Table:
    """A row for each kind of job and damage."""
    table = Table("job", "damage", "cases", RIGHT, NOTICED, "faults")
    for kind in KINDS:
        for damage in DAMAGES:
            count = Counter(o.outcome for o in outcomes if (o.kind, o.damage) == (kind, damage))
            if count:
                numbers = (count.total(), count[RIGHT], count[NOTICED], count[FAULT])
                table.add_row(kind, damage, *map(str, numbers))
    return table


if __name__ == "__main__":
    main()
