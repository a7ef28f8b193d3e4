"""What digests cost: their share of the seconds of a compression.

    python benchmarks/digests.py .cache/SmolLM2-135M --samples 16

Compresses MODEL in this process with a clock around everything that is digested: blocks and other
tensors as they are read, shards, decompositions and moments as they are written, hidden states as
they are written and read. Before it, the speed of BLAKE2b on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import streamcomp
from streamcomp.calibration.hidden_states import HiddenStates
from streamcomp.checkpoint.digests import Digester
from streamcomp.job.progress import console_progress


class Clock:
    """Sums the seconds and the bytes of calls."""

    def __init__(self) -> None:
        self.seconds, self.nbytes = 0.0, 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose last argument is what is digested."""

        @wraps(call)
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.perf_counter() - started
                self.nbytes += len(arguments[-1])

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-ram", default="1G")
    options = parser.parse_args()
    data = bytes(2**28)
    started = time.perf_counter()
    hashlib.blake2b(data, digest_size=16).digest()
    print(f"BLAKE2b: {len(data) / (time.perf_counter() - started) / 1e9:.2f} GB/s on one core")
    del data
    recipe = streamcomp.Recipe(samples=options.samples, seq_len=options.seq_len)
    clocks = {"tensors and shards": Clock(), "hidden states": Clock()}
    shards, states = clocks.values()
    with (
        tempfile.TemporaryDirectory(prefix="digests-", dir=".") as work,
        mock.patch.object(Digester, "update", shards.around(Digester.update)),
        mock.patch.object(HiddenStates, "_digest", states.around(HiddenStates._digest)),
    ):
        result = streamcomp.compress(
            options.model,
            Path(work) / "out",
            recipe,
            streamcomp.Resources(max_ram=options.max_ram),
            progress=console_progress(False),
        )
    total = result.report["seconds"]
    for name, clock in clocks.items():
        print(f"{name}: {clock.nbytes / 1e9:.2f} GB in {clock.seconds:.2f}s")
    seconds = sum(clock.seconds for clock in clocks.values())
    print(f"{seconds:.2f}s of {total:.1f}s: {seconds / total:.2%}")


if __name__ == "__main__":
    main()
