"""One function for each task of streamcomp. The command line is a thin layer over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamcomp.calibration.corpus import check_text
from streamcomp.checkpoint.fetched import streamed_index
from streamcomp.checkpoint.hub import cached_index, headers_folder
from streamcomp.checkpoint.index import CheckpointIndex, read_header, read_index
from streamcomp.errors import JobLockedError, JobMismatchError, OutputError, RecipeError
from streamcomp.integrations.transformers import AUTO_MAP, PLUGIN, plugin_source
from streamcomp.job.fetching import allow_shards
from streamcomp.job.folders import WORK_FOLDER, output_folders
from streamcomp.job.journal import Journal, check_fingerprint, fingerprint, locked, same_job
from streamcomp.job.plan import Plan, make_plan
from streamcomp.job.planner import Conditions
from streamcomp.job.progress import JobProgress, SilentProgress
from streamcomp.job.publish import publish, quantization_config, read_report
from streamcomp.job.rows import Report
from streamcomp.job.run import Job, rows_of_output
from streamcomp.job.workspace import remove_work
from streamcomp.machine.addresses import within_memory
from streamcomp.machine.session import check_system, machine, probe
from streamcomp.methods import find_method
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Recipe, Resources
from streamcomp.report.card import model_card
from streamcomp.report.html import html_report
from streamcomp.report.summary import job_report
from streamcomp.tools.evaluate import Evaluation, evaluate_checkpoint, work_folder
from streamcomp.tools.export import export_checkpoint
from streamcomp.tools.inspect import Inspection, inspect_checkpoint
from streamcomp.tools.verify import Verification, size_faults, verify_checkpoint

__all__ = [
    "CompressResult",
    "JobStatus",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "status",
    "verify",
]


@dataclass(frozen=True)
class CompressResult:
    """A compressed model: its folder, and the report that is also there, as JSON has it.

    Of several ratios, the first; ``others`` are the rest.
    """

    out: Path
    report: dict[str, Any]
    already_done: bool  # the folder held it before this call
    others: tuple[CompressResult, ...] = ()


@dataclass(frozen=True)
class JobStatus:
    """Progress of a job."""

    out: Path
    finished: bool
    steps_done: int
    steps_total: int
    last_step: str
    seconds: float  # spent so far
    seconds_left: float  # as planned, at the pace of the steps so far; 0 when finished
    peak_bytes: int
    recipe: dict[str, Any]


@within_memory("compressing")
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
    check_system()
    _check_texts(recipe)
    work = resources.work_dir or out / WORK_FOLDER
    index = _source(model, revision, resources, work, _pinned(model, revision, out, recipe, work))
    finished = _finished(index, out, recipe, resources)
    if finished is not None:
        return finished
    try:
        with machine(resources) as here:
            job = Job(index, out, recipe, resources, here, progress)
            with job.open():
                job.run()
                folders = job.folders.outputs
                reports = [_publish(job, number) for number in range(len(folders))]
    except (OutputError, JobLockedError):  # another process may have finished it meanwhile
        finished = _finished(index, out, recipe, resources)
        if finished is None:
            raise
        return finished
    if index.store is not None:
        index.store.clear()
    _clean(job.work_folder, reports[0])
    return _result(folders, reports, already_done=False)


def _source(
    model: str | Path,
    revision: str | None,
    resources: Resources,
    work: Path,
    pinned: str = "",
) -> CheckpointIndex:
    """The checkpoint of a folder or a hub model, which is fetched now or into ``work`` as needed.

    ``pinned`` is the commit of ``revision`` that the job began with.
    """
    if Path(model).is_dir():
        if resources.stream_download:
            raise RecipeError(f"stream_download is for a model on the hub, {model} is a folder")
        return read_index(Path(model))
    if resources.stream_download:
        return streamed_index(str(model), revision, work, pinned)
    return cached_index(str(model), revision, pinned)


def _pinned(model: str | Path, revision: str | None, out: Path, recipe: Recipe, work: Path) -> str:
    """The commit of a hub model that the job in ``out`` is about; "" if there is none yet."""
    held = [report.fingerprint for f in output_folders(out, recipe) if (report := read_report(f))]
    with suppress(OutputError, JobMismatchError):  # told later, by what needs the journal
        journal = Journal.read(work)
        held += [journal.header.fingerprint] if journal else []
    records = [record for each in held if isinstance(record := each.get("hub"), dict)]
    asked = {"model": str(model), "revision": revision or "main"}
    return next((str(each.get("commit")) for each in records if asked.items() <= each.items()), "")


def _check_texts(recipe: Recipe) -> None:
    """Refuse paths that cannot be a text, before a model is fetched."""
    for source in recipe.calibration:
        check_text(source, chat=recipe.chat)


def _finished(
    index: CheckpointIndex, out: Path, recipe: Recipe, resources: Resources
) -> CompressResult | None:
    """The result in ``out`` if this job is finished; None if not, an error if it is another job's.

    What such a job had no time to remove of its work goes now.
    """
    folders = output_folders(out, recipe)
    done = [report for folder in folders if (report := read_report(folder))]
    for report in done:
        check_fingerprint(report.fingerprint, fingerprint(index, recipe), out, versions=False)
    if len(done) < len(folders):
        if Journal.read(resources.work_dir or out / WORK_FOLDER) is None:
            _refuse_damaged(folders)  # one that lacks its config
        return None
    _refuse_damaged(folders)
    _clean(resources.work_dir or out / WORK_FOLDER, done[0])
    return _result(folders, done, already_done=True)


def _refuse_damaged(folders: Sequence[Path]) -> None:
    """OutputError where a finished model lacks a file, or has one of another size."""
    for folder in folders:
        faults = size_faults(folder)
        if faults:
            more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise OutputError(
                f"{faults[0]}{more}: the finished model in {folder} is damaged; restore it, or "
                f"remove {folder} and compress again"
            )


@within_memory("planning")
def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
    *,
    revision: str | None = None,
) -> Plan:
    """Plan a compression from headers alone: steps, bytes, seconds, ranks.

    The budget may be that of a larger machine than this one; seconds are always this one's.
    Raises BudgetError with the least budget that does where none of its plans fits.
    """
    recipe, resources = recipe or Recipe(), resources or Resources()
    method, work = find_method(recipe.method), resources.work_dir
    with machine(resources, elsewhere=True) as here:
        _check_texts(recipe)
        with _headers(model, revision, resources) as index:
            skeleton = Skeleton(index)
            skeleton.check_tensors(head=method.needs_gradients)
            kernels = here.kernel_bytes(
                skeleton.dtype, gradients=method.needs_gradients, training=recipe.refine > 0
            )
            conditions = Conditions(
                budget_bytes=here.budget_bytes,
                addresses=here.addresses,
                rates=here.rates(skeleton.dtype),
                device_budget=here.device_budget,
                kernel_bytes=kernels,
                shard_bytes=allow_shards(skeleton, resources),
                work_in_memory=work is not None and probe().is_memory_backed(work),
                keeps_work=resources.keep_work,
                keeps_analysis=resources.keep_work and method.can_be_analysed(recipe),
            )
            return make_plan(skeleton, recipe, conditions)


@contextmanager
def _headers(
    model: str | Path, revision: str | None, resources: Resources
) -> Iterator[CheckpointIndex]:
    """The checkpoint, of which a hub model's weights are not fetched."""
    if resources.stream_download:
        yield _source(model, revision, resources, Path(WORK_FOLDER))
        return
    with headers_folder(model, revision) as folder:
        yield read_index(folder)


