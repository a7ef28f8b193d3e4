"""Runs cases in processes that may hang, grow or die, and says how each case went.

A worker is a fork of this process, with a limit on its address space. It takes cases one after the
other; where one lasts too long, the worker is killed and another goes on behind it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

from streamcomp.errors import StreamcompError
from streamcomp.machine.memory import PeakMeter, resident_bytes
from tests.attack.targets import TARGETS, Case, target_of

__all__ = ["Limits", "Result", "draw", "run_cases"]

_CASES_PER_WORKER = 200
_POLL_SECONDS = 0.1
_ADDRESS_BYTES = 4 * 2**30  # on top of what a worker begins with: a flood ends in MemoryError

Attack = Callable[[Case], None]


@dataclass(frozen=True)
class Limits:
    """What a case may take."""

    seconds: float = 5.0
    growth_bytes: int = 200 * 10**6


@dataclass(frozen=True)
class Result:
    """How a case went: ``fault`` is empty where it was accepted or refused as it should be."""

    number: int
    target: str
    refused: bool = False
    fault: str = ""
    seconds: float = 0.0  # of the processor
    growth_bytes: int = 0


def draw(seed: int, number: int) -> tuple[str, Random]:
    """The target of a case, and the source of all its random numbers."""
    random = Random(f"{seed} {number}")
    return target_of(random), random


def run_cases(
    numbers: Sequence[int], seed: int, bases: Path, scratch: Path, limits: Limits, jobs: int = 1
) -> Iterator[Result]:
    """Results of the cases ``numbers`` in the order in which they end, ``jobs`` at a time.

    A case that takes too long gets a second chance, because a busy machine makes any case slow.
    """
    chunks = deque(
        list(numbers[start : start + _CASES_PER_WORKER])
        for start in range(0, len(numbers), _CASES_PER_WORKER)
    )
    slow: set[int] = set()
    workers: list[_Worker] = []
    try:
        while chunks or workers:
            while chunks and len(workers) < jobs:
                workers.append(_Worker(chunks.popleft(), seed, bases, scratch, limits))
            wait([worker.connection for worker in workers], timeout=_POLL_SECONDS)
            for worker in list(workers):
                yield from worker.results()
                fault = worker.fault(limits)
                if fault is None:
                    continue
                workers.remove(worker)
                left = worker.stop()
                if fault and left:
                    if fault.startswith("still") and left[0] not in slow:
                        slow.add(left[0])
                    else:
                        target, _ = draw(seed, left[0])
                        yield Result(left.pop(0), target, fault=fault)
                if left:
                    chunks.appendleft(left)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that runs ``numbers`` one after the other, seen from its parent."""

    def __init__(
        self, numbers: list[int], seed: int, bases: Path, scratch: Path, limits: Limits
    ) -> None:
        self._left = numbers
        self._since = time.monotonic()
        self._ended = False
        forks = multiprocessing.get_context("fork")
        self.connection, theirs = forks.Pipe(duplex=False)
        self._process = forks.Process(
            target=_work, args=(theirs, list(numbers), seed, bases, scratch, limits)
        )
        self._process.start()
        theirs.close()

    def results(self) -> Iterator[Result]:
        """Results that have come since the last call."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll():
                result: Result = self.connection.recv()
                self._left.remove(result.number)
                self._since = time.monotonic()
                yield result
            return
        self._ended = True

    def fault(self, limits: Limits) -> str | None:
        """Why the worker has ended or has to; "" where it is through; None while it runs well."""
        if self._ended:
            self._process.join()
            return f"the process died ({self._process.exitcode})" if self._left else ""
        late = time.monotonic() - self._since > limits.seconds + 1
        return f"still not done after {limits.seconds:g} s" if late else None

    def stop(self) -> list[int]:
        """End the process; the cases that it has not finished."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        return self._left


def _work(
    results: Connection, numbers: list[int], seed: int, bases: Path, scratch: Path, limits: Limits
) -> None:
    """The worker itself: send a result for each case."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(bases)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ADDRESS_BYTES, hard))
    for number in numbers:
        target, random = draw(seed, number)
        _, attack = TARGETS[target]
        results.send(_judged(number, target, random, attack, bases, scratch, limits))
    results.close()


def _judged(
    number: int,
    target: str,
    random: Random,
    attack: Attack,
    bases: Path,
    scratch: Path,
    limits: Limits,
) -> Result:
    folder = scratch / str(number)
    shutil.rmtree(folder, ignore_errors=True)  # of a first attempt that was killed
    folder.mkdir()
    before, started = resident_bytes(), time.process_time()  # which no other process slows down
    PeakMeter.reset_mark()
    refused, fault = False, ""
    try:
        attack(Case(random, bases, folder))
    except BaseException as error:  # whatever it is, it is what the case is for
        refused, fault = True, "" if _is_own(error) else described(error)
    seconds, growth = time.process_time() - started, PeakMeter.mark() - before
    shutil.rmtree(folder, ignore_errors=True)
    if not fault and growth > limits.growth_bytes:
        fault = f"grew by {growth / 1e6:.0f} MB"
    return Result(number, target, refused, fault, seconds, growth)


def _is_own(error: BaseException) -> bool:
    """Whether a caller can tell what to do from the error alone."""
    loader = isinstance(error, ValueError | RuntimeError) and str(error).startswith("streamcomp:")
    return loader or isinstance(error, StreamcompError)


def described(error: BaseException) -> str:
    """An exception on one line, with the last line of the package that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if "/streamcomp/" in frame.filename]
    place = f" at {Path(places[-1].filename).name}:{places[-1].lineno}" if places else ""
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}{place}: {text}"
