"""Checks a compressed folder: the files that its report lists, and the model that they are.

Every byte is read once, ``COPY_BYTES`` at a time: files are digested, and floats have to be finite.
The model is built without weights, so that memory does not depend on its size.
"""

from __future__ import annotations

import copy
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers

from streamcomp.checkpoint.digests import Digester, FileDigest
from streamcomp.checkpoint.index import (
    CheckpointIndex,
    TensorInfo,
    read_header,
    read_index,
    read_json,
)
from streamcomp.checkpoint.reader import TensorReader
from streamcomp.errors import OutputError, SourceError, StreamcompError
from streamcomp.forms.install import FACTORED
from streamcomp.forms.runtime import FLOATS, FORMAT_VERSION, FactoredLinear
from streamcomp.job.progress import JobProgress
from streamcomp.job.publish import REPORT, read_report
from streamcomp.model.loading import quiet_loading
from streamcomp.model.skeleton import Skeleton
from streamcomp.units import format_bytes

__all__ = ["Verification", "size_faults", "verify_checkpoint"]

# Files that people edit; nothing depends on them.
_EDITED = ("README.md",)
# Names in a note or a fault, at most.
_NAMED = 5


@dataclass(frozen=True)
class Verification:
    """Result of checking a compressed folder."""

    out: Path
    checked: tuple[str, ...]  # what is as it should be
    faults: tuple[str, ...]  # what is wrong, by file or tensor; empty where the model is sound
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        return {"sound": self.sound} | asdict(self) | {"out": str(self.out)}


@dataclass
class _Findings:
    where: str = ""  # before each line on what was checked
    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, faults: Sequence[str], sound: str) -> None:
        """Add ``faults``, or ``sound`` to what was checked where there are none."""
        self.faults += faults
        if not faults:
            self.checked.append(self.where + sound)


def verify_checkpoint(out: Path, progress: JobProgress) -> Verification:
    """Check the compressed model in ``out``, or each of them where a job had several ratios.

    SourceError where there is none; whatever else is wrong is among the faults.
    """
    ratios = [] if _is_model(out) else sorted(filter(_is_model, out.glob("ratio-*")))
    findings = _Findings()
    for folder in ratios or [out]:
        findings.where = f"{folder.name}: " if ratios else ""
        _verify(folder, findings, progress)
    return Verification(out, *map(tuple, (findings.checked, findings.faults, findings.notes)))


def size_faults(out: Path) -> list[str]:
    """Files in ``out`` that are missing or have another size than its report lists."""
    try:
        listed = _listed_files(out)
    except OutputError as error:
        return [str(error)]
    faults = {name: _size_fault(out / name, file) for name, file in listed.items()}
    return [fault for name, fault in faults.items() if fault and name not in _EDITED]


def _verify(out: Path, findings: _Findings, progress: JobProgress) -> None:
    """Add to ``findings`` what a check of one model shows."""
    listed: Mapping[str, FileDigest] = {}
    if not (out / REPORT).is_file():
        _refuse_others(out)
    try:
        listed = _listed_files(out)
    except OutputError as error:
        findings.faults.append(str(error))
    index = _check_model(out, findings)
    shards = index.shards if index else []
    if listed:
        unlisted = [shard.name for shard in shards if shard.name not in listed]
        findings.faults += [f"{out / name} is not in the report's list" for name in unlisted]
        names = {path.name for path in out.iterdir() if path.is_file()}
        others = sorted(names - listed.keys() - {REPORT, *unlisted})
        if others:
            findings.notes.append(f"{out}: not in the report's list: {', '.join(others[:_NAMED])}")
    else:
        findings.notes.append(f"{out} has no list of digests: its files were not compared with it")
    _read_files(out, listed, shards, findings, progress)


def _is_model(out: Path) -> bool:
    return any((out / name).exists() for name in ("config.json", REPORT))


