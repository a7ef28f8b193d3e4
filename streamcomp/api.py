"""The whole of streamcomp in one call each. The command line is a thin layer over this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from streamcomp.checkpoint.hub import checkpoint_folder, headers_folder
from streamcomp.checkpoint.index import read_header, read_index
from streamcomp.errors import OutputError
from streamcomp.evaluation.export import export_checkpoint
from streamcomp.evaluation.html import html_report
from streamcomp.evaluation.inspection import Inspection, inspect_checkpoint
from streamcomp.evaluation.perplexity import Evaluation, evaluate_checkpoint
from streamcomp.evaluation.report import job_report, model_card
from streamcomp.integrations.transformers import AUTO_MAP, PLUGIN, plugin_source
from streamcomp.job.journal import Journal, check_fingerprint, fingerprint
from streamcomp.job.progress import JobProgress, SilentProgress
from streamcomp.job.publish import (
    REPORT,
    publish,
    quantization_config,
    read_report,
    remove_work,
    to_json,
)
from streamcomp.job.run import WORK_FOLDER, Job, choose_device, prepare_process
from streamcomp.methods import find_method
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.planning.meter import budget_bytes, is_memory_backed, warm_up
from streamcomp.planning.plan import Plan, make_plan, measure_rates
from streamcomp.recipe import Recipe, Resources

__all__ = [
    "CompressResult",
    "JobStatus",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "status",
]


@dataclass(frozen=True)
class CompressResult:
    """A compressed model: its folder, and the report that also lies there."""

    out: Path
    report: dict[str, Any]
    already_done: bool  # the folder held it before this call


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands."""

    out: Path
    finished: bool
    steps_done: int
    steps_total: int
    last_step: str
    seconds: float  # spent so far
    seconds_left: float  # at the pace of the blocks so far; 0 when finished
    peak_bytes: int
    recipe: dict[str, Any]


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
    *,
    revision: str | None = None,
    progress: JobProgress | None = None,
) -> CompressResult:
    """Compress ``model`` (a folder, or a name on the hub) into the folder ``out``.

    Continues an unfinished job of the same recipe in ``out``; returns at once what a
    finished one left. Peak resident memory stays below ``resources.max_ram``.

    Raises StreamcompError of the kind that fits; nothing finished is lost by any of them.
    """
    recipe, resources = recipe or Recipe(), resources or Resources()
    out, progress = Path(out), progress or SilentProgress()
    prepare_process(resources)
    index = read_index(checkpoint_folder(model, revision))
    done = read_report(out)
    if done is not None:
        check_fingerprint(done["fingerprint"], fingerprint(index, recipe), out, versions=False)
        remove_work(resources.work_dir or out / WORK_FOLDER)
        return CompressResult(out, done, already_done=True)
    job = Job(index, out, recipe, resources, progress)
    with job.open():
        job.run()
        report = _publish(job)
    remove_work(job.work)
    return CompressResult(out, report, already_done=False)


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
    *,
    revision: str | None = None,
) -> Plan:
    """What :func:`compress` would do, from headers alone: steps, bytes, seconds, ranks.

    Raises BudgetError with the least budget that does where none of its plans fits.
    """
    recipe, resources = recipe or Recipe(), resources or Resources()
    prepare_process(resources)
    device = choose_device(resources.device)
    find_method(recipe.method)
    with headers_folder(model, revision) as folder:
        skeleton = Skeleton(read_index(folder))
        warm_up(device, skeleton.dtype)
        return make_plan(
            skeleton,
            recipe,
            budget_bytes(resources.max_ram),
            measure_rates(device, skeleton.dtype),
            memory_backed=resources.work_dir is not None and is_memory_backed(resources.work_dir),
        )


def evaluate(
    model: str | Path,
    text: str | None = None,
    *,
    seq_len: int = 512,
    windows: int = 64,
    resources: Resources | None = None,
    revision: str | None = None,
    progress: JobProgress | None = None,
) -> Evaluation:
    """Perplexity of a dense or compressed ``model`` on ``text``, streamed block by block.

    ``text`` is a file, a folder or a hub dataset; None is the part of the Python language
    reference that calibration never sees. ``windows=0`` takes all of it.
    """
    resources = resources or Resources()
    prepare_process(resources)
    index = read_index(checkpoint_folder(model, revision))
    return evaluate_checkpoint(
        index, text, seq_len, windows, resources, progress or SilentProgress()
    )


def export(
    model: str | Path,
    destination: str | Path,
    *,
    form: str = "dense",
    progress: JobProgress | None = None,
) -> Path:
    """Write a compressed ``model`` to ``destination`` with its factors multiplied out.

    ``form="dense"`` gives a plain checkpoint for tools that know no factors, as large as the
    original; ``"uv"`` keeps two factors per linear. One linear is in memory at a time.
    """
    index = read_index(checkpoint_folder(model))
    extra = {PLUGIN: plugin_source()}
    return export_checkpoint(
        index, Path(destination), form, extra, AUTO_MAP, progress or SilentProgress()
    )


def inspect(model: str | Path, *, revision: str | None = None) -> Inspection:
    """Families of linears in a dense or compressed ``model``, from headers alone."""
    with headers_folder(model, revision) as folder:
        return inspect_checkpoint(read_index(folder))


def status(out: str | Path, *, work_dir: Path | None = None) -> JobStatus:
    """Where the job in ``out`` stands; OutputError where there is none."""
    out = Path(out)
    report = read_report(out)
    if report is not None:
        steps = report["steps"]
        return JobStatus(
            out,
            True,
            len(steps),
            len(steps),
            steps[-1]["step"],
            report["seconds"],
            0.0,
            report["memory"]["peak_bytes"],
            report["recipe"],
        )
    journal = Journal.read(work_dir or out / WORK_FOLDER)
    if journal is None:
        raise OutputError(f"{out} holds no job, or its work lies elsewhere: give --work-dir")
    seconds = [step["seconds"] for step in journal.steps]
    blocks = [s["seconds"] for s in journal.steps if s["step"].startswith("block")]
    total = journal.header["total"]
    pace = median(blocks) if blocks else 0.0
    return JobStatus(
        out,
        False,
        len(journal.steps),
        total,
        journal.steps[-1]["step"] if journal.steps else "",
        sum(seconds),
        pace * (total - len(journal.steps)),
        max((step["peak_bytes"] for step in journal.steps), default=0),
        {k: v for k, v in journal.header["fingerprint"].items() if k in asdict(Recipe())},
    )


def _publish(job: Job) -> dict[str, Any]:
    """Everything beside the weights; the folder becomes a model with its last file."""
    shards = [job.shard_path(number) for number in range(len(job.skeleton) + 1)]
    written = [info for shard in shards for info in read_header(shard).values()]
    report = job_report(
        job.index,
        written,
        {k: job.fingerprint[k] for k in asdict(job.recipe)},
        job.plan,
        job.journal.header,
        job.journal.steps,
    )
    dtypes = {info.name: info.dtype for info in written}
    config = dict(job.index.config)
    config["quantization_config"] = quantization_config(report["linears"], job.recipe.form, dtypes)
    config["auto_map"] = AUTO_MAP
    extra = {
        PLUGIN: plugin_source(),
        "README.md": model_card(report, job.recipe),
        "streamcomp_report.html": html_report(report),
        REPORT: to_json(report),
    }
    publish(job.index, job.out, shards, config, extra)
    return report
