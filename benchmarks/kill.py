"""Kill a job at random moments, continue it, and compare with one that was never killed.

    python benchmarks/kill.py .cache/SmolLM2-135M --kills 10
    python benchmarks/kill.py .cache/SmolLM2-135M --kills 50 -- --method svd-llm --samples 8

SIGKILL, so nothing can be cleaned up. Settings of the job follow after ``--``. Where the job is
through before it was killed often enough, it begins anew. Prints after which kinds of steps it was
killed, and exits with 1 unless every shard, the index and the config are the same bytes each time,
and nothing temporary is left. ``tests/crash`` kills at every point of tiny jobs instead, and
benchmarks/faults.py at every operation that changes a disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# Nothing is killed before it: the planning at the start is part of each run.
_FLOOR_SECONDS = 4.0
_TRIES = 4  # that take a job to its end, at least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--max-ram", default="1G")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--work", type=Path, default=Path("."), help="where folders are made")
    parser.add_argument("settings", nargs="*", metavar="SETTING",
                        help="of the job, after -- (default: --samples 16)")  # fmt: skip
    options = parser.parse_intermixed_args()
    work = Path(tempfile.mkdtemp(prefix="kill-", dir=options.work))
    try:
        started = time.monotonic()
        _finish(options, work / "whole")
        seconds = time.monotonic() - started
        expected = _digests(work / "whole")
        print(f"never killed: {seconds:.0f}s, {len(expected)} files", flush=True)
        faults = _kill_until_enough(options, work / "killed", seconds, expected)
    finally:
        shutil.rmtree(work)
    print("the same bytes" if not faults else "FAULTS: " + "; ".join(faults))
    sys.exit(bool(faults))


def _kill_until_enough(
    options: argparse.Namespace, out: Path, seconds: float, expected: dict[str, str]
) -> list[str]:
    """Start jobs again and again, each time for up to a quarter of their length; the faults."""
    draw = random.Random(options.seed)
    kills, jobs, faults = 0, 0, list[str]()
    after: Counter[str] = Counter()
    while kills < options.kills:
        process = subprocess.Popen(_arguments(options, out), stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        moment = draw.uniform(_FLOOR_SECONDS, _FLOOR_SECONDS + 2 + seconds / _TRIES)
        try:
            code = process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            step = _last_step(out)
            after[re.sub(r" *\d+", "", step)] += 1
            print(f"kill {kills} after {moment:.1f}s: {step or 'no step'} was done", flush=True)
            if (out / "config.json").exists() and not expected.items() <= _digests(out).items():
                faults.append(f"kill {kills} left a model that loads and is not whole")
            continue
        jobs += 1
        if code:
            faults.append(f"exit {code} after {kills} kills")
        faults += _compared(out, expected)
        shutil.rmtree(out)
    _finish(options, out)
    faults += _compared(out, expected)
    print(f"{kills} kills of {jobs + 1} jobs, after: ", end="")
    print(", ".join(f"{step or 'nothing'} {count}" for step, count in after.most_common()))
    return faults


def _compared(out: Path, expected: dict[str, str]) -> list[str]:
    """What is wrong with a finished job."""
    now = _digests(out)
    other = sorted(name for name in {*now, *expected} if now.get(name) != expected.get(name))
    left = sorted(path.name for path in out.rglob(".*"))
    return [f"{name} differs" for name in other] + [f"{name} is left" for name in left]


def _last_step(out: Path) -> str:
    """The last step in the journal, as far as that is whole."""
    try:
        lines = (out / ".streamcomp" / "journal.jsonl").read_text().splitlines()
        return str(json.loads(lines[-1])["step"]) if len(lines) > 1 else ""
    except (OSError, ValueError, KeyError):
        return "publishing" if (out / "model.safetensors.index.json").exists() else ""


def _finish(options: argparse.Namespace, out: Path) -> None:
    subprocess.run(_arguments(options, out), stdout=subprocess.DEVNULL, check=True)


def _arguments(options: argparse.Namespace, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "streamcomp", "compress", str(options.model), str(out)),
        *("--max-ram", options.max_ram, "--quiet", *(options.settings or ("--samples", "16"))),
    ]


def _digests(out: Path) -> dict[str, str]:
    """Hashes of all files but the reports, which hold times."""
    files = [p for p in sorted(out.iterdir()) if p.is_file() and "report" not in p.name]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "README.md" and not path.name.startswith(".")
    }


if __name__ == "__main__":
    main()
