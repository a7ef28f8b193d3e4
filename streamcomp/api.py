"""The whole of streamcomp in one call each. The command line is a thin layer over this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamcomp.calibration.corpus import check_text
from streamcomp.checkpoint.hub import checkpoint_folder, headers_folder
from streamcomp.checkpoint.index import CheckpointIndex, read_header, read_index
from streamcomp.errors import JobLockedError, JobMismatchError, OutputError
from streamcomp.evaluation.export import export_checkpoint
from streamcomp.evaluation.html import html_report
from streamcomp.evaluation.inspection import Inspection, inspect_checkpoint
from streamcomp.evaluation.perplexity import Evaluation, evaluate_checkpoint
from streamcomp.evaluation.report import job_report, model_card
from streamcomp.integrations.transformers import AUTO_MAP, PLUGIN, plugin_source
from streamcomp.job.folders import WORK_FOLDER, output_folders
from streamcomp.job.journal import Journal, check_fingerprint, fingerprint, locked, same_job
from streamcomp.job.progress import JobProgress, SilentProgress
from streamcomp.job.publish import (
    REPORT,
    publish,
    quantization_config,
    read_report,
    to_json,
)
from streamcomp.job.run import (
    Job,
    check_system,
    choose_device,
    prepare_process,
    steps_of_output,
)
from streamcomp.job.workspace import remove_work
from streamcomp.methods import find_method
from streamcomp.modeling.skeleton import Skeleton
from streamcomp.planning.meter import (
    budget_bytes,
    device_budget_bytes,
    is_memory_backed,
    warm_up,
)
from streamcomp.planning.plan import Plan, make_plan
from streamcomp.planning.rates import measure_rates
from streamcomp.planning.schedule import can_be_analysed
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
    """A compressed model: its folder, and the report that also lies there.

    Of several ratios, the first; ``others`` are the rest.
    """

    out: Path
    report: dict[str, Any]
    already_done: bool  # the folder held it before this call
    others: tuple[CompressResult, ...] = ()


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands."""

    out: Path
    finished: bool
    steps_done: int
    steps_total: int
    last_step: str
    seconds: float  # spent so far
    seconds_left: float  # as planned, at the pace of the steps so far; 0 when finished
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
    _check_texts(recipe)
    index = read_index(checkpoint_folder(model, revision))
    finished = _finished(index, out, recipe, resources)
    if finished is not None:
        return finished
    job = Job(index, out, recipe, resources, progress)
    try:
        with job.open():
            job.run()
            folders = job.folders.outputs
            reports = [_publish(job, number) for number in range(len(folders))]
    except (OutputError, JobLockedError):  # another process may have finished it meanwhile
        finished = _finished(index, out, recipe, resources)
        if finished is None:
            raise
        return finished
    _clean(job.work, reports[0])
    return _result(folders, reports, already_done=False)


def _check_texts(recipe: Recipe) -> None:
    """Before a model is fetched: what can be no text is refused."""
    for source in recipe.calibration:
        check_text(source, chat=recipe.chat)


def _finished(
    index: CheckpointIndex, out: Path, recipe: Recipe, resources: Resources
) -> CompressResult | None:
    """What a finished job left in ``out``; None where there is none, an error where it is another.

    What such a job had no time to remove of its work goes now.
    """
    folders = output_folders(out, recipe)
    done = [read_report(folder) for folder in folders]
    if not all(report is not None for report in done):
        return None
    for report in done:
        assert report is not None
        check_fingerprint(report["fingerprint"], fingerprint(index, recipe), out, versions=False)
    _clean(resources.work_dir or out / WORK_FOLDER, done[0])
    return _result(folders, done, already_done=True)


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
    *,
    revision: str | None = None,
) -> Plan:
    """What :func:`compress` would do, from headers alone: steps, bytes, seconds, ranks.

    The budget may be that of a larger machine than this one; seconds are always this one's.
    Raises BudgetError with the least budget that does where none of its plans fits.
    """
    recipe, resources = recipe or Recipe(), resources or Resources()
    prepare_process(resources)
    device = choose_device(resources.device)
    find_method(recipe.method)
    _check_texts(recipe)
    with headers_folder(model, revision) as folder:
        skeleton = Skeleton(read_index(folder))
        skeleton.check_tensors(head=recipe.two_sided)
        gradients, training = recipe.two_sided, recipe.refine > 0
        kernels = warm_up(device, skeleton.dtype, gradients=gradients, training=training)
        return make_plan(
            skeleton,
            recipe,
            budget_bytes(resources.max_ram, elsewhere=True),
            measure_rates(device, skeleton.dtype),
            analysis=resources.keep_work and can_be_analysed(recipe),
            keep_work=resources.keep_work,
            kernel_bytes=kernels,
            memory_backed=resources.work_dir is not None and is_memory_backed(resources.work_dir),
            device_budget=device_budget_bytes(device, resources.max_vram),
        )