@within_memory("evaluating")
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
    check_system()
    if text:
        check_text(text, chat=chat)
    with work_folder(resources.work_dir) as shards:
        index = _source(model, revision, resources, shards)
        return evaluate_checkpoint(
            index, text, seq_len, windows, resources, progress or SilentProgress(), chat=chat
        )


@within_memory("exporting")
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
    index = _source(model, None, Resources(), Path(WORK_FOLDER))
    extra = {PLUGIN: plugin_source()}
    return export_checkpoint(
        index, Path(destination), form, extra, AUTO_MAP, progress or SilentProgress()
    )


@within_memory("inspecting")
def inspect(model: str | Path, *, revision: str | None = None) -> Inspection:
    """Families of linears in a dense or compressed ``model``, from headers alone."""
    with headers_folder(model, revision) as folder:
        return inspect_checkpoint(read_index(folder))


@within_memory("verifying")
def verify(out: str | Path, *, progress: JobProgress | None = None) -> Verification:
    """Check the compressed model in ``out``: its files, their digests, and whether it loads.

    SourceError where ``out`` holds no compressed model; what is damaged is in the result.
    """
    check_system()
    return verify_checkpoint(Path(out), progress or SilentProgress())


def status(out: str | Path, *, work_dir: Path | None = None) -> JobStatus:
    """Progress of the job in ``out``; OutputError where there is none, or files are missing."""
    out = Path(out)
    folders = [out, *sorted(out.glob("ratio-*"))]
    report = next(filter(None, map(read_report, folders)), None)
    journal = Journal.read(work_dir or out / WORK_FOLDER)
    if journal is None or (journal.finished and report is not None):
        _refuse_damaged(folders)
    if report is not None and (journal is None or journal.finished):
        steps = report.steps
        return JobStatus(
            out=out,
            finished=True,
            steps_done=len(steps),
            steps_total=len(steps),
            last_step=steps[-1].step,
            seconds=report.seconds,
            seconds_left=0.0,
            peak_bytes=report.memory.peak_bytes,
            recipe=report.recipe,
        )
    if journal is None:
        raise OutputError(f"{out} holds no job, or its work is elsewhere: give --work-dir")
    seconds = sum(step.seconds for step in journal.steps)
    planned, done = journal.header.planned_seconds, len(journal.steps)
    pace = seconds / (sum(planned[:done]) or seconds) if seconds else 1.0
    return JobStatus(
        out=out,
        finished=False,
        steps_done=done,
        steps_total=len(planned),
        last_step=journal.steps[-1].step if journal.steps else "",
        seconds=seconds,
        seconds_left=pace * sum(planned[done:]),
        peak_bytes=max((step.peak_bytes for step in journal.steps), default=0),
        recipe=journal.header.recipe,
    )


