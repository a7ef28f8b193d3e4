"""The steps that a job has finished, one line each, durable before the next one begins.

``journal.jsonl`` opens with a header (format version, fingerprint, levers); each further
line is one finished step with its results (:mod:`streamcomp.job.rows`). A line is appended and
synced after the files that it speaks of, so it never promises what is not there. Each line ends
with a checksum of itself. A line that a crash cut short is dropped; a whole line that is damaged
is dropped with all lines after it, and the job does their steps again. A lock on the output folder
keeps a second process out; the kernel releases it with the process, so nothing stale is left by
SIGKILL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from streamcomp.calibration.corpus import text_files
from streamcomp.checkpoint.atomic import output_errors, write_text
from streamcomp.checkpoint.digests import Digester, digest_of
from streamcomp.checkpoint.files import companion_digests, open_regular
from streamcomp.checkpoint.index import CheckpointIndex
from streamcomp.errors import (
    CalibrationError,
    JobLockedError,
    JobMismatchError,
    OutputError,
    RecipeError,
)
from streamcomp.job.rows import Header, JobLevers, Row, StepRow
from streamcomp.recipe import DECOMPOSITION_FIELDS, OUTPUT_FIELDS, Recipe
from streamcomp.settings import about

__all__ = [
    "JOURNAL",
    "Fingerprint",
    "Journal",
    "check_fingerprint",
    "fingerprint",
    "locked",
    "same_analysis",
    "same_job",
    "same_moments",
]

JOURNAL = "journal.jsonl"
_VERSION = 7
_PIECE_BYTES = 1 << 20

# field -> value; all must agree for a job to be continued
Fingerprint = dict[str, Any]


def fingerprint(index: CheckpointIndex, recipe: Recipe) -> Fingerprint:
    """All that decides a job's result: source, recipe, calibration files, library versions."""
    fields: Fingerprint = {
        "source": _source_hash(index),
        "companions": companion_digests(index.folder),
        **_settings(recipe),
    }
    if index.hub is not None:
        fields["hub"] = index.hub.record
    fields["calibration_files"] = [
        [name, _text_hash(Path(name))] for name in recipe.calibration if Path(name).exists()
    ]
    fields["torch"] = str(torch.__version__)
    fields["transformers"] = transformers.__version__
    return fields


def check_fingerprint(
    held: Mapping[str, Any], wanted: Fingerprint, folder: Path, *, versions: bool = True
) -> None:
    """JobMismatchError naming the first field in which ``held`` differs from ``wanted``.

    Fields that shape decompositions or the output alone come last, because kept work may serve a
    job in which they differ.
    """
    held = _completed(held)
    for field in sorted(wanted, key=lambda name: name in (*DECOMPOSITION_FIELDS, *OUTPUT_FIELDS)):
        value = wanted[field]
        if not versions and field in ("torch", "transformers"):
            continue
        if field in ("companions", "hub") and field not in held:  # finished by an earlier version
            continue
        if held.get(field) != value:
            was, now = held.get(field), value
            what = (
                "the model's files have changed, or it is another model"
                if field == "source"
                else _changed(was, now)
                if field == "companions"
                else f"{field} was {was!r}, now {now!r}"
            )
            raise JobMismatchError(
                f"{folder} holds another job: {what}. Give another folder, or remove that one",
                field=field,
            )


def _changed(was: Any, now: Mapping[str, str]) -> str:
    """The first file next to the weights that differs."""
    was = was if isinstance(was, dict) else {}
    names = sorted(was.keys() | now.keys())
    first = next(name for name in names if was.get(name) != now.get(name))
    return f"{first} in the model's folder has changed"


