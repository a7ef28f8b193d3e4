"""A file of a job that was changed between two runs is noticed, and the job makes it again."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamcomp import DamagedFileError, JobMismatchError, OutputError, StreamcompError, status
from streamcomp.checkpoint.digests import FileDigest, digest_of_file
from streamcomp.checkpoint.index import read_index
from streamcomp.job import run
from streamcomp.job.journal import JOURNAL
from tests.jobs import Interrupt, Interrupted, Notes, compress, run_cli, tree
from tests.pico import save_pico

KINDS: dict[str, dict[str, Any]] = {
    "two-sided": {},
    "refined": {"update": True, "refine": 2, "include": "k_proj|down_proj"},
    "stored": {"store_every": 2, "ratio": (0.2, 0.4), "include": "k_proj|down_proj"},
    "swsc": {"method": "swsc"},
    "rom": {"method": "rom"},
    "compressed": {"method": "svd-llm", "statistics": "compressed"},
}
HOW = ("flip", "zero", "cut", "delete", "exchange")
MOST = int(os.environ.get("DAMAGES", "8"))  # of a kind of job; there are some 300
WORK = ".streamcomp"


class Snapshots(Notes):
    """Copies OUT after each step."""

    def __init__(self, out: Path, copies: Path) -> None:
        super().__init__()
        self._out, self._copies = out, copies

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        super().finish_step(step, name, seconds, detail)
        shutil.copytree(self._out, self._copies / f"{step:02}")


def damage(path: Path, how: str, choose: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = choose.randrange(len(data))
    match how:
        case "flip":
            data[at] ^= 1 << choose.randrange(8)
        case "zero":
            at = 2 * len(data) // 3
            data[at:] = bytes(len(data) - at)
        case "cut":
            del data[at:]
        case "delete":
            path.unlink()
            return
        case "exchange":  # two bytes change places
            other = choose.randrange(len(data))
            data[at], data[other] = data[other], data[at]
    path.write_bytes(data)


def weights(out: Path) -> dict[str, bytes]:
    """What a model is loaded from."""
    return {
        name: data
        for name, data in tree(out).items()
        if name.endswith((".safetensors", "config.json", "index.json"))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_never_changes_the_result(
    kind: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    dense, settings = pico("llama"), KINDS[kind]
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    compress(dense, whole, text, progress=Snapshots(whole, copies), **settings)
    expected, choose = weights(whole), random.Random(0)
    cases = [
        (copy, name, how) for copy in sorted(copies.iterdir()) for name in tree(copy) for how in HOW
    ]
    for number, (copy, name, how) in enumerate(choose.sample(cases, min(MOST, len(cases)))):
        case = f"{how} {name} after step {copy.name}"
        out = tmp_path / f"out-{number}"
        shutil.copytree(copy, out)
        damage(out / name, how, choose)
        try:
            compress(dense, out, text, progress=(notes := Notes()), **settings)
        except OutputError as error:
            assert name.endswith(JOURNAL), (case, error)  # its header is all that must be whole
            assert "remove" in str(error) or "give another OUT" in str(error), case
        else:
            assert weights(out) == expected, (case, notes.texts)
            assert not (out / WORK).exists(), case
        shutil.rmtree(out)


class AfterStep(Notes):
    """Does something once a step is finished for the first time."""

    def __init__(self, step: str, do: Callable[[], object]) -> None:
        super().__init__()
        self._step, self._do = step, do

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        super().finish_step(step, name, seconds, detail)
        if name == self._step and self.steps.count(name) == 1:
            self._do()


def flip(path: Path) -> None:
    damage(path, "flip", random.Random(0))


@pytest.mark.parametrize(
    ("step", "file", "told"),
    [
        ("forward 0", "hidden-00001.bin", "step 'forward 0' was done again"),
        ("forward 1", "windows.safetensors", ""),  # it is in memory
        ("reverse 1", "gradient-00001.bin", "going back to step 'forward 0'"),
        ("ranks", "analysis-00000.self_attn.k_proj.safetensors", "going back to step 'embed'"),
    ],
)
def test_a_file_damaged_while_the_job_runs_is_made_again(
    step: str, file: str, told: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    compress(dense, tmp_path / "whole", text)
    path = out / WORK / file

    compress(dense, out, text, progress=(notes := AfterStep(step, lambda: flip(path))))

    assert len(notes.texts) == bool(told), notes.texts
    assert all(file in text and told in text for text in notes.texts), notes.texts
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("file", ["windows.safetensors", "hidden-00002.bin"])
@pytest.mark.parametrize("how", ["flip", "zero", "cut", "delete"])
def test_only_the_step_that_wrote_a_file_is_done_again(
    how: str, file: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    compress(dense, tmp_path / "whole", text)
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(3))
    damage(out / WORK / file, how, random.Random(0))

    compress(dense, out, text, progress=(notes := Notes()))

    assert len(notes.texts) == 1 and "was done again" in notes.texts[0]
    assert notes.done == 4 and weights(out) == weights(tmp_path / "whole")


def test_a_job_gives_up_on_a_machine_that_damages_a_file_again_and_again(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"

    class Damaging(Notes):
        times = 0

        def stage(self, step: int, name: str, stage: str, share: float) -> None:
            if (name, stage) == ("forward 1", "loading"):
                flip(out / WORK / "hidden-00001.bin")
                self.times += 1

    with pytest.raises(DamagedFileError, match=r"hidden-00001.bin has other bytes .* run the same"):
        compress(dense, out, text, progress=(damaging := Damaging()))

    assert damaging.times == run._MOST_TIMES
    compress(dense, out, text)
    compress(dense, tmp_path / "whole", text)
    assert weights(out) == weights(tmp_path / "whole")


def test_a_shard_is_not_read_again_by_the_run_that_wrote_it(
    pico: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    read: list[str] = []

    def watched(path: Path) -> FileDigest:
        read.append(path.name)
        return digest_of_file(path)

    monkeypatch.setattr(run, "digest_of_file", watched)
    compress(dense, tmp_path / "whole", text)
    assert not read
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(8))

    compress(dense, out, text)

    assert read == ["model-00001-of-00003.safetensors"]


def test_damaged_lines_of_the_journal_are_told(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(4))
    journal = out / WORK / JOURNAL
    header, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(
        b"".join([header, *lines[:3], lines[3].replace(b"forward 1", b"forward 0")])
    )

    assert status(out).steps_done == 3
    compress(dense, out, text, progress=(notes := Notes()))

    assert notes.texts[0].endswith("journal.jsonl is damaged: going back to step 'forward 1'")
    assert notes.done == 3


def test_a_journal_that_lost_a_line_goes_on_before_it(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(4))
    journal = out / WORK / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], *lines[4:]]))

    compress(dense, out, text, progress=(notes := Notes()))

    assert "going back to step 'forward 0'" in notes.texts[0]
    compress(dense, tmp_path / "whole", text)
    assert weights(out) == weights(tmp_path / "whole")


def test_kept_work_that_is_damaged_is_made_again(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out, work = pico("llama"), tmp_path / "out", tmp_path / "work"
    settings: dict[str, Any] = {"include": "k_proj|down_proj"}
    compress(dense, tmp_path / "first", text, work_dir=work, keep_work=True, **settings)
    flip(work / "moments-00001.mlp.down_proj.safetensors")
    flip(work / "analysis-00001.self_attn.k_proj.safetensors")

    compress(dense, out, text, work_dir=work, ratio=0.3, progress=(notes := Notes()), **settings)
    assert any("analysis-00001.self_attn.k_proj" in text for text in notes.texts)
    compress(dense, tmp_path / "whole", text, ratio=0.3, **settings)
    assert weights(out) == weights(tmp_path / "whole")


# -- the source --------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_pico(tmp_path / "model", tie=False)


OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def change(source: Path, name: str) -> None:
    """Another number in a tensor, in a file of the same size and time."""
    info = read_index(source).tensors[name]
    before = info.shard.stat()
    data = bytearray(info.shard.read_bytes())
    data[info.start] ^= 1
    info.shard.write_bytes(data)
    os.utime(info.shard, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", OUTER)
@pytest.mark.parametrize("settings", [{}, {"method": "svd-llm"}], ids=["two-sided", "svd-llm"])
def test_a_tensor_outside_of_blocks_that_changes_in_the_middle_is_refused(
    name: str, settings: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    changing = AfterStep("embed", lambda: change(source, name))
    with pytest.raises(JobMismatchError, match=f"{name} has other bytes now than") as caught:
        compress(source, out, text, progress=changing, **settings)

    assert caught.value.field == "source"
    with pytest.raises(JobMismatchError, match=f"{name} has other bytes now than"):
        compress(source, out, text, **settings)  # and in another process
    assert not (out / "config.json").exists()


def test_outputs_of_one_job_hold_the_same_tensors_outside_of_blocks(
    source: Path, text: Path, tmp_path: Path
) -> None:
    changing = AfterStep("ratio 0.2: copy the rest", lambda: change(source, "lm_head.weight"))
    settings: dict[str, Any] = {"method": "swsc", "ratio": (0.2, 0.4), "statistics": "none"}

    with pytest.raises(JobMismatchError, match="lm_head.weight has other bytes"):
        compress(source, tmp_path / "out", text, progress=changing, **settings)


def test_a_source_that_goes_away_in_the_middle_is_one_error(text: Path, tmp_path: Path) -> None:
    model, away = save_pico(tmp_path / "model"), tmp_path / "away"
    compress(model, tmp_path / "whole", text, progress=(steps := Notes()))
    for number, step in enumerate(steps.steps[:-1]):
        out = tmp_path / f"out-{number}"

        with pytest.raises(StreamcompError):
            compress(model, out, text, progress=AfterStep(step, lambda: model.rename(away)))

        away.rename(model)
        compress(model, out, text)
        assert weights(out) == weights(tmp_path / "whole")


def test_what_else_is_wrong_with_the_work_folder_is_one_line(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(4))
    path = out / WORK / "hidden-00001.bin"
    path.unlink()
    path.mkdir()
    settings = ("--samples", "8", "--seq-len", "16", "--calibration", text, "--threads", "1")

    done = run_cli("compress", dense, out, *settings, "--quiet")

    assert done.code in (0, 6) and "Traceback" not in done.err
