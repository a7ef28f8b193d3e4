"""Jobs on a machine that its owner also uses: seconds alone, and next to one busy loop.

    python benchmarks/threads.py .cache/SmolLM2-135M Llama-2-7B --text valid.txt
    python benchmarks/threads.py .cache/SmolLM2-135M --text valid.txt --before ../older-checkout
    python benchmarks/threads.py .cache/SmolLM2-135M --text valid.txt --spins 500 3000 30000

MODEL is a folder, or one of the shapes of ``shapes.py``, of which one block with random weights
is made. Each job is a whole process of ``streamcomp compress``, kept to two cores; so is the loop.
What is compared:

- before: the build in ``--before``, or this one with OpenMP's own defaults of how long to spin;
- after: this build as it is;
- spins N: this build with ``GOMP_SPINCOUNT=N``, for each N of ``--spins``.

All of them take turns, ``--rounds`` times, in an order that is reversed each time. Prints medians
in Markdown: seconds alone, their ratio to before (the median over rounds), seconds next to the
loop, and these over those alone. Exits with 1 where "after" is slower than ``MOST_ALONE`` or
``MOST_BESIDE`` allow; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from shapes import SHAPES, make_shape

HERE = Path(__file__).resolve().parents[1]
MOST_ALONE, MOST_BESIDE = 1.04, 2.2

# What OpenMP does where nothing is set: GCC's spins for 300,000 rounds, LLVM's for 200 ms.
_DEFAULTS = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
_SETTINGS = (*_DEFAULTS, "OMP_WAIT_POLICY")
_CORES = 2


@dataclass
class Variant:
    """A build and its environment, and the seconds that its jobs took, a job per round."""

    checkout: Path
    settings: dict[str, str]
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    @property
    def over_alone(self) -> float:
        return median(self.beside) / median(self.alone)

    def over(self, other: Variant) -> float:
        """How many times the seconds of ``other`` a job alone takes: the median over rounds."""
        return median(a / b for a, b in zip(self.alone, other.alone, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a folder, or {list(SHAPES)}")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--spins", nargs="+", default=[], metavar="N", help="GOMP_SPINCOUNT to try")
    parser.add_argument("--rounds", type=int, default=5, help="each with a job of every kind")
    parser.add_argument(
        "--after-only",
        action="store_true",
        help="leave out what runs before next to the loop: it takes many times as long",
    )
    parser.add_argument("--method", default="svd-llm")
    parser.add_argument("--samples", default="8")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--work", type=Path, default=Path("."), help="where folders are made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:_CORES]
    if len(cores) < _CORES:
        sys.exit(f"error: {_CORES} cores are needed, this process may use {len(cores)}")
    os.sched_setaffinity(0, cores)
    found: dict[str, dict[str, Variant]] = {}
    work = Path(tempfile.mkdtemp(prefix="threads-", dir=options.work)).resolve()
    try:
        for name in options.models:
            found[name] = _of_model(options, name, work)
    finally:
        shutil.rmtree(work)
        if options.json:
            plain = {model: {k: vars(v) for k, v in of.items()} for model, of in found.items()}
            options.json.write_text(json.dumps(plain, indent=1, default=str))
    sys.exit(not all(_as_wanted(of) for of in found.values()))


def _of_model(options: argparse.Namespace, name: str, work: Path) -> dict[str, Variant]:
    shaped = name in SHAPES
    model = make_shape(name, work / "model", 1) if shaped else Path(name).resolve()
    variants = _variants(options)
    for number in range(options.rounds):
        order = list(variants.items())[:: -1 if number % 2 else 1]
        for beside in (False, True):
            for title, variant in order:
                if beside and options.after_only and title == "before":
                    continue
                with _busy_loop() if beside else contextlib.nullcontext():
                    seconds = _seconds(options, variant, model, work / "out")
                (variant.beside if beside else variant.alone).append(seconds)
                place = "next to a loop" if beside else "alone"
                told = f"  (round {number + 1}, {title}, {place}: {seconds:.1f} s)"
                print(told, file=sys.stderr, flush=True)
    if shaped:
        shutil.rmtree(model)
    _print_table(f"{name}, one block" if shaped else model.name, variants)
    return variants


def _variants(options: argparse.Namespace) -> dict[str, Variant]:
    before = options.before.resolve() if options.before else HERE
    variants = {
        "before": Variant(before, {} if options.before else _DEFAULTS),
        "after": Variant(HERE, {}),
    }
    variants |= {f"spins {n}": Variant(HERE, {"GOMP_SPINCOUNT": n}) for n in options.spins}
    return variants


@contextlib.contextmanager
def _busy_loop() -> Iterator[None]:
    """Something else that wants all of one core."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def _seconds(options: argparse.Namespace, variant: Variant, model: Path, out: Path) -> float:
    """Seconds of a job, from the start of its process to its end."""
    sizes = ("--samples", options.samples, "--seq-len", options.seq_len)
    text = ("--calibration", str(options.text.resolve()))
    settings = ("--method", options.method, *sizes, *text, "-q")
    kept = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    more = {"PYTHONPATH": str(variant.checkout), "HF_HUB_OFFLINE": "1", **variant.settings}
    job = [sys.executable, "-m", "streamcomp", "compress", str(model), str(out), *settings]
    started = time.perf_counter()
    done = subprocess.run(
        job, cwd=variant.checkout, env={**kept, **more}, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.returncode)
    shutil.rmtree(out)
    return seconds


def _print_table(title: str, variants: dict[str, Variant]) -> None:
    print(f"\n## {title}\n")
    print("| | alone | over before | next to a busy loop | over alone |\n|---|---|---|---|---|")
    for name, variant in variants.items():
        cells = (
            f"{median(variant.alone):.1f} s",
            f"{variant.over(variants['before']):.2f}" if name != "before" else "",
            f"{median(variant.beside):.1f} s" if variant.beside else "",
            f"{variant.over_alone:.2f}" if variant.beside else "",
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _as_wanted(variants: dict[str, Variant]) -> bool:
    after = variants["after"]
    return after.over(variants["before"]) <= MOST_ALONE and after.over_alone <= MOST_BESIDE


if __name__ == "__main__":
    main()
