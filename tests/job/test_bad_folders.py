"""Folders, disks and budgets in which no job can run: one line, and its exit code."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import streamcomp
from streamcomp import OutputError
from streamcomp.machine.addresses import AddressLimit
from streamcomp.machine.session import probed
from tests.jobs import (
    FakeProbe,
    Interrupt,
    Interrupted,
    Notes,
    compress,
    run_cli,
    run_python,
    tree,
)
from tests.refusals import (
    SETTINGS,
    assert_refused,
    run_compress,
    write,
)


def test_a_folder_with_something_else_in_it_is_not_touched(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out / "thesis.tex", "years of work")

    done = run_compress(pico("llama"), out, text)

    assert_refused(done, 6, r"out is not empty \(thesis.tex\) and holds no job")
    assert tree(out) == {"thesis.tex": b"years of work"}


def test_an_empty_folder_is_fine(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    assert run_compress(pico("llama"), tmp_path / "out", text).code == 0


def test_the_model_s_own_folder_is_not_touched(model: Path, text: Path) -> None:
    before = tree(model)

    for same in (model, model / ".." / "model"):
        assert_refused(run_compress(model, same, text), 6, "is the model's own folder")

    assert tree(model) == before


def test_the_work_needs_a_folder_of_its_own(model: Path, text: Path, tmp_path: Path) -> None:
    before = tree(model)

    for work in (tmp_path / "out", model):
        done = run_compress(model, tmp_path / "out", text, "--work-dir", work)

        assert_refused(done, 6, "is OUT or the model's folder: give another --work-dir")
    assert tree(model) == before
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "out", "a file")

    assert_refused(run_compress(pico("llama"), file, text), 6, "out is a file")
    assert_refused(run_compress(pico("llama"), file / "deep", text), 6, "cannot be written")
    assert file.read_text() == "a file"


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A disk of its own at ``folder``; the test is skipped where none can be made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("this needs to mount a disk: run it as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=1m,ro") as disk:
        done = run_compress(pico("llama"), disk / "out", text)

        assert_refused(done, 6, "out cannot be written: Read-only file system")
        done = run_compress(pico("llama"), tmp_path / "out", text, "--work-dir", disk / "work")
        assert_refused(done, 6, "work cannot be written: Read-only file system")


def test_a_folder_without_permission_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)

    done = run_compress(pico("llama"), tmp_path / "locked" / "out", text)

    assert_refused(done, 6, "cannot be written: Permission denied")


LOCK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def lock_held(folder: Path) -> Iterator[None]:
    """Another process holds the lock on ``folder``."""
    command = [sys.executable, "-c", LOCK, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield
        holder.kill()


def test_a_second_process_on_a_job_is_kept_out(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, progress=Interrupt(2))
    before = tree(out)

    with lock_held(out):
        assert_refused(run_compress(pico("llama"), out, text), 8, "another process works on .*out")
        other = run_compress(pico("llama"), out, text, "--ratio", "0.37")
        assert_refused(other, 8, "another process works on .*out")  # not: remove that folder
        assert tree(out) == before
        assert run_cli("status", out).code == 0
    work.mkdir()
    with lock_held(work):
        done = run_compress(pico("llama"), tmp_path / "other", text, "--work-dir", work)
        assert_refused(done, 8, "another process works on .*work")
    assert run_compress(pico("llama"), out, text).code == 0  # the lock went with its process


def test_a_job_that_another_process_finished_meanwhile_is_not_done_again(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The second process has looked at the folder, and is planning, when the first works."""
    from streamcomp.job import run

    dense = pico("llama")
    plan = run.make_plan  # type: ignore[attr-defined]

    for begun in (False, True):
        out = tmp_path / f"begun{begun}"
        left: dict[str, bytes] = {}
        if begun:
            with pytest.raises(Interrupted):
                compress(dense, out, text, progress=Interrupt(2))

        def finished_meanwhile(
            *args: Any, out: Path = out, left: dict[str, bytes] = left, **kwargs: Any
        ) -> Any:
            with mock.patch.object(run, "make_plan", plan):
                compress(dense, out, text)
            left.update(tree(out))
            return plan(*args, **kwargs)

        with mock.patch.object(run, "make_plan", finished_meanwhile):
            done = run_compress(dense, out, text)
        assert done.code == 0, done
        assert "already done" in done.out
        assert not (out / ".streamcomp").exists()
        assert tree(out) == left


