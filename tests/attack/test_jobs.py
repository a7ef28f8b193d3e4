"""Jobs that are damaged or disturbed; what the two benchmarks about them would notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack.jobs import Ended, model_digests
from tests.attack.operations import FAULTS, Operations
from tests.jobs import ENVIRONMENT, REPOSITORY


@pytest.mark.parametrize(
    ("script", "cases"), [("damage", 20), ("faults", 12)], ids=["damage", "faults"]
)
def test_a_few_cases_of_the_benchmark(script: str, cases: int) -> None:
    kinds = ("two-sided", "svd-llm, compressed", "keep-work")
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--cases", str(cases), "--kinds", *kinds],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{cases} cases, 0 faults" in done.stdout


# -- what is seen of a process -------------------------------------------------------------------


def some_operations(folder: Path) -> None:
    """Writes to a disk in every way that the package does."""
    made = folder / "made"
    made.mkdir()
    with (made / "a").open("wb") as file:
        file.write(b"12345678")
        file.flush()
        os.fsync(file.fileno())
    os.replace(made / "a", made / "b")
    descriptor = os.open(made / "b", os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, b"12345678")
    os.pwrite(descriptor, b"12345678", 16)
    os.close(descriptor)
    (folder / "elsewhere").joinpath("c").read_bytes()
    (made / "b").unlink()
    made.rmdir()


SEEN = ["mkdir", *("open", "write", "flush", "fsync", "close", "replace"),
        *("open", "write", "pwrite", "unlink", "rmdir")]  # fmt: skip


def forked(work: Callable[[], None]) -> Ended:
    """How a fork of this process ends: 1 after an OSError, 0 otherwise."""
    if (child := os.fork()) == 0:
        code = 0
        try:
            work()
        except OSError:
            code = 1
        finally:
            os._exit(code)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c").write_bytes(b"")
    return tmp_path


def run(folder: Path, operations: Operations) -> Ended:
    def work() -> None:
        operations.install()
        some_operations(folder)

    return forked(work)


def test_every_operation_is_counted_and_only_below_its_folder(folder: Path) -> None:
    names = folder / "names"
    assert run(folder, Operations(folder, names=names)).code == 0
    assert names.read_text().split() == SEEN

    names.unlink()
    assert run(folder, Operations(folder / "elsewhere", names=names)).code == 0
    assert names.read_text().split() == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", range(len(SEEN)))
def test_each_operation_can_fail(number: int, fault: str, folder: Path) -> None:
    ended = run(folder, Operations(folder, number, fault))

    assert ended.code == (-signal.SIGKILL if fault == "kill" else 1)
    assert (folder / "made").exists() == (number > 0)
    assert (folder / "made" / "b").exists() == (number in range(7, 11))


def test_a_kill_leaves_half_of_what_was_written(folder: Path) -> None:
    run(folder, Operations(folder, SEEN.index("write"), "kill"))

    assert (folder / "made" / "a").read_bytes() == b"1234"


def test_a_command_is_refused_by_one_line_alone() -> None:
    assert Ended(6, "note\nerror: no space\n").refused
    assert not Ended(0, "error: no space\n").refused
    assert not Ended(-9, "error: no space\n").refused
    assert not Ended(70, "Traceback\nerror: no space\n").refused
    assert not Ended(6, "error: one\nerror: two\n").refused
    assert not Ended(1, "Traceback (most recent call last)\nerror: no space\n").refused


def test_digests_are_those_of_a_model_and_of_all_its_files(tmp_path: Path) -> None:
    for name in ("config.json", "ratio-0.2/model.safetensors", "README.md", ".streamcomp/journal"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    before = model_digests(tmp_path)

    assert list(before) == ["config.json", "ratio-0.2/model.safetensors"]
    (tmp_path / "config.json").write_text("other")
    assert model_digests(tmp_path) != before
