"""Kill a job at random moments, continue it, and compare with one that was never killed.

    python benchmarks/kill.py .cache/SmolLM2-135M --kills 10

SIGKILL, so nothing can be cleaned up. Exits with 1 unless every shard, the index and the
config of both are the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--samples", default="16")
    parser.add_argument("--max-ram", default="1G")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-", dir="."))
    try:
        started = time.monotonic()
        _command(options, work / "whole").check_returncode()
        seconds = time.monotonic() - started
        print(f"never killed: {seconds:.0f}s")
        kills = _kill_until_done(options, work / "killed", seconds)
        same = _digests(work / "whole") == _digests(work / "killed")
        count = len(_digests(work / "whole"))
        print(f"{kills} kills: {count} files " + ("are the same bytes" if same else "DIFFER"))
    finally:
        shutil.rmtree(work)
    sys.exit(not same)


def _kill_until_done(options: argparse.Namespace, out: Path, seconds: float) -> int:
    """Start the job again and again, each time for a random share of its length."""
    random.seed(options.seed)
    kills = 0
    while kills < options.kills:
        process = subprocess.Popen(_arguments(options, out), stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        # the planning at the start is part of each run, hence the floor
        moment = random.uniform(4, 6 + seconds / options.kills)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            done = len(list(out.glob("model-*.safetensors")))
            print(f"kill {kills} after {moment:.1f}s: {done} shards written")
            continue
        print("done before the next kill: once more")
        if _digests(out) != _digests(out.with_name("whole")):
            return kills
        shutil.rmtree(out)
    _command(options, out).check_returncode()
    return kills


def _command(options: argparse.Namespace, out: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(_arguments(options, out), stdout=subprocess.DEVNULL)


def _arguments(options: argparse.Namespace, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "streamcomp", "compress", str(options.model), str(out)),
        *("--samples", options.samples, "--max-ram", options.max_ram, "--quiet"),
    ]


def _digests(out: Path) -> dict[str, str]:
    """Hashes of everything but the reports, which hold times."""
    files = [p for p in sorted(out.iterdir()) if p.is_file() and "report" not in p.name]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "README.md"
    }


if __name__ == "__main__":
    main()
