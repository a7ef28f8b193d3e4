"""The meter sees short peaks; a budget is what a person means and what the machine has."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from streamcomp.errors import RecipeError
from streamcomp.machine import memory
from streamcomp.machine.memory import (
    PeakMeter,
    budget_bytes,
    is_memory_backed,
    machine_bytes,
    resident_bytes,
)
from tests.jobs import REPOSITORY, run_python

MiB = 2**20
GiB = 2**30

# Prints, in MiB: the peak above the start while nothing happened, after 200 MiB came and went,
# and after a restart; then whether the kernel's own mark was read.
SHORT_PEAK = """
import mmap, sys
from streamcomp.machine import memory as meter

if sys.argv[1] == "damaged":
    meter._CLEAR = meter.Path("/nowhere/clear_refs")
size = 200 * 2**20

def come_and_go():
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, 4096):
            memory[start] = 1
        if not watch._exact:  # a sample has to fall in between
            while watch._sampled < start + size // 2:
                meter.threading.Event().wait(0.01)

watch = meter.PeakMeter()
watch.restart()
start = meter.resident_bytes()
print((watch.peak() - start) // 2**20)
come_and_go()
print((watch.peak() - start) // 2**20)
watch.restart()
print((watch.peak() - start) // 2**20)
print(watch._exact)
"""


def short_peak(kind: str) -> tuple[int, int, int, bool]:
    done = run_python("-c", SHORT_PEAK, kind, cwd=REPOSITORY)
    assert done.code == 0, done.err
    quiet, busy, after, exact = done.out.split()
    return int(quiet), int(busy), int(after), exact == "True"


# -- what is held ---------------------------------------------------------------------------


def test_a_short_peak_is_seen_and_forgotten_after_a_restart() -> None:
    quiet, busy, after, _ = short_peak("sound")

    assert quiet < 20
    assert 190 < busy < 230
    assert after < 20


def test_without_the_kernel_s_mark_a_thread_samples() -> None:
    quiet, busy, after, exact = short_peak("damaged")

    assert not exact
    assert quiet < 20
    assert 99 < busy < 230
    assert after < 20


def test_a_kernel_that_has_no_mark_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))

    watch = PeakMeter()

    assert len(started) == 1
    watch.restart()
    assert watch.peak() >= resident_bytes() // 2


def test_a_kernel_whose_mark_is_always_zero_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t  100 kB\n")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))

    PeakMeter()

    assert len(started) == 1


def test_the_mark_is_read_in_kibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  999 kB\nVmHWM:\t    1234 kB\nVmRSS:\t  1000 kB\n")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", status)

    assert PeakMeter().peak() == 1234 * 1024
    assert (tmp_path / "clear_refs").read_text() == "5"


# -- what may be held -----------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes this a machine of some memory, in cgroups with some files."""

    def make(total: int, available: int, cgroup: str = "", **files: str) -> None:
        there = SimpleNamespace(total=total, available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
        monkeypatch.setattr(memory, "Path", fake_path(tmp_path))
        write(tmp_path, "/proc/self/cgroup", cgroup)
        for path, text in files.items():
            write(tmp_path, path, text)

    return make


def fake_path(root: Path) -> Callable[[str], Any]:
    """``Path``, but below ``root``."""
    return lambda path: root / PurePosixPath(path).relative_to("/")


def write(root: Path, path: str, text: str) -> None:
    file: Path = fake_path(root)(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n" if text else "")


def test_a_budget_is_a_size_or_a_share_of_the_machine(machine: Callable[..., None]) -> None:
    machine(64 * GiB, 8 * GiB)

    assert budget_bytes("32G") == 32 * GiB
    assert budget_bytes("900MiB") == 900 * MiB
    assert budget_bytes("75%") == 48 * GiB
    assert budget_bytes("64G") == 64 * GiB


def test_without_a_budget_it_is_four_fifths_of_what_is_free_and_what_is_held(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 2 * GiB)
    machine(64 * GiB, 8 * GiB)
    assert budget_bytes(None) == 8 * GiB

    machine(9 * GiB, 8 * GiB)  # no more than there is
    assert budget_bytes(None) == int(0.8 * 9 * GiB)


def test_more_than_the_machine_has_is_refused(machine: Callable[..., None]) -> None:
    machine(64 * GiB, 8 * GiB)

    with pytest.raises(RecipeError, match=r"--max-ram 65G is more than the 64\.0 GiB of this"):
        budget_bytes("65G")
    assert budget_bytes("65G", elsewhere=True) == 65 * GiB


V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/job", {f"{V2}/job/memory.max": f"{4 * GiB}"}, 4 * GiB),
        ("0::/job", {f"{V2}/job/memory.max": "max"}, 64 * GiB),
        ("0::/", {}, 64 * GiB),
        (  # the limit of a parent holds too
            "0::/slice/job",
            {f"{V2}/slice/job/memory.max": "max", f"{V2}/slice/memory.max": f"{3 * GiB}"},
            3 * GiB,
        ),
        (  # and in a container its own folder is not to be seen: the root is its own
            "0::/",
            {f"{V2}/memory.max": f"{2 * GiB}"},
            2 * GiB,
        ),
        (
            "5:cpu:/job\n4:memory:/job\n0::/",
            {f"{V1}/job/memory.limit_in_bytes": f"{5 * GiB}"},
            5 * GiB,
        ),
        ("4:cpu,memory:/job", {f"{V1}/job/memory.limit_in_bytes": f"{6 * GiB}"}, 6 * GiB),
        (
            "4:memory:/a/b",
            {
                f"{V1}/a/b/memory.limit_in_bytes": f"{9 * GiB}",
                f"{V1}/a/memory.limit_in_bytes": f"{7 * GiB}",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",  # none
            },
            7 * GiB,
        ),
        ("4:cpuset:/job", {f"{V1}/job/memory.limit_in_bytes": f"{GiB}"}, 64 * GiB),
        ("0::/job", {f"{V2}/job/memory.max": f"{128 * GiB}"}, 64 * GiB),
    ],
)
def test_the_limit_of_a_container_is_the_machine_s(
    machine: Callable[..., None], cgroup: str, files: dict[str, str], limit: int
) -> None:
    machine(64 * GiB, 60 * GiB, cgroup, **files)

    assert machine_bytes() == limit
    assert budget_bytes("50%") == limit // 2
    with pytest.raises(RecipeError, match="is more than"):
        budget_bytes(str(limit + 1))


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        (
            "0::/pod/job",
            {
                f"{V2}/pod/job/memory.max": "max",
                f"{V2}/pod/memory.max": f"{4 * GiB}",
                f"{V2}/pod/memory.current": f"{3 * GiB}",
                f"{V2}/pod/memory.stat": f"anon 9\nactive_file {GiB // 2}\n"
                f"inactive_file {GiB // 4}\n",
            },
        ),
        (
            "4:memory:/job",
            {
                f"{V1}/job/memory.limit_in_bytes": f"{4 * GiB}",
                f"{V1}/job/memory.usage_in_bytes": f"{3 * GiB}",
                f"{V1}/job/memory.stat": f"total_active_file {3 * GiB // 4}\n"
                "cache 7\nactive_file 1\n",
            },
        ),
    ],
)
def test_without_a_budget_what_others_hold_in_a_container_is_left_to_them(
    machine: Callable[..., None],
    cgroup: str,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(64 * GiB, 60 * GiB, cgroup, **files)
    monkeypatch.setattr(memory, "resident_bytes", lambda: GiB // 4)  # of those that are held

    assert machine_bytes() == 4 * GiB
    # 4 GiB less 3 GiB held, of which 0.75 are cache, and this process's own
    assert budget_bytes(None) == int(0.8 * (4 - 2.25 + 0.25) * GiB)


def test_where_there_are_no_cgroups_the_machine_is_all(
    machine: Callable[..., None], tmp_path: Path
) -> None:
    machine(64 * GiB, 60 * GiB)
    (tmp_path / "proc/self/cgroup").unlink()

    assert machine_bytes() == 64 * GiB


# -- folders in memory ----------------------------------------------------------------------


def test_a_folder_in_memory_is_told_from_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "ram").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "ram")
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path.resolve() / "disk" / "ram"), fstype="tmpfs"),
        SimpleNamespace(mountpoint=str(tmp_path.resolve() / "disk" / "ra"), fstype="ext4"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)

    assert is_memory_backed(tmp_path / "disk" / "ram")
    assert is_memory_backed(tmp_path / "disk" / "ram" / "to" / "be" / "made")
    assert is_memory_backed(tmp_path / "link" / "job")
    assert not is_memory_backed(tmp_path / "disk")
    assert not is_memory_backed(tmp_path / "disk" / "ramble")


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no shared memory is mounted")
def test_shared_memory_is_memory() -> None:
    assert is_memory_backed(Path("/dev/shm/no/such/folder"))


def test_where_the_code_lies_is_a_disk() -> None:
    kinds = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    here = next(p for p in (REPOSITORY, *REPOSITORY.parents) if str(p) in kinds)

    assert is_memory_backed(REPOSITORY) == (kinds[str(here)] in ("tmpfs", "ramfs"))
