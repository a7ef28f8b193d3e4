"""Jobs that are attacked: kinds of jobs, each run as a command in a fork of this process."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from streamcomp.machine.kernels import warm_up
from tests.jobs import SMALL, compress, run_cli, varied_text
from tests.pico import save_pico

__all__ = [
    "KINDS",
    "Ended",
    "Kind",
    "Place",
    "model_digests",
    "prepare",
    "run_forked",
    "run_here",
]

_TRACEBACK = 70  # exit code of a job that ended in an exception which the command line lets through
_POLL_SECONDS = 0.01
# Tell seconds and bytes of memory, which differ from run to run.
_TELL_TIMES = ("streamcomp_report.json", "streamcomp_report.html", "README.md")


@dataclass(frozen=True)
class Kind:
    """A kind of job: settings of its recipe, and whether it keeps its work."""

    settings: dict[str, Any] = field(default_factory=dict)
    keep_work: bool = False


KINDS: dict[str, Kind] = {
    "two-sided": Kind(),
    "update, refine": Kind({"update": True, "refine": 2, "store_every": 2}),
    "several ratios": Kind({"ratio": (0.2, 0.5), "update": True, "anchor": 0.5}),
    "keep-work": Kind(keep_work=True),
    "svd-llm": Kind({"method": "svd-llm"}),
    "svd-llm, compressed": Kind({"method": "svd-llm", "statistics": "compressed"}),
    "rom": Kind({"method": "rom"}),
    "swsc": Kind({"method": "swsc"}),
}


@dataclass(frozen=True)
class Place:
    """The folders of one job: OUT, and the work folder where that is kept."""

    model: Path
    text: Path
    folder: Path  # everything that the job writes

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def at(self, folder: Path) -> Place:
        """The same job in another folder."""
        return Place(self.model, self.text, folder)

    def command(self, kind: Kind, **others: Any) -> list[str]:
        """Arguments of the command line; ``others`` replace settings of the kind."""
        settings: dict[str, Any] = {**SMALL, **kind.settings, **others}
        arguments = ["compress", str(self.model), str(self.out), "--calibration", str(self.text)]
        for name, value in settings.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, tuple):
                value = ",".join(map(str, value))
            arguments += [option] if value is True else [option, str(value)]
        if kind.keep_work:
            arguments += ["--keep-work", "--work-dir", str(self.folder / "work")]
        return [*arguments, "--threads", "1", "--quiet", "--json"]

    def compress(self, kind: Kind, progress: Any = None) -> None:
        """The same job as :meth:`command`, in this process and with a progress of its own."""
        work = self.folder / "work" if kind.keep_work else None
        compress(
            self.model,
            self.out,
            self.text,
            work_dir=work,
            keep_work=kind.keep_work,
            progress=progress,
            **kind.settings,
        )


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # negative: the signal that ended it
    error: str  # what it said on stderr
    hung: bool = False

    @property
    def refused(self) -> bool:
        """Whether it ended in one line that says what is wrong."""
        lines = [line for line in self.error.splitlines() if line.startswith("error: ")]
        told = len(lines) == 1 and "Traceback" not in self.error
        return told and 0 < self.code < _TRACEBACK

    def __str__(self) -> str:
        last = (self.error.strip().splitlines() or [""])[-1]
        return "hung" if self.hung else f"exit {self.code}: {last[:160]}"


def prepare(folder: Path) -> Place:
    """A pico model and a text in ``folder``, and everything that a fork would load otherwise."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, text = save_pico(folder / "model"), varied_text(folder / "text.txt", 4000)
    AutoModelForCausalLM.from_pretrained(model)
    warm_up(torch.device("cpu"), torch.float32, gradients=True, training=True)
    return Place(model, text, folder)


def run_forked(
    arguments: list[str],
    *,
    before: Callable[[], None] | None = None,
    seconds: float = 300,
) -> Ended:
    """The command ``arguments`` in a fork, which calls ``before`` first."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = _TRACEBACK
        try:
            os.close(reader)
            os.dup2(writer, 2)
            if before is not None:
                before()
            done = run_cli(*arguments)
            os.write(writer, done.err.encode("utf-8", "replace")[-4000:])
            code = done.code
        except BaseException:
            os.write(writer, traceback.format_exc().encode("utf-8", "replace")[-4000:])
        finally:
            os._exit(code)
    os.close(writer)
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        hung = not ended and time.monotonic() > deadline
        if hung:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if ended or hung:
            break
        time.sleep(_POLL_SECONDS)
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb") as file:
        error = (file.read() or b"").decode("utf-8", "replace")
    return Ended(os.waitstatus_to_exitcode(status), error, hung)


def run_here(work: Callable[[], None]) -> None:
    """``work`` in a fork; SystemExit where it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a job that nothing disturbs failed")


def model_digests(out: Path) -> dict[str, str]:
    """Digests of every file of the models in ``out``, except those that tell times."""
    return {
        str(path.relative_to(out)): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and path.name not in _TELL_TIMES
        and not any(part.startswith(".") for part in path.relative_to(out).parts)
    }
