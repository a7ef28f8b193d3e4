"""Turns a finished job's folder into a model: everything that makes it loadable, last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamcomp.checkpoint.atomic import atomic_file, write_json, write_text
from streamcomp.checkpoint.digests import Digester, FileDigest, digest_of, digest_of_file
from streamcomp.checkpoint.files import pieces
from streamcomp.checkpoint.index import INDEX_FILE, CheckpointIndex, read_header, read_json
from streamcomp.errors import JobMismatchError, OutputError, RecipeError, SourceError
from streamcomp.forms.runtime import FORMAT_VERSION
from streamcomp.job.rows import Report

__all__ = [
    "REPORT",
    "copy_companions",
    "publish",
    "quantization_config",
    "read_report",
    "to_json",
    "write_index",
]

REPORT = "streamcomp_report.json"


def publish(
    index: CheckpointIndex,
    out: Path,
    shards: Mapping[str, FileDigest],
    config: Mapping[str, Any],
    extra: Mapping[str, str],
    report: Report,
) -> Report:
    """Write companions, ``extra`` files, index and ``report``, and the config last of all.

    ``shards`` are there already; companions must be those of the report's fingerprint. The report
    is returned as it was written: it names all other files of OUT, with their sizes and digests.
    """
    companions = report.fingerprint["companions"]
    copy_companions(index.folder, out, companions)
    small = [*companions, *extra, INDEX_FILE]
    for name, text in extra.items():
        write_text(out / name, text)
    write_index(out, [out / name for name in shards])
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    files = {**shards, **{name: digest_of_file(out / name) for name in small}}
    files["config.json"] = digest_of(text.encode("utf-8", "backslashreplace"))
    report = replace(report, files=files)
    value = report.to_dict()
    write_text(out / REPORT, to_json(value | {"checksum": _checksum(value)}))
    write_text(out / "config.json", text)
    return report


def copy_companions(source: Path, out: Path, digests: Mapping[str, str]) -> None:
    """Copy tokenizer, generation settings and licence, which have these ``digests`` by name.

    An error names the first that is gone or has other bytes; the work of a job stays.
    """
    remedy = "put back the file that the job began with, and the same command goes on"
    for name, digest in digests.items():
        digester = Digester()
        with atomic_file(out / name) as target:
            try:
                for piece in pieces(source / name):
                    digester.update(piece)
                    target.write(piece)
            except SourceError as error:
                raise SourceError(f"{error}: {remedy}") from None
            if digester.total.digest != digest:
                raise JobMismatchError(f"{source / name} has changed: {remedy}", field="companions")


def write_index(out: Path, shards: list[Path]) -> None:
    """``model.safetensors.index.json`` over ``shards``, read from their headers."""
    headers = {shard.name: read_header(shard) for shard in shards}
    sizes = [info.nbytes for header in headers.values() for info in header.values()]
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    write_json(
        out / INDEX_FILE,
        {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))},
    )


def quantization_config(
    specs: Mapping[str, Mapping[str, Any]], dtypes: Mapping[str, str]
) -> dict[str, Any]:
    """The config's entry for factored modules: ``specs`` by name, ``dtypes`` by tensor name.

    OutputError where a module's tensors were not written.
    """
    first = {name: f"{name}.{_first_tensor(spec)}" for name, spec in specs.items()}
    if missing := [name for name, tensor in first.items() if tensor not in dtypes]:
        raise OutputError(
            f"no shard holds {missing[0]}, which the journal lists: the journal is damaged, remove "
            "the work folder and start again"
        )
    return {
        "quant_method": "streamcomp",
        "version": FORMAT_VERSION,
        "modules": {name: {**spec, "dtype": dtypes[first[name]]} for name, spec in specs.items()},
    }


def _first_tensor(spec: Mapping[str, Any]) -> str:
    """Name of a tensor of floats that every module with that entry has."""
    ranks = spec.get("ranks")
    return f"{next(iter(ranks))}_V" if isinstance(ranks, dict) and ranks else "weight"


def to_json(value: Any) -> str:
    """Indented JSON with a final line end."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _checksum(report: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(report).encode()).digest


def read_report(out: Path, *, finished: bool = True) -> Report | None:
    """The report in ``out``; None where there is none, or no model that is ``finished``.

    OutputError where it is not as it was written.
    """
    if not (out / REPORT).is_file() or (finished and not (out / "config.json").is_file()):
        return None
    try:
        value = read_json(out / REPORT)
        if value.pop("checksum", None) not in (None, _checksum(value)):
            raise ValueError("another checksum")
        report = Report.from_dict(value)
        if not report.steps:
            raise ValueError("no steps")
        _ = report.settings  # refuses a recipe that is none
        return report
    except SourceError as error:
        raise OutputError(f"{error}: remove {out} and start again") from None
    except (ValueError, RecursionError, RecipeError) as error:
        raise OutputError(
            f"{out / REPORT} is damaged ({error}): remove {out} and start again"
        ) from None
