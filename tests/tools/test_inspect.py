"""What a checkpoint is made of, and where a job stands."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamcomp
from streamcomp import Inspection, OutputError
from streamcomp.cli.tables import print_summary
from streamcomp.tools.inspect import Family
from tests.jobs import (
    Interrupt,
    Interrupted,
    compress,
    factored_modules,
    run_cli,
    stored_tensors,
)
from tests.pico import ARCHITECTURES, save_pico


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
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_a_compressed_model_is_told_with_its_ranks(
    architecture: str, form: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico(architecture), out, text, form=form, ratio=0.3, allocation="uniform")

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


def test_shared_channels_are_told_with_their_clusters(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico("llama"), out, text, method="swsc", ratio=0.3, exclude="layers.1.*down")

    found = streamcomp.inspect(out)

    specs = factored_modules(out)
    assert [family.form for family in found.families].count("shared") == len(found.families) - 1
    for family in found.families:
        members = [spec for name, spec in specs.items() if name.endswith(f".{family.name}")]
        if family.form == "dense":
            assert (family.name, family.count) == ("mlp.down_proj", 1)
            assert family.ranks is None and family.clusters is None and family.axes == ()
            continue
        clusters, ranks = ([spec[key] for spec in members] for key in ("clusters", "rank"))
        assert family.count == len(members)
        assert family.clusters == (min(clusters), max(clusters))
        assert family.ranks == (min(ranks), max(ranks))
        assert family.axes == tuple(sorted({spec["axis"] for spec in members}))


# -- as it is printed --------------------------------------------------------------------

LARGE = ("12288 x 28672", "123", "12288-24576", "1021-1022 clusters", "3.21 GiB")


def family(name: str, *others: str, form: str = "pivot", clusters: bool = False) -> Family:
    ranks = None if form == "dense" else (12288, 24576)
    nbytes = round(3.21 * 2**30)
    return Family(
        name, 12288, 28672, 123, form, ranks, (1021, 1022) if clusters else None, (), nbytes, others
    )


def printed(columns: int, *families: Family, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Rows of cells, the parts of a cell put together, and None for a rule between rows."""
    found = Inspection("llama", "bfloat16", 123, 1, 1, 2, 2, 3, True, families, {})
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(streamcomp, "inspect", lambda model, revision: found)
    shown = run_cli("inspect", "model")
    assert shown.code == 0 and "…" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= columns
    rows: list[list[str]] = []
    for line in shown.out.splitlines():
        if line.startswith("├"):
            rows.append([])
        if not line.startswith("│"):
            continue
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[1]:
            rows.append(cells)
        else:  # the row goes on: words in the form, pieces in the name
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
            rows[-1][0] = rows[-1][0].replace(" ", "")
    return rows


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_no_terminal_is_too_narrow_for_a_column(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, count, ranks, clusters, nbytes = LARGE
    families = [
        family("self_attn.q_proj"),
        family("self_attn.k_proj", form="shared", clusters=True),
        family("block_sparse_moe.experts.17.gate_up_proj", form="dense"),
    ]

    rows = [row for row in printed(columns, *families, monkeypatch=monkeypatch) if row]

    assert [row[0] for row in rows] == [family.name for family in families]
    assert [row[1:3] + row[4:] for row in rows] == [[shape, count, nbytes]] * 3
    forms = [f"pivot {ranks}", f"shared {ranks} {clusters}", "dense"]
    assert [row[3].replace(",", "") for row in rows] == forms


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_rules_stand_between_linears_of_other_inputs(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = [family("a.q", "a.k"), family("a.o"), family("a.k", "a.q"), family("m.w")]
    families.append(family("a.q", "a.k", form="dense"))

    rows = printed(columns, *families, monkeypatch=monkeypatch)

    assert [row[0] if row else "" for row in rows] == ["a.q", "a.k", "a.q", "", "a.o", "", "m.w"]


def test_a_wide_terminal_has_a_line_for_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    made = family("self_attn.q_proj", form="shared", clusters=True)
    found = Inspection("llama", "bfloat16", 123, 1, 1, 2, 2, 3, True, (made,), {})
    monkeypatch.setattr(streamcomp, "inspect", lambda model, revision: found)

    lines = run_cli("inspect", "model").out.splitlines()

    (line,) = [line for line in lines if line.startswith("│")]
    assert "self_attn.q_proj" in line and "shared 12288-24576, 1021-1022 clusters" in line


# -- the summary of a job ----------------------------------------------------------------


def summary(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What is printed about a report, by the names of its rows."""
    print_summary(Path("out"), report)
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines()]
    return {row[0].strip(): row[-1].strip() for row in rows}


def test_a_summary_tells_what_its_method_did(
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    settings: dict[str, Any] = {"ratio": 0.15, "refine": 2, "exclude": "up_proj"}
    made = compress(pico("llama"), tmp_path / "out", text, **settings).report
    nll = next(step["nll"] for step in made["steps"] if "nll" in step)
    made["refined"] = [
        {"block": n, "before": 0.5, "after": after, "steps": 1}
        for n, after in enumerate((0.5, 0.25, 0.125))
    ]
    made["dense"] = [{"name": name, "rows": 4, "columns": 4} for name in "ab"]

    rows = summary(made, capsys)

    assert rows["dense perplexity"] == f"{math.exp(nll):.4g} on the calibration text"
    assert rows["refined"] == "2 of 3 blocks improved, held-out loss 0.5 -> 0.25 (median)"
    assert rows["stay dense"] == f"2 of {2 + len(made['linears'])} linears"
    assert "bits per weight" not in rows and not [row for row in rows if "warning" in row]


def test_a_summary_of_shared_channels_tells_their_bits(
    pico: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = compress(pico("llama"), tmp_path / "out", text, method="swsc", ratio=0.3).report
    for number, linear in enumerate(made["linears"]):
        linear["bits_per_weight"] = 4.0 if number % 2 else 5.0

    rows = summary(made, capsys)

    assert rows["bits per weight"] == "4.5 in 14 linears"
    assert not {"dense perplexity", "refined", "stay dense"} & set(rows)


def test_a_summary_ends_with_what_deserves_a_look(
    pico: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = compress(pico("llama"), tmp_path / "out", text, method="svd-llm", ratio=0.3).report
    linear = made["linears"][3]
    linear |= {"fallback": "no gradient arrives: one-sided"}

    rows = summary(made, capsys)

    told = f"warning: 1 of 14 linears took a fallback; the first is {linear['name']}: "
    assert f"{told}{linear['fallback']}." in rows


# -- every architecture ------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_inspected(architecture: str, pico: Callable[..., Path]) -> None:
    found = streamcomp.inspect(pico(architecture))

    assert found.blocks == 2 and found.families
    assert json.loads(json.dumps(found.to_dict()))["blocks"] == 2


def test_routers_are_listed_with_the_reason(pico: Callable[..., Path]) -> None:
    found = streamcomp.inspect(pico("mixtral"))

    assert found.left == {"mlp.gate": ("a MixtralTopKRouter, no linear", 2)}


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
    names = ["tokenize", "embed", "forward 0", "forward 1", "gradient of the loss"]
    names += ["reverse 1", "reverse 0", "ranks", "block 0", "block 1", "copy the rest"]

    for done in range(1, len(names)):
        with pytest.raises(Interrupted):
            compress(dense, out, text, ratio=0.3, progress=Interrupt(done - 1))
        status = streamcomp.status(out)
        assert not status.finished
        assert (status.steps_done, status.steps_total) == (done, len(names))
        assert status.last_step == names[done - 1]
        assert status.seconds >= 0 and status.seconds_left >= 0 and status.peak_bytes > 0
        assert status.recipe["ratio"] == 0.3
    compress(dense, out, text, ratio=0.3)

    status = streamcomp.status(out)
    assert status.finished
    assert (status.steps_done, status.steps_total, status.seconds_left) == (11, 11, 0.0)
    assert status.recipe["ratio"] == 0.3


def test_status_of_a_job_whose_work_lies_elsewhere(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, work_dir=work, progress=Interrupt(2))

    with pytest.raises(OutputError, match="give --work-dir"):
        streamcomp.status(out)
    assert streamcomp.status(out, work_dir=work).last_step == "forward 0"
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


def test_experts_are_families_and_in_reach(
    pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    folder = pico("mixtral")

    seen = streamcomp.inspect(folder)
    shown = run_cli("inspect", folder)

    families = {family.name: family for family in seen.families}
    assert families["mlp.experts.gate_up_proj"].count == 8  # four in each of two blocks
    assert families["mlp.experts.down_proj"].nbytes == 4 * 8 * 32 * 48
    assert "mlp.experts" not in seen.left
    eligible = sum(f.count * f.rows * f.columns for f in seen.families)
    assert seen.in_reach == eligible
    assert f"{eligible / seen.parameters:.1%} of them can be factored" in shown.out
