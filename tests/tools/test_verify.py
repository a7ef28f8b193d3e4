"""A compressed model is whole, or what is damaged is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamcomp
from streamcomp import SourceError
from streamcomp.checkpoint import reader
from streamcomp.job.publish import REPORT
from tests.jobs import compress, config_of, run_cli, stored_tensors, tree
from tests.refusals import assert_refused, run_compress, write


@pytest.fixture(scope="module")
def whole(pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(pico("llama"), out, text, ratio=0.3)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A compressed model to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def files_of(folder: Path) -> list[str]:
    return sorted(name for name in tree(folder) if name not in (REPORT, "README.md"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of the first shard, and give its list in the report the new digest."""
    shard = min(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    relist(folder, shard.name)
    return shard


def relist(folder: Path, name: str) -> None:
    report = json.loads((folder / REPORT).read_text())
    data = (folder / name).read_bytes()
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    report.pop("checksum", None)
    report["files"][name] = {"bytes": len(data), "digest": digest}
    (folder / REPORT).write_text(json.dumps(report))


# -- sound models -----------------------------------------------------------------------------


def test_a_finished_model_is_whole(whole: Path) -> None:
    done = run_cli("verify", whole, "-q")

    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[-1] == f"{whole} is whole"
    count = len(files_of(whole)) + 1  # and the model card
    assert lines[:-1] == [line for line in lines if line.startswith("ok: ")]
    assert any(line.startswith(f"ok: {count} files, ") for line in lines)
    assert "ok: 12 factored linears: forms, ranks, shapes and indices are valid" in lines
    assert "ok: no number in 3 shards is NaN or infinite" in lines


def test_the_result_in_python_is_that_of_the_command(whole: Path) -> None:
    result = streamcomp.verify(whole)

    assert result.sound and not result.faults and not result.notes
    told = run_cli("verify", whole, "--json")
    assert told.code == 0
    assert told.json == json.loads(json.dumps(result.to_dict()))


def test_nothing_is_written(whole: Path) -> None:
    before = tree(whole)

    streamcomp.verify(whole)

    assert tree(whole) == before


def test_a_model_without_a_report_is_verified_without_digests(out: Path) -> None:
    (out / REPORT).unlink()

    done = run_cli("verify", out, "-q")

    assert done.code == 0
    assert f"note: {out} has no list of digests" in done.out
    assert "sizes and digests" not in done.out


def test_a_model_that_transformers_saved_is_verified(out: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "saved")

    assert streamcomp.verify(tmp_path / "saved").sound


def test_an_edited_model_card_is_a_note(out: Path) -> None:
    for change in (lambda path: write(path, "# Mine"), Path.unlink):
        change(out / "README.md")

        result = streamcomp.verify(out)

        assert result.sound
        assert result.notes == (f"{out / 'README.md'} was edited or removed",)
    assert run_cli("status", out).code == 0


def test_a_file_that_is_not_of_the_model_is_a_note(out: Path) -> None:
    write(out / "notes.txt", "mine")

    result = streamcomp.verify(out)

    assert result.sound
    assert result.notes == (f"{out}: not in the report's list: notes.txt",)


def test_each_of_several_ratios_is_verified(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = run_compress(pico("llama"), out, text, "--ratio", "0.2,0.4")
    assert run.code == 0
    assert streamcomp.verify(out).sound
    flip(out / "ratio-0.4" / "model-00002-of-00003.safetensors")

    result = streamcomp.verify(out)

    assert [fault.partition(" ")[0] for fault in result.faults] == [
        str(out / "ratio-0.4" / "model-00002-of-00003.safetensors")
    ]
    assert any(line.startswith("ratio-0.2: ") for line in result.checked)


def test_files_are_read_in_pieces(whole: Path) -> None:
    with mock.patch.object(reader, "COPY_BYTES", 64):
        result = streamcomp.verify(whole)

    assert result == streamcomp.verify(whole)


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip])
def test_every_file_that_is_damaged_is_named(
    damage: Callable[[Path], None], whole: Path, tmp_path: Path
) -> None:
    for name in files_of(whole):
        out = Path(shutil.copytree(whole, tmp_path / name))
        damage(out / name)

        done = run_cli("verify", out, "-q")

        assert done.code == 6 and not done.err
        assert f"damaged: {out / name} " in done.out, done.out
        assert done.out.splitlines()[-1].startswith(f"{out} is damaged, ")


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_file_that_is_missing_or_cut_is_not_already_done(
    damage: Callable[[Path], None], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_compress(pico("llama"), out, text).code == 0
    assert "already done" in run_compress(pico("llama"), out, text).out
    for name in files_of(out):
        kept = (out / name).read_bytes()
        damage(out / name)
        before = tree(out)

        for done in (run_compress(pico("llama"), out, text), run_cli("status", out)):
            remedy = f"{name} .*damaged; restore it, or remove {out} and compress again"
            assert_refused(done, 6, remedy)
        assert tree(out) == before
        (out / name).write_bytes(kept)
    assert "already done" in run_compress(pico("llama"), out, text).out


def test_two_damaged_files_are_counted(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    cut(out / "streamcomp_plugin.py")

    assert_refused(run_cli("status", out), 6, "and 1 more: the finished model in .* is damaged")
    assert len(streamcomp.verify(out).faults) == 2


def test_a_file_that_became_a_folder_is_named(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()

    assert_refused(run_cli("status", out), 6, "tokenizer.json is no file")


def test_a_tensor_that_the_index_does_not_list_is_named(out: Path) -> None:
    shard = edit_shard(out, lambda tensors: tensors.update(extra=torch.ones(2)))

    result = streamcomp.verify(out)

    assert result.faults == (f"{shard} holds extra, which the index does not list",)


def test_a_shard_that_the_report_does_not_list_is_named(out: Path) -> None:
    save_file(stored_tensors(out), out / "model.safetensors", metadata={"format": "pt"})

    result = streamcomp.verify(out)

    assert result.faults == (f"{out / 'model.safetensors'} is not in the report's list",)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_is_named(value: float, out: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    shard = edit_shard(out, lambda tensors: tensors[name].fill_(value))

    result = streamcomp.verify(out)

    assert result.faults == (f"{shard}: {name} holds NaN or infinity",)


def test_a_tensor_that_the_model_lacks_is_named(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    name = "model.layers.0.input_layernorm.weight"
    edit_shard(out, lambda tensors: tensors.pop(name))
    del index["weight_map"][name]
    write(out / "model.safetensors.index.json", json.dumps(index))
    relist(out, "model.safetensors.index.json")

    result = streamcomp.verify(out)

    assert result.faults == (f"{name} is in no shard: the checkpoint is incomplete",)


def test_a_config_of_another_architecture_is_named(out: Path) -> None:
    write(out / "config.json", json.dumps({**config_of(out), "model_type": "unheard-of"}))
    relist(out, "config.json")

    result = streamcomp.verify(out)

    assert len(result.faults) == 1 and "'unheard-of' is unknown to transformers" in result.faults[0]


@pytest.mark.parametrize(
    "files",
    [
        [],
        "files",
        {"../secret": {"bytes": 1, "digest": "0"}},
        {"/etc/passwd": {"bytes": 1, "digest": "0"}},
        {"..": {"bytes": 1, "digest": "0"}},
        {"": {"bytes": 1, "digest": "0"}},
        {"config.json": 3},
        {"config.json": {"bytes": True, "digest": "0"}},
        {"config.json": {"bytes": 1}},
    ],
)
def test_a_damaged_list_is_named(files: object, out: Path) -> None:
    report = json.loads((out / REPORT).read_text())
    write(out / REPORT, json.dumps({**report, "files": files}))

    done = run_cli("verify", out, "-q")

    assert done.code == 6
    assert "streamcomp_report.json is damaged" in done.out
    assert_refused(run_cli("status", out), 6, "streamcomp_report.json is damaged")


def test_a_report_that_is_no_json_is_named(out: Path) -> None:
    write(out / REPORT, "{")

    done = run_cli("verify", out, "-q")

    assert done.code == 6 and "streamcomp_report.json cannot be read as JSON" in done.out


# -- no compressed model ----------------------------------------------------------------------


def test_what_is_no_compressed_model_is_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(run_cli("verify", tmp_path / "none"), 3, "none is not a folder")
    assert_refused(run_cli("verify", empty), 3, "config.json is missing")
    assert_refused(run_cli("verify", pico("llama")), 3, "holds no model that streamcomp has")
    with pytest.raises(SourceError):
        streamcomp.verify(pico("llama"))