def test_a_disk_with_too_little_space_is_refused_before_any_work(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        done = run_compress(pico("llama"), disk / "out", text)

        assert_refused(done, 6, "at most and its disk has 64.0 KiB free")
        assert not list(disk.iterdir())


class Fill(Notes):
    """Fills the disk once step number ``after`` is done."""

    def __init__(self, after: int, filler: Path) -> None:
        super().__init__()
        self.after, self.filler = after, filler

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        super().finish_step(step, name, seconds, detail)
        if step == self.after:
            with self.filler.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(b"\0" * 4096)
                    except OSError:
                        return


@pytest.mark.parametrize("after", range(11))
def test_a_disk_that_fills_up_ends_the_job_and_it_goes_on_once_there_is_space(
    after: int, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, whole = pico("llama"), tmp_path / "whole"
    compress(dense, whole, text)
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        out, progress = disk / "out", Fill(after, disk / "filler")

        with pytest.raises(OutputError, match="no space left for .*: free some and run the same"):
            compress(dense, out, text, progress=progress)

        # a journal line, all that is left of the ranks, may fit into the page that it has
        assert after + 1 <= len(progress.steps) <= after + 1 + (after == 6)
        assert not (out / "config.json").exists()
        progress.filler.unlink()
        compress(dense, out, text, progress=(notes := Notes()))
        assert notes.done == len(progress.steps)
        for path in [*whole.glob("*.safetensors"), whole / "config.json"]:
            assert (out / path.name).read_bytes() == path.read_bytes()


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "call", ["posix_fallocate", "pwrite", "fsync", "fdatasync", "replace", "write"]
)
def test_whatever_call_finds_the_disk_full_it_is_one_line(
    call: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(4))  # the next writes files of every kind
    steps = streamcomp.status(out).steps_done

    with mock.patch.object(os, call, full_disk):
        done = run_compress(dense, out, text)

    assert_refused(done, 6, "no space left for .*: free some and run the same command again")
    assert streamcomp.status(out).steps_done == steps
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    assert run_compress(dense, out, text).code == 0


def test_a_budget_too_small_is_refused_with_the_least_that_works(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    command = ["-m", "streamcomp", "compress", pico("llama"), tmp_path / "out"]
    command += ["--calibration", text, *SETTINGS, "--quiet", "--json"]

    refused = run_python(*command, "--max-ram", "64M")

    assert_refused(refused, 5, r"needs \d+ MiB.*, the budget is 64\.0 MiB: --max-ram \d+M fits")
    assert not (tmp_path / "out").exists()
    match = re.search(r"--max-ram (\d+)M fits", refused.err)
    assert match
    least = int(match[1])
    done = run_python(*command, "--max-ram", f"{least}M")
    assert (done.code, done.err) == (0, "")
    assert done.json["memory"]["peak_bytes"] <= least * 2**20


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("lots", "size 'lots' not understood: write 32G"),
        ("0", "must be above zero"),
        ("-1G", "not understood"),
        ("900P", "not understood"),
        ("900T", r"--max-ram 900T is more than the .* of this machine"),
        ("120%", "above 0% and at most 100%"),
    ],
)
def test_a_budget_that_is_none_is_refused(
    size: str, message: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    done = run_compress(pico("llama"), tmp_path / "out", text, "--max-ram", size)

    assert_refused(done, 2, message)
    assert not (tmp_path / "out").exists()


class FewAddresses(FakeProbe):
    """A machine where ``ulimit -v`` allows so many MiB, of which a job needs 400 in addition."""

    def __init__(self, allowed: int) -> None:
        super().__init__(baseline=300 * 2**20, kernels=0)
        self.allowed = allowed

    def address_limit(self, threads: int) -> AddressLimit:
        return AddressLimit(self.allowed * 2**20, 400 * 2**20)


def test_too_few_addresses_are_refused_with_a_limit_that_fits(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with probed(FewAddresses(700)):
        refused = run_compress(pico("llama"), out, text)
    assert_refused(refused, 5, r"the budget is 300 MiB: ulimit -v \d+ fits")
    assert not out.exists()

    allowed = int(refused.err.split()[-2]) // 1024
    with probed(FewAddresses(allowed - 6)):  # 4 MiB are a reserve
        assert_refused(run_compress(pico("llama"), out, text), 5, "ulimit")
    with probed(FewAddresses(allowed)):
        done = run_compress(pico("llama"), out, text, "--json")
    assert done.json["memory"]["budget_bytes"] == (allowed - 400) * 2**20
