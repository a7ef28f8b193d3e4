"""Damaged files are refused with an error of streamcomp's own; what the fuzzer would notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from unittest import mock

import pytest

from streamcomp.errors import SourceError
from tests.attack import mutations
from tests.attack.targets import TARGETS, Case, WronglyAccepted
from tests.attack.workers import Limits, Result, draw, run_cases
from tests.jobs import ENVIRONMENT, REPOSITORY

VALUE = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}, "e": "text"}


def test_five_hundred_damaged_files_end_in_own_errors_or_are_sound() -> None:
    command = [sys.executable, "benchmarks/attack.py", "--cases", "500", "--seconds", "60"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "500 cases" in done.stdout
    assert all(target in done.stdout for target in TARGETS)


# -- the same numbers, the same case -------------------------------------------------------------


@pytest.mark.parametrize("number", range(50))
def test_a_mutation_is_decided_by_its_seed(number: int) -> None:
    one, other = (mutations.mutated_json(VALUE, Random(number)) for _ in range(2))

    assert one == other


def test_mutations_leave_what_they_put_in_as_it_was() -> None:
    before = [mutations.mutated_json(VALUE, Random(number)) for number in range(3000)]

    assert [mutations.mutated_json(VALUE, Random(number)) for number in range(3000)] == before


def test_mutations_differ_and_reach_every_part() -> None:
    texts = {mutations.mutated_json(VALUE, Random(number)) for number in range(500)}

    assert len(texts) > 300
    assert VALUE == {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}, "e": "text"}
    for key in (b'"a"', b'"b"', b'"c"', b'"d"', b'"e"'):
        assert 0 < sum(key in text for text in texts) < len(texts)
    assert any(b"9" * 5000 in text for text in texts)
    assert any(b"[" * 20_000 in text for text in texts)
    assert any(b"ud800" in text for text in texts)


def test_every_target_is_drawn() -> None:
    drawn = [draw(0, number)[0] for number in range(2000)]

    assert set(drawn) == set(TARGETS)
    assert drawn == [draw(0, number)[0] for number in range(2000)]


# -- faults are seen -----------------------------------------------------------------------------


def run(attack: Callable[[Case], None], folder: Path, count: int = 3) -> dict[int, Result]:
    """Results of the cases 0 to ``count`` with ``attack`` instead of every target."""
    limits = Limits(seconds=1.0, growth_bytes=50 * 10**6)
    with mock.patch.dict(TARGETS, {name: (1.0, attack) for name in TARGETS}):
        results = list(run_cases(range(count), 0, folder, folder, limits, jobs=2))
    return {result.number: result for result in results}


def number_of(case: Case) -> int:
    return int(case.folder.name)


def test_own_errors_and_returns_are_no_faults(tmp_path: Path) -> None:
    def attack(case: Case) -> None:
        if number_of(case) == 1:
            raise SourceError("damaged")
        if number_of(case) == 2:
            raise ValueError("streamcomp: rank 0 is impossible")

    results = run(attack, tmp_path)

    assert [results[number].refused for number in range(3)] == [False, True, True]
    assert not any(result.fault for result in results.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [KeyError("a"), ValueError("no"), SystemExit(1), WronglyAccepted("NaN")]
)
def test_any_other_exception_is_a_fault(error: BaseException, tmp_path: Path) -> None:
    def attack(case: Case) -> None:
        if number_of(case) == 1:
            raise error

    results = run(attack, tmp_path)

    assert results[1].fault.startswith(type(error).__name__)
    assert not results[0].fault and not results[2].fault


def test_a_process_that_dies_is_a_fault_and_the_next_case_runs(tmp_path: Path) -> None:
    def attack(case: Case) -> None:
        if number_of(case) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    results = run(attack, tmp_path)

    assert results[1].fault == "the process died (-9)"
    assert not results[0].fault and not results[2].fault


def test_a_case_that_hangs_is_a_fault_and_the_next_one_runs(tmp_path: Path) -> None:
    def attack(case: Case) -> None:
        if number_of(case) == 1:
            time.sleep(600)

    results = run(attack, tmp_path)

    assert results[1].fault == "still not done after 1 s"
    assert not results[0].fault and not results[2].fault


def test_a_case_that_floods_memory_is_a_fault(tmp_path: Path) -> None:
    def attack(case: Case) -> None:
        if number_of(case) == 1:
            len(bytearray(b"x") * 100_000_000)

    results = run(attack, tmp_path)

    assert results[1].fault.startswith("grew by 1")
    assert not results[0].fault and not results[2].fault
