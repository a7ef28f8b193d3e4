"""Files of the work folder are what the journal says of them, and OUT what its report says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamcomp import DamagedFileError
from streamcomp.checkpoint.digests import digest_of_file
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.job.ledger import Ledger
from streamcomp.job.publish import REPORT, read_report
from tests.jobs import compress, tree, varied_text

TENSORS = {"left": torch.arange(6.0).view(2, 3), "spectrum": torch.arange(4, dtype=torch.float64)}
NAME = "analysis-00000.x.safetensors"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger of one file, which the running step has written."""
    journal: Any = SimpleNamespace(steps=[])
    ledger = Ledger(tmp_path, journal)
    ledger.write(NAME, [Entry(*item) for item in TENSORS.items()])
    return ledger


def test_tensors_come_back_all_or_some(ledger: Ledger) -> None:
    read = dict(ledger.read(NAME))

    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert dict(ledger.read(NAME, {"left"})).keys() == {"left"}


def test_the_file_is_the_one_that_a_shard_would_be(ledger: Ledger, tmp_path: Path) -> None:
    digest = write_shard(tmp_path / "shard", [Entry(*item) for item in TENSORS.items()])

    assert digest == digest_of_file(tmp_path / NAME)
    whole = (tmp_path / NAME).read_bytes()
    assert digest.bytes == len(whole)
    assert digest.digest == hashlib.blake2b(whole, digest_size=16).hexdigest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"I32"'),
        (b"[2,3]", b"[3,2]"),
        (b'"left"', b'"lEft"'),
        (b"\0\0\x80?", b"\0\0\0?"),
    ],
    ids=["dtype", "shape", "name", "number"],
)
def test_a_change_of_what_bytes_mean_is_noticed_too(
    old: bytes, new: bytes, ledger: Ledger, tmp_path: Path
) -> None:
    data = (tmp_path / NAME).read_bytes()
    assert data.count(old) == 1
    (tmp_path / NAME).write_bytes(data.replace(old, new))

    for names in (None, {"left"}):
        with pytest.raises(DamagedFileError) as caught:
            list(ledger.read(NAME, names))
        assert caught.value.path == tmp_path / NAME
    assert torch.equal(dict(ledger.read(NAME, {"spectrum"}))["spectrum"], TENSORS["spectrum"])


def test_a_file_that_no_step_wrote_is_not_used(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes((tmp_path / NAME).read_bytes())

    with pytest.raises(DamagedFileError, match="is not in the journal"):
        list(ledger.read("other.safetensors"))


@pytest.mark.parametrize("settings", [{}, {"method": "swsc", "ratio": (0.2, 0.4)}])
def test_a_report_lists_every_other_file_of_out(
    settings: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    text, out = varied_text(tmp_path / "text", 2000), tmp_path / "out"
    compress(pico("llama"), out, text, **settings)

    for folder in [out] if "ratio" not in settings else sorted(out.iterdir()):
        files = tree(folder)
        told = json.loads(files.pop(REPORT))["files"]
        assert told.keys() == files.keys()
        for name, data in files.items():
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            assert told[name] == {"bytes": len(data), "digest": digest}
        report = read_report(folder)
        assert report is not None and not any(step.files for step in report.steps)
