"""Perplexity, one block in memory at a time, for dense and compressed models alike."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamcomp.calibration.corpus import HELD_OUT, load_windows
from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.checkpoint.atomic import make_folder
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.errors import NonFiniteError
from streamcomp.job.fetching import allow_shards
from streamcomp.job.journal import Journal
from streamcomp.job.plan import Plan, make_evaluation_plan
from streamcomp.job.planner import Conditions
from streamcomp.job.progress import JobProgress
from streamcomp.job.rows import JobLevers
from streamcomp.job.runner import run_steps
from streamcomp.job.workspace import Workspace
from streamcomp.machine.memory import PeakMeter
from streamcomp.machine.session import Machine, machine, probe
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Resources

__all__ = ["Evaluation", "evaluate_checkpoint", "work_folder"]

_MOST_NLL = 700.0  # its exponential is near the largest fp64 number


@dataclass(frozen=True)
class Evaluation:
    """Perplexity on ``windows`` windows of ``seq_len`` tokens."""

    perplexity: float  # exp of the mean negative log-likelihood per predicted token
    nll: float  # that mean, in nats
    tokens: int  # predicted: windows * (seq_len - 1)
    windows: int
    seq_len: int
    text: str
    parameters: int  # numbers in the checkpoint
    checkpoint_bytes: int
    seconds: float
    peak_bytes: int
    predicted_bytes: int
    budget_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite perplexity is None, since JSON has no infinity."""
        return asdict(self) | {"perplexity": self.perplexity if self.nll < _MOST_NLL else None}


def evaluate_checkpoint(
    index: CheckpointIndex,
    text: str | None,
    seq_len: int,
    windows: int,
    resources: Resources,
    progress: JobProgress,
    *,
    chat: bool = False,
) -> Evaluation:
    """Stream the first ``windows`` windows of ``text`` (0 = all) through the model.

    ``text`` is a source as in calibration; None is the held-out part of the Python
    reference. ``chat`` renders it through the chat template. Each window is predicted from its
    own beginning. A job of three kinds of steps: the windows are embedded, run through each block,
    and scored through the head.
    """
    started, meter = time.perf_counter(), PeakMeter()
    with machine(resources) as here, work_folder(resources.work_dir) as folder:
        skeleton = Skeleton(index)
        skeleton.check_tensors(head=True)
        if index.store is not None:
            index.store.tell = progress.note
        kernels = here.kernel_bytes(skeleton.dtype)
        text = text or HELD_OUT
        tokens = load_windows(index.folder, [text], windows, seq_len, None, chat=chat)
        for note in (*skeleton.notes, *tokens.notes):
            progress.note(note)
        shape = StreamShape(len(tokens.tokens), seq_len, skeleton.hidden_size, skeleton.dtype)
        conditions = Conditions(
            budget_bytes=here.budget_bytes,
            addresses=here.addresses,
            rates=here.rates(skeleton.dtype, folder),
            device_budget=here.device_budget,
            kernel_bytes=kernels,
            shard_bytes=allow_shards(skeleton, resources),
            work_in_memory=probe().is_memory_backed(folder),
        )
        plan = make_evaluation_plan(skeleton, shape, conditions)
        here.limit_device()
        before = meter.peak()
        meter.close()
        work = _workspace(plan, here, folder)
        work.tokens = tokens.tokens
        run_steps("evaluate", plan, work, progress)
        rows = work.journal.steps
    mean = rows[-1].nll
    if mean is None or math.isnan(mean):
        raise NonFiniteError(
            f"{index.folder}: its logits are NaN on {text}; the weights are damaged"
        )
    return Evaluation(
        math.exp(mean) if mean < _MOST_NLL else math.inf,
        mean,
        shape.windows * (seq_len - 1),
        shape.windows,
        seq_len,
        text,
        index.numel,
        index.nbytes,
        time.perf_counter() - started,
        max(before, *(row.peak_bytes for row in rows)),
        plan.peak_bytes,
        plan.budget_bytes,
    )


def _workspace(plan: Plan, here: Machine, folder: Path) -> Workspace:
    """A workspace with a new journal in ``folder``."""
    levers = JobLevers(
        **asdict(plan.levers),
        threads=torch.get_num_threads(),
        device=str(here.device),
        analysis=False,
        keep_work=False,
    )
    journal = Journal.begin(folder, {}, levers, [step.seconds for step in plan.steps])
    return Workspace(plan.outline, plan.levers, here.device, folder, journal, lambda output: [])


@contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    """A fresh folder below ``folder``, or where temporary files go."""
    if folder is not None:
        make_folder(folder)
    with tempfile.TemporaryDirectory(prefix="streamcomp-", dir=folder) as name:
        yield Path(name)
