"""Linears that no calibration token reaches: nothing is known of them, so they stay dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama as llama

from streamcomp.model.sites import find_sites
from tests.jobs import Interrupt, Interrupted, compress, factored_modules, stored_tensors, tree
from tests.model.folders import open_skeleton, streamed_logits
from tests.pico import pico_text, pico_tokens, whole_logits

UNREACHED = {f"model.layers.{block}.mlp.up_proj" for block in range(2)}


@pytest.fixture(autouse=True)
def _gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forwards that ask the data whether up_proj has to run; with these texts it never has."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        wide = self.act_fn(self.gate_proj(hidden))
        if bool(hidden.abs().max() > 1e6):
            wide = wide * self.up_proj(hidden)
        output: Tensor = self.down_proj(wide)
        return output

    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)


def test_the_code_alone_does_not_tell(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))

    assert skeleton.rehearsal.called == (None, None)
    assert "mlp.up_proj" in {linear.name for linear in find_sites(skeleton, 0).eligible}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"allocation": "uniform"},
        {"method": "svd-llm"},
        {"method": "svd-llm", "allocation": "loss"},
        {"method": "svd-llm", "update": True},
        {"method": "rom", "form": "uv"},
        {"method": "swsc"},
        {"refine": 2},
    ],
    ids=str,
)
def test_they_stay_dense_and_do_not_count_in_the_ratio(
    settings: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = pico("llama"), tmp_path / "out"
    before = stored_tensors(source)

    report = compress(
        source, out, pico_text(tmp_path / "text.txt", 4000), ratio=0.3, **settings
    ).report

    after = stored_tensors(out)
    assert not UNREACHED & factored_modules(out).keys()
    for name in UNREACHED:
        assert report["left"][name] == "no calibration token reached it"
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    linears = {*(m["name"] for m in report["linears"]), *(m["name"] for m in report["dense"])}
    assert len(linears) == 12 and not linears & UNREACHED
    rest = sum(before[f"{name}.weight"].numel() for name in linears)
    assert report["model"]["linear_parameters"] == rest
    assert report["model"]["ratio"] == pytest.approx(0.3, abs=0.02)
    assert torch.equal(streamed_logits(out, pico_tokens()), whole_logits(out, pico_tokens()))


@pytest.mark.parametrize("settings", [{}, {"method": "svd-llm"}], ids=str)
def test_a_job_of_them_alone_leaves_the_model_as_it_is(
    settings: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = pico("llama"), tmp_path / "out"

    report = compress(
        source, out, pico_text(tmp_path / "text.txt", 4000), include="up_proj", **settings
    ).report

    assert report["linears"] == [] and report["model"]["ratio"] == 0
    assert report["left"].keys() >= UNREACHED
    assert torch.equal(whole_logits(out, pico_tokens()), whole_logits(source, pico_tokens()))


def test_a_job_that_was_interrupted_still_knows_them(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    source, text = pico("llama"), pico_text(tmp_path / "text.txt", 4000)
    compress(source, tmp_path / "whole", text)
    for after in (6, 7, 8):  # behind the last analysis, the ranks and the first block
        with pytest.raises(Interrupted):
            compress(source, tmp_path / f"{after}", text, progress=Interrupt(after))
        compress(source, tmp_path / f"{after}", text)

        shards = [
            {name: data for name, data in tree(tmp_path / out).items() if name.startswith("model-")}
            for out in ("whole", f"{after}")
        ]
        assert shards[0] == shards[1]


def test_they_stay_dense_in_a_job_that_goes_on_from_kept_moments(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    source, text, work = pico("llama"), pico_text(tmp_path / "text.txt", 4000), tmp_path / "work"
    compress(source, tmp_path / "first", text, work_dir=work, keep_work=True)

    report = compress(source, tmp_path / "second", text, work_dir=work, damping=0.1).report

    fresh = compress(source, tmp_path / "fresh", text, damping=0.1).report
    assert "decompose 0" in {step["step"] for step in report["steps"]}
    assert report["left"] == fresh["left"] and report["left"].keys() >= UNREACHED
    found, expected = (stored_tensors(tmp_path / out) for out in ("second", "fresh"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
