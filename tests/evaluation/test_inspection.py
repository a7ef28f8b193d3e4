"""What a checkpoint is made of, and where a job stands."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import streamcomp
from streamcomp import OutputError
from tests.jobs import (
    Interrupt,
    Interrupted,
    compress,
    factored_modules,
    run_cli,
    stored_tensors,
    varied_text,
)
from tests.pico import ARCHITECTURES, save_pico


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "calibration.txt", 4000)


def test_a_dense_model_is_told_by_families(pico: Callable[..., Path]) -> None:
    folder = pico("llama")

    found = streamcomp.inspect(folder)

    assert (found.model_type, found.dtype, found.blocks) == ("llama", "float32", 2)
    assert not found.compressed
    families = {family.name: family for family in found.families}
    shapes = {name: (family.rows, family.columns) for name, family in families.items()}
    assert shapes == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    for family in found.families:
        assert (family.count, family.form, family.ranks) == (2, "dense", None)
        assert family.nbytes == 2 * 4 * family.rows * family.columns
    assert set(families["self_attn.q_proj"].shares_with) == {"self_attn.k_proj", "self_attn.v_proj"}
    assert families["mlp.up_proj"].shares_with == ("mlp.gate_proj",)
    assert families["mlp.down_proj"].shares_with == ()
    tensors = stored_tensors(folder)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.nbytes == 4 * found.parameters
    assert found.shards == len(list(folder.glob("*.safetensors")))


@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox", "mixtral"])
def test_a_compressed_model_is_told_with_its_ranks(
    architecture: str, form: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico(architecture), out, text, form=form, ratio=0.3)

    dense, found = streamcomp.inspect(pico(architecture)), streamcomp.inspect(out)

    assert found.compressed
    assert found.left.keys() == dense.left.keys()
    before = {family.name: family for family in dense.families}
    ranks = {spec["rank"] for spec in factored_modules(out).values()}
    tensors = stored_tensors(out)
    for family in found.families:
        old = before[family.name]
        assert (family.rows, family.columns) == (old.rows, old.columns)
        assert (family.form, family.count) == (form, 2)
        assert family.ranks is not None and set(family.ranks) <= ranks
        assert family.shares_with == old.shares_with
        nbytes = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in tensors.items()
            if f".{family.name}." in name
        )
        assert family.nbytes == nbytes < old.nbytes + 8 * family.rows
    assert found.parameters < dense.parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_inspected(architecture: str, pico: Callable[..., Path]) -> None:
    found = streamcomp.inspect(pico(architecture))

    assert found.blocks == 2 and found.families
    assert json.loads(json.dumps(found.to_dict()))["blocks"] == 2


def test_experts_and_routers_are_listed_with_the_reason(pico: Callable[..., Path]) -> None:
    found = streamcomp.inspect(pico("mixtral"))

    assert {family.name.rpartition(".")[2] for family in found.families} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert any("experts" in name and count == 2 for name, (_, count) in found.left.items())
    assert any(name.endswith("gate") for name in found.left)


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Headers are enough: the weights may be gone, so long as the file is as long as it says."""
    folder = save_pico(tmp_path / "model", shard_size="1GB")
    expected = streamcomp.inspect(folder)
    shard = folder / "model.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    assert os.stat(shard).st_size == size

    assert streamcomp.inspect(folder) == expected


# -- status ------------------------------------------------------------------------------


def test_status_before_during_and_after(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(OutputError, match="holds no job"):
        streamcomp.status(out)
    names = ["tokenize", "embed", "block 0", "block 1", "copy the rest"]

    for done in range(1, 5):
        with pytest.raises(Interrupted):
            compress(dense, out, text, ratio=0.3, progress=Interrupt(done - 1))
        status = streamcomp.status(out)
        assert not status.finished
        assert (status.steps_done, status.steps_total) == (done, 5)
        assert status.last_step == names[done - 1]
        assert status.seconds >= 0 and status.seconds_left >= 0 and status.peak_bytes > 0
        assert status.recipe["ratio"] == 0.3
    compress(dense, out, text, ratio=0.3)

    status = streamcomp.status(out)
    assert status.finished
    assert (status.steps_done, status.steps_total, status.seconds_left) == (5, 5, 0.0)
    assert status.recipe["ratio"] == 0.3


def test_status_of_a_job_whose_work_lies_elsewhere(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, work_dir=work, progress=Interrupt(2))

    with pytest.raises(OutputError, match="give --work-dir"):
        streamcomp.status(out)
    assert streamcomp.status(out, work_dir=work).last_step == "block 0"
    done = run_cli("status", out, "--work-dir", work, "--json")
    assert done.json["steps_done"] == 3
    assert done.json["finished"] is False


def test_status_changes_nothing(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, progress=Interrupt(2))
    journal = out / ".streamcomp" / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"step": "torn')
    before = journal.read_bytes()

    assert streamcomp.status(out).steps_done == 3
    assert journal.read_bytes() == before