def same_job(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of one job."""
    return _same_but((), one, other)


def same_analysis(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two jobs differ only in settings that shape their output."""
    return _same_but(OUTPUT_FIELDS, one, other)


def same_moments(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two jobs differ only in settings that shape decompositions or output."""
    return _same_but((*DECOMPOSITION_FIELDS, *OUTPUT_FIELDS), one, other)


def _completed(held: Mapping[str, Any]) -> Fingerprint:
    """``held`` with the defaults of settings that did not exist when it was taken."""
    stored = {name: held[name] for name in about(Recipe) if name in held}
    try:
        return _settings(Recipe.from_mapping(stored)) | dict(held)
    except RecipeError:  # from a version with other rules
        return dict(held)


def _settings(recipe: Recipe) -> Fingerprint:
    """Plain values of the settings that affect the result."""
    described = about(recipe)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(recipe).items()
        if described[name].affects != "nothing"
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on ``folder``; JobLockedError if another process has it."""
    import fcntl  # not on every system; status, which takes no lock, is

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobLockedError(
                f"another process works on {folder}: wait for it, or stop it"
            ) from None
        yield
    finally:
        os.close(descriptor)


class Journal:
    """The journal in ``folder``; :meth:`open` continues one or begins it."""

    def __init__(
        self,
        path: Path,
        header: Header,
        steps: list[StepRow],
        inherited: bool = False,
        lost: int = 0,
    ) -> None:
        self.path, self.header, self.steps = path, header, steps
        self.inherited = inherited  # begun with the analysis of another job
        self.lost = lost  # lines: the first that is damaged, and those after it

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal in ``folder`` up to its first damaged line; None where there is none.

        OutputError where that is the header: without it nothing can be continued.
        """
        path = folder / JOURNAL
        try:
            with open(open_regular(path, follow=False), "rb") as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}") from None
        first, *lines = data.split(b"\n")[:-1] or [b""]  # an incomplete line is none
        try:
            if _version(first) != _VERSION:
                raise JobMismatchError(
                    f"{path} was written by another version of streamcomp: remove {folder}",
                    field="version",
                )
            header = Header.from_dict(_entry(first))
        except (ValueError, RecursionError):
            raise OutputError(f"{path} is damaged: remove {folder} and start again") from None
        steps: list[StepRow] = []
        with suppress(ValueError, RecursionError):
            for line in lines:
                steps.append(StepRow.from_dict(_entry(line)))
        return cls(path, header, steps, lost=len(lines) - len(steps))

    @classmethod
    def begin(
        cls, folder: Path, wanted: Fingerprint, levers: JobLevers, seconds: Iterable[float]
    ) -> Journal:
        """A new journal of a job whose steps are planned to take ``seconds`` each."""
        planned = tuple(seconds)
        header = Header(
            version=_VERSION,
            fingerprint=wanted,
            levers=levers,
            total=len(planned),
            planned_seconds=planned,
        )
        write_text(folder / JOURNAL, _line(header))
        return cls(folder / JOURNAL, header, [])

    def inherit(self, wanted: Fingerprint, before: tuple[str, ...], **levers: Any) -> Journal:
        """A journal of the job ``wanted`` that begins with steps of this one.

        It takes the steps before the first whose name begins with one of ``before``, and the
        levers, of which ``levers`` are replaced.
        """
        ends = (n for n, row in enumerate(self.steps) if row.step.startswith(before))
        held = replace(self.header.levers, **levers)
        header = replace(self.header, fingerprint=wanted, levers=held)
        return Journal(self.path, header, self.steps[: next(ends, 0)], inherited=True)

    def trim(self) -> None:
        """Cut off the incomplete line that a crash may have left at the end."""
        lines = [_line(row) for row in (self.header, *self.steps)]
        with output_errors(self.path):
            if self.inherited or self.path.stat().st_size != sum(map(len, lines)):
                write_text(self.path, "".join(lines))

    def cut(self, done: int) -> None:
        """Forget all steps from number ``done`` on, durably."""
        self.steps = self.steps[:done]
        self.trim()

    def commit(self, row: StepRow) -> None:
        """Append the row of a finished step, durably."""
        line = _line(row).encode()
        with output_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self.steps.append(row)

    @property
    def finished(self) -> bool:
        return len(self.steps) == self.header.total

    def find(self, step: str) -> StepRow | None:
        """The row of ``step``, None if it is not done."""
        return next((row for row in self.steps if row.step == step), None)


def _line(row: Row) -> str:
    """A JSON object whose last key is the checksum of the object without it."""
    text = json.dumps(row.to_dict())
    return f'{text[:-1]}, "checksum": "{digest_of(text.encode()).digest}"}}\n'


def _same_but(fields: Iterable[str], one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    one, other = _completed(one), _completed(other)
    older = {"companions", "hub"} - (
        one.keys() & other.keys()
    )  # versions that did not look at them
    names = (one.keys() | other.keys()) - set(fields) - older
    return all(one.get(name) == other.get(name) for name in names)


def _entry(line: bytes) -> dict[str, Any]:
    """One line of a journal; ValueError where it is not what was written."""
    text, _, checksum = line.rpartition(b', "checksum": "')
    if checksum != digest_of(text + b"}").digest.encode() + b'"}':
        raise ValueError("another checksum")
    entry: dict[str, Any] = json.loads(text + b"}")
    return entry


def _version(line: bytes) -> Any:
    """The version that a journal's first line tells, of whatever version it is."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("no object")
    return entry.get("version")


def _source_hash(index: CheckpointIndex) -> str:
    """Config, each shard's name and size, its time of change or the hub's digest, its tensors."""
    digester = Digester()
    digester.update(json.dumps(index.config, sort_keys=True).encode())
    for shard in index.shards:
        digester.update(json.dumps(index.stamp(shard)).encode())
    for name, info in sorted(index.tensors.items()):
        for part in info.stored:
            row = [name, part.dtype, list(part.shape), part.shard.name, part.start, part.stop]
            digester.update(json.dumps(row).encode())
    if index.quantization:
        digester.update(json.dumps(index.quantization, sort_keys=True).encode())
    return digester.total.digest


def _text_hash(path: Path) -> str:
    """Hash of a file, or of a folder's texts: a copy of them elsewhere has the same one."""
    digester = Digester()
    for file in [path] if path.is_file() else text_files(path):
        try:
            with file.open("rb") as text:
                while piece := text.read(_PIECE_BYTES):
                    digester.update(piece)
        except OSError as error:
            raise CalibrationError(f"{file} cannot be read: {error.strerror}") from error
    return digester.total.digest
