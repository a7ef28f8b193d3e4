"""What the tests of refusals share: a small job by the command line, and its one line."""

from __future__ import annotations

import re
from pathlib import Path

from tests.jobs import (
    SMALL,
    Finished,
    run_cli,
)

SETTINGS = ("--samples", SMALL["samples"], "--seq-len", SMALL["seq_len"], "--threads", 1)


def run_compress(model: Path | str, out: Path, text: Path | str, *more: object) -> Finished:
    return run_cli("compress", model, out, "--calibration", text, *SETTINGS, "--quiet", *more)


def assert_refused(done: Finished, code: int, message: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert re.search(message, done.err), done.err
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err


def remove_a_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[2].unlink()


def remove_the_weights(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path