def _refuse_others(out: Path) -> None:
    """SourceError unless the config in ``out`` is a compressed model's."""
    if not out.is_dir():
        raise SourceError(f"{out} is not a folder")
    quantization = read_json(out / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "streamcomp":
        raise SourceError(f"{out} holds no model that streamcomp has compressed")


# -- files -----------------------------------------------------------------------------------


def _listed_files(out: Path) -> Mapping[str, FileDigest]:
    """Files by their names, as the report in ``out`` lists them; none where there is no list."""
    report = read_report(out, finished=False)
    files = report.files if report else {}
    for name in files:
        if PurePosixPath(name).parts != (name,) or name in ("..", "/"):
            raise OutputError(f"{out / REPORT} is damaged: it lists a file {name!r:.80}")
    return files


def _size_fault(path: Path, file: FileDigest) -> str:
    """What is wrong with ``path`` before it is read; empty if nothing is."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{path} is missing ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no file"
    if status.st_size != file.bytes:
        return f"{path} has {status.st_size:,} bytes, the report lists {file.bytes:,}"
    return ""


def _read_files(
    out: Path,
    listed: Mapping[str, FileDigest],
    shards: Sequence[Path],
    findings: _Findings,
    progress: JobProgress,
) -> None:
    """Read all bytes: digests have to be those of the report, and floats finite."""
    names = sorted({*listed, *(shard.name for shard in shards)})
    sizes = [file.bytes for file in listed.values()]
    damaged, infinite = [], []
    progress.begin(f"verify {out}", [1.0] * len(names), 0, 0)
    try:
        for number, name in enumerate(names):
            started, path = time.perf_counter(), out / name
            file = listed.get(name)
            fault = _size_fault(path, file) if file else ""
            if not fault:
                digest, bad = _read_file(path, path in shards)
                infinite += [f"{path}: {tensor} holds NaN or infinity" for tensor in bad]
                if file and digest != file.digest:
                    fault = f"{path} was altered: its digest is {digest}, not {file.digest:.64}"
            if fault and name in _EDITED:
                findings.notes.append(f"{path} was edited or removed")
            elif fault:
                damaged.append(fault)
            progress.finish_step(number, name, time.perf_counter() - started, "")
    finally:
        progress.end()
    if listed:
        told = (
            f"{len(listed)} files, {format_bytes(sum(sizes))}: sizes and digests are the report's"
        )
        findings.tell(damaged, told)
    if shards:
        findings.tell(infinite, f"no number in {len(shards)} shards is NaN or infinite")


def _read_file(path: Path, is_shard: bool) -> tuple[str, list[str]]:
    """The digest of ``path``, and the tensors in it that hold NaN or infinity."""
    size = path.stat().st_size
    tensors = sorted(read_header(path).values(), key=lambda info: info.start) if is_shard else []
    start = tensors[0].start if tensors else size
    digester, bad = Digester(), []
    with TensorReader() as reader:
        for info in (TensorInfo("", "U8", (start,), path, 0, start), *tensors):
            finite = True
            for chunk in reader.chunks(info):
                digester.update(chunk)
                if info.dtype in FLOATS:
                    numbers = torch.frombuffer(chunk, dtype=info.torch_dtype)
                    finite = finite and bool(numbers.isfinite().all())
            if not finite:
                bad.append(info.name)
    return digester.total.digest, bad


# -- the model -------------------------------------------------------------------------------


def _check_model(out: Path, findings: _Findings) -> CheckpointIndex | None:
    """Check config, index and headers; the index, if it can be read."""
    index = None
    try:
        index = read_index(out)
        unlisted = [
            f"{shard} holds {name}, which the index does not list"
            for shard in index.shards
            for name in read_header(shard)
            if name not in index.tensors
        ]
        told = f"{len(index.tensors)} tensors in {len(index.shards)} shards: index, headers "
        findings.tell(unlisted[:_NAMED], told + "and config agree")
        skeleton = Skeleton(index)
        skeleton.check_tensors(head=True)
        _check_indices(skeleton, findings)
        told = f"transformers {transformers.__version__} loads it (without weights)"
        findings.tell(_loading_faults(skeleton), told)
    except StreamcompError as error:
        findings.faults.append(str(error))
    return index


def _check_indices(skeleton: Skeleton, findings: _Findings) -> None:
    """Read pivots and labels, one module's at a time."""
    linears, experts, faults = 0, 0, []
    with TensorReader() as reader:
        for name, module in skeleton.model.named_modules():
            if not isinstance(module, FACTORED):
                continue
            is_linear = isinstance(module, FactoredLinear)
            linears, experts = linears + is_linear, experts + (not is_linear)
            for leaf in module.factors:
                if leaf in module._buffers:
                    module._buffers[leaf] = reader.read(skeleton.source_of(f"{name}.{leaf}"))
            try:
                module.check_indices(name)
            except ValueError as error:
                faults.append(str(error))
            module.to("meta")
    told = f"{linears} factored linears" + (f" and experts of {experts} blocks" if experts else "")
    findings.tell(faults, f"{told}: forms, ranks, shapes and indices are valid")


def _loading_faults(skeleton: Skeleton) -> list[str]:
    """What transformers says when it loads tensors of these names and shapes on ``meta``."""
    index, config = skeleton.index, copy.deepcopy(skeleton.config)
    config.quantization_config = {
        "quant_method": "streamcomp",
        "version": FORMAT_VERSION,
        "modules": skeleton.modules,
    }
    state = {
        info.name: torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
        for info in index.tensors.values()
    }
    try:
        with quiet_loading():
            _, told = type(skeleton.model).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=skeleton.dtype,
                device_map={"": "meta"},
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises errors of many kinds
        first = " ".join(str(error).split())[:300]
        return [f"{index.folder}: transformers cannot load it ({type(error).__name__}: {first})"]
    missing = sorted(told["missing_keys"])[:_NAMED]
    return [f"{index.folder}: {name} is in no shard" for name in missing]