def evaluate(
    model: str | Path,
    text: str | None = None,
    *,
    seq_len: int = 512,
    windows: int = 64,
    chat: bool = False,
    resources: Resources | None = None,
    revision: str | None = None,
    progress: JobProgress | None = None,
) -> Evaluation:
    """Perplexity of a dense or compressed ``model`` on ``text``, streamed block by block.

    ``text`` is a file, a folder or a hub dataset; None is the part of the Python language
    reference that calibration never sees. ``windows=0`` takes all of it, ``chat`` renders it
    through the model's chat template.
    """
    resources = resources or Resources()
    prepare_process(resources)
    if text:
        check_text(text, chat=chat)
    index = read_index(checkpoint_folder(model, revision))
    return evaluate_checkpoint(
        index, text, seq_len, windows, resources, progress or SilentProgress(), chat=chat
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
    check_system()
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
    folders = [out, *sorted(out.glob("ratio-*"))]
    report = next((found for folder in folders if (found := read_report(folder))), None)
    journal = Journal.read(work_dir or out / WORK_FOLDER)
    unfinished = journal is not None and len(journal.steps) < journal.header["total"]
    if report is not None and not unfinished:
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
    if journal is None:
        raise OutputError(f"{out} holds no job, or its work lies elsewhere: give --work-dir")
    seconds = sum(step["seconds"] for step in journal.steps)
    planned, done = journal.header["planned_seconds"], len(journal.steps)
    pace = seconds / sum(planned[:done]) if done else 1.0
    return JobStatus(
        out,
        False,
        done,
        len(planned),
        journal.steps[-1]["step"] if journal.steps else "",
        seconds,
        pace * sum(planned[done:]),
        max((step["peak_bytes"] for step in journal.steps), default=0),
        {k: v for k, v in journal.header["fingerprint"].items() if k in asdict(Recipe())},
    )


def _publish(job: Job, output: int) -> dict[str, Any]:
    """Everything beside the weights; the folder becomes a model with its last file."""
    out = job.folders.outputs[output]
    shards = job.folders.shards(output)
    written = [info for shard in shards for info in read_header(shard).values()]
    report = job_report(
        job.index,
        written,
        {k: v for k, v in job.fingerprint.items() if k in asdict(job.recipe)},
        job.plan,
        job.rates,
        job.journal.header,
        steps_of_output(job.journal.steps, output),
    )
    report["asked"] = job.plan.outputs[output].asked
    dtypes = {info.name: info.dtype for info in written}
    config = dict(job.index.config)
    config["quantization_config"] = quantization_config(report["linears"], dtypes)
    config["auto_map"] = AUTO_MAP
    extra = {
        PLUGIN: plugin_source(),
        "README.md": model_card(report, job.recipe),
        "streamcomp_report.html": html_report(report),
        REPORT: to_json(report),
    }
    publish(job.index, out, shards, config, extra)
    return report


def _result(
    folders: list[Path], reports: Sequence[dict[str, Any] | None], already_done: bool
) -> CompressResult:
    first, *others = [
        CompressResult(folder, report or {}, already_done)
        for folder, report in zip(folders, reports, strict=True)
    ]
    return replace(first, others=tuple(others))


def _clean(work: Path, report: Mapping[str, Any] | None) -> None:
    """Remove the work of the finished job with that ``report``, unless it was to be kept.

    What another job left in that folder stays, and so does all of it while a process works there.
    """
    if report is None or not work.is_dir():
        return
    with suppress(JobLockedError, JobMismatchError), locked(work):
        journal = Journal.read(work)
        if journal is None:
            over = not any(work.iterdir())  # killed just before the folder itself was removed
        else:
            ours = same_job(journal.header["fingerprint"], report["fingerprint"])
            over = ours and journal.finished and not journal.header["levers"]["keep_work"]
        if over:
            remove_work(work)