def _publish(job: Job, output: int) -> Report:
    """Write all files besides the weights; the last one makes the folder a model."""
    out = job.folders.outputs[output]
    shards = job.shard_digests(output)
    written = [info for name in shards for info in read_header(out / name).values()]
    report = job_report(
        job.index,
        written,
        job.plan,
        job.conditions.rates,
        job.journal.header,
        rows_of_output(job.journal.steps, output),
        job.plan.outputs[output].asked,
    )
    dtypes = {info.name: info.dtype for info in written}
    config = dict(job.index.config)
    config["quantization_config"] = quantization_config(report.specs, dtypes)
    config["auto_map"] = AUTO_MAP
    extra = {
        PLUGIN: plugin_source(),
        "README.md": model_card(report, job.recipe),
        "streamcomp_report.html": html_report(report),
    }
    return publish(job.index, out, shards, config, extra, report)


def _result(folders: list[Path], reports: Sequence[Report], already_done: bool) -> CompressResult:
    first, *others = [
        CompressResult(folder, report.to_dict(), already_done)
        for folder, report in zip(folders, reports, strict=True)
    ]
    return replace(first, others=tuple(others))


def _clean(folder: Path, report: Report) -> None:
    """Remove the work of the finished job with that ``report``, unless it was to be kept.

    What another job left in that folder stays, and so does all of it while a process works there.
    """
    if not folder.is_dir() or (folder.is_symlink() and folder.name == WORK_FOLDER):
        return
    with suppress(JobLockedError, JobMismatchError), locked(folder):
        journal = Journal.read(folder)
        if journal is None:
            over = not any(folder.iterdir())  # killed just before it removed the folder
        else:
            ours = same_job(journal.header.fingerprint, report.fingerprint)
            over = ours and journal.finished and not journal.header.levers.keep_work
        if over:
            remove_work(folder)
