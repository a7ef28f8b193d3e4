"""Tokenizer and licence: read when a job begins, there and the same when it ends, never a leak."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamcomp import JobMismatchError, SourceError
from streamcomp.api import export
from streamcomp.job.publish import REPORT
from tests.jobs import Interrupt, Interrupted, Notes, compress, run_cli, tree, varied_text
from tests.refusals import assert_refused, run_compress


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "calibration.txt", 2000)


class AtTheEnd(Notes):
    """Does something to the model's folder after a job's last step, before it is published."""

    def __init__(self, change: Callable[[], object]) -> None:
        super().__init__()
        self._change, self._steps = change, 0

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None:
        super().begin(title, seconds, done, budget_bytes)
        self._steps = len(seconds)

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        super().finish_step(step, name, seconds, detail)
        if step == self._steps - 1:
            self._change()


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(out).items() if name.endswith(".safetensors")}


def test_a_tokenizer_that_is_gone_at_the_end_is_missed_and_the_work_kept(
    model: Path, text: Path, tmp_path: Path
) -> None:
    compress(model, tmp_path / "whole", text)
    out, away = tmp_path / "out", tmp_path / "away.json"

    def remove() -> None:
        (model / "tokenizer.json").rename(away)

    with pytest.raises(SourceError, match="tokenizer.json cannot be read: No such file.*put back"):
        compress(model, out, text, progress=AtTheEnd(remove))
    assert not (out / "config.json").exists()  # no model yet
    with pytest.raises(JobMismatchError, match="tokenizer.json in the model's folder has changed"):
        compress(model, out, text)

    away.rename(model / "tokenizer.json")
    notes = Notes()
    compress(model, out, text, progress=notes)
    assert notes.steps == []  # all of them were done
    assert weights(out) == weights(tmp_path / "whole")
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_model_folder_that_is_gone_at_the_end_publishes_nothing(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    with pytest.raises(SourceError, match="cannot be read: No such file.*put back"):
        compress(model, out, text, progress=AtTheEnd(lambda: shutil.rmtree(model)))

    assert not (out / "config.json").exists()
    assert (out / ".streamcomp" / "journal.jsonl").is_file()


def test_a_licence_that_changes_meanwhile_is_noticed(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (model / "LICENSE").write_text("free")
    out = tmp_path / "out"

    with pytest.raises(JobMismatchError, match="LICENSE has changed: put back") as caught:
        compress(
            model, out, text, progress=AtTheEnd(lambda: (model / "LICENSE").write_text("paid"))
        )

    assert caught.value.field == "companions"
    assert not (out / "LICENSE").exists()


def test_a_licence_that_changes_between_two_calls_is_noticed(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (model / "LICENSE").write_text("free")
    with pytest.raises(Interrupted):
        compress(model, tmp_path / "out", text, progress=Interrupt(3))
    (model / "LICENSE").write_text("paid")

    with pytest.raises(JobMismatchError, match="LICENSE in the model's folder has changed"):
        compress(model, tmp_path / "out", text)


def test_a_finished_model_of_a_version_without_digests_is_recognised(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico("llama"), out, text)
    report = json.loads((out / REPORT).read_text("utf-8"))
    assert "tokenizer.json" in report["fingerprint"].pop("companions")
    del report["checksum"]
    (out / REPORT).write_text(json.dumps(report))

    assert compress(pico("llama"), out, text).already_done


# -- links -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LICENSE", "notes.txt", "tokenizer.json", "config.json"])
def test_a_file_that_is_a_link_out_of_the_model_is_refused_by_every_command(
    name: str, model: Path, text: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    message = f"{name} is a link to .*secret, outside of the model's folder: refused"

    assert_refused(run_compress(model, tmp_path / "out", text), 3, message)
    assert_refused(run_cli("plan", model, "--threads", 1), 3, message)
    assert_refused(run_cli("inspect", model), 3, message)
    assert_refused(run_cli("eval", model, "--text", text, "--quiet"), 3, message)
    assert_refused(run_cli("export", model, tmp_path / "dense", "--quiet"), 3, message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "dense").exists()


def test_links_within_the_model_are_copied_as_files(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    (model / "legal").mkdir()
    (model / "legal" / "text").write_text("free")
    (model / "LICENSE").symlink_to("legal/text")

    compress(model, out, text)
    export(out, dense)

    for folder in (out, dense):
        assert not (folder / "LICENSE").is_symlink()
        assert (folder / "LICENSE").read_text() == "free"


def test_a_model_in_the_hub_s_cache_is_compressed(model: Path, text: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--org--tiny"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    model.rename(home / "blobs")
    for number, path in enumerate(sorted((home / "blobs").iterdir())):
        blob = path.rename(home / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")

    compress(snapshot, tmp_path / "out", text)

    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (snapshot / "LICENSE").symlink_to(os.path.relpath(text, snapshot))
    assert_refused(run_cli("inspect", snapshot), 3, "LICENSE is a link to .*outside")
