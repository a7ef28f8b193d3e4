"""A command inside a fresh memory cgroup of a given size, without swap.

The kernel, not the program, is the judge: a process that needs more than the limit is killed.
Works with cgroup v1 and v2, for whoever may make cgroups (usually root).

    python benchmarks/cgroup.py 900MiB -- python -m streamcomp compress MODEL OUT

Pages of files that were in the page cache before stay charged to whoever read them first, so
``max_usage_bytes`` depends on history; ``peak_held_bytes``, memory that cannot be dropped at
will, does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from streamcomp.errors import RecipeError
from streamcomp.units import parse_bytes

ROOT = Path("/sys/fs/cgroup")
SAMPLE_SECONDS = 0.02
REMOVE_SECONDS = 10.0


class CgroupUnavailable(RuntimeError):
    """No memory cgroup can be made or entered here."""


@dataclasses.dataclass(frozen=True)
class CgroupRun:
    """What a command did under its limit."""

    returncode: int  # negative: the signal that ended it
    stdout: str
    stderr: str
    oom_kills: int  # processes the kernel killed at the limit
    peak_held_bytes: int  # largest sample of anonymous + shmem + dirty + writeback bytes
    max_usage_bytes: int  # the kernel's own peak, clean page cache included
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Interface:
    """Names of one cgroup version's files and fields."""

    limits: tuple[str, ...]  # files that take the limit, in the order the kernel accepts
    zeros: tuple[str, ...]  # files that take 0: no swap
    peak: str
    events: str
    held: tuple[str, ...]  # fields of memory.stat


_V1 = _Interface(
    limits=("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    zeros=("memory.swappiness",),
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
    held=("rss", "shmem", "dirty", "writeback"),
)
_V2 = _Interface(
    limits=("memory.max",),
    zeros=("memory.swap.max",),
    peak="memory.peak",
    events="memory.events",
    held=("anon", "shmem", "file_dirty", "file_writeback"),
)


def run_limited(
    command: Sequence[str], limit_bytes: int, env: Mapping[str, str] | None = None
) -> CgroupRun:
    """Run ``command`` under ``limit_bytes`` of memory and wait for it.

    The kernel rounds the limit down to whole pages. The cgroup is removed in the end, and
    whatever still runs in it is killed.
    """
    # The shell enters the cgroup, then becomes the command: no byte of it is charged elsewhere.
    enter = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"']
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        _fresh_cgroup(limit_bytes) as (group, interface),
    ):
        start = time.monotonic()
        argv = [*enter, str(group / "cgroup.procs"), *command]
        process = subprocess.Popen(argv, stdout=out, stderr=err, env=env)
        peak_held = 0
        try:
            while process.poll() is None:
                stat = _counters(group / "memory.stat")
                peak_held = max(peak_held, sum(stat[field] for field in interface.held))
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
        seconds = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        run = CgroupRun(
            returncode=process.returncode,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
            oom_kills=_counters(group / interface.events)["oom_kill"],
            peak_held_bytes=peak_held,
            max_usage_bytes=int((group / interface.peak).read_text()),
            seconds=seconds,
        )
    if run.max_usage_bytes == 0:  # nothing was ever charged: nobody was inside
        raise CgroupUnavailable(f"cannot enter a memory cgroup: {run.stderr.strip()}")
    return run


@contextmanager
def _fresh_cgroup(limit_bytes: int) -> Iterator[tuple[Path, _Interface]]:
    """A cgroup of ``limit_bytes`` without swap, gone afterwards."""
    try:
        parent, interface = _parent()
        group = Path(tempfile.mkdtemp(prefix="streamcomp-", dir=parent))
    except OSError as error:
        raise CgroupUnavailable(f"cannot make a memory cgroup: {error}") from error
    try:
        _limit(group, interface, limit_bytes)
        yield group, interface
    finally:
        _remove(group)


def _limit(group: Path, interface: _Interface, limit_bytes: int) -> None:
    """Write the limits of ``group``."""
    settings = dict.fromkeys(interface.limits, limit_bytes) | dict.fromkeys(interface.zeros, 0)
    for name in (interface.limits[0], interface.peak):
        if not (group / name).exists():
            raise CgroupUnavailable(f"cannot limit memory here: the kernel offers no {name}")
    for name, number in settings.items():
        if not (group / name).exists():  # swap is not counted, or cannot happen
            continue
        try:
            (group / name).write_text(str(number))
        except OSError as error:
            raise CgroupUnavailable(f"cannot write {number} to {name}: {error}") from error


def _parent() -> tuple[Path, _Interface]:
    """Where a cgroup can be made, and the version found there."""
    if (ROOT / "memory").is_dir():
        return ROOT / "memory", _V1
    own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
    parent = (ROOT / own).parent if own else ROOT  # v2: only a cgroup without processes may split
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")
    return parent, _V2


def _remove(group: Path) -> None:
    """Kill what is left in ``group`` and remove it; the kernel may need a moment for both."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            return group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(SAMPLE_SECONDS)


def _counters(path: Path) -> dict[str, int]:
    """The ``name number`` lines of one of the kernel's files."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command inside a memory cgroup.")
    parser.add_argument("limit", help="bytes allowed, such as 900MiB")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    try:
        run = run_limited(arguments.command, parse_bytes(arguments.limit))
    except (CgroupUnavailable, RecipeError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(dataclasses.asdict(run), indent=2))
    sys.exit(1 if run.returncode else 0)


if __name__ == "__main__":
    main()
