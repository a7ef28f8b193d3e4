from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from streamcomp.model.sites import find_sites
from tests.model.folders import edit_config, open_skeleton, save_edited
from tests.pico import ARCHITECTURES, save_pico

ATTENTION = {f"self_attn.{kind}_proj" for kind in "qkvo"}
GATED = {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}

EXPECTED = {
    "llama": ATTENTION | GATED,
    "mistral": ATTENTION | GATED,
    "qwen2": ATTENTION | GATED,
    "qwen3": ATTENTION | GATED,
    "gemma2": ATTENTION | GATED,
    "gemma3": ATTENTION | GATED,
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "opt": {*(f"self_attn.{kind}_proj" for kind in ("q", "k", "v", "out")), "fc1", "fc2"},
    "gpt_neox": {
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    },
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "mixtral": ATTENTION,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_linears_of_each_architecture_are_found(
    architecture: str, pico: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(pico(architecture))

    for number in range(len(skeleton)):
        linears = find_sites(skeleton, number)

        assert {linear.name for linear in linears.linears} == EXPECTED[architecture]
        assert bool(linears.left) == (architecture == "mixtral")
        for linear in linears.linears:
            assert linear.full_name == f"{skeleton.block_name(number)}.{linear.name}"
            assert linear.source is skeleton.index.tensors[f"{linear.disk_name}.weight"]
            stored = (linear.rows, linear.columns)
            assert linear.source.shape == (stored[::-1] if architecture == "gpt2" else stored)
            assert linear.numel == linear.source.numel


def test_a_mixtures_router_is_left_with_the_reason(pico: Callable[..., Path]) -> None:
    left = find_sites(open_skeleton(pico("mixtral")), 1).left

    assert set(left) == {"model.layers.1.mlp.gate"}
    assert "Router" in left["model.layers.1.mlp.gate"]


def test_each_matrix_of_each_expert_is_a_site(pico: Callable[..., Path]) -> None:
    sites = find_sites(open_skeleton(pico("mixtral")), 1)

    assert sites.bank is not None
    assert [site.name for site in sites.experts] == [
        f"mlp.experts.{expert}.{leaf}"
        for expert in range(4)
        for leaf in ("gate_up_proj", "down_proj")
    ]
    assert {(site.leaf, site.rows, site.columns) for site in sites.experts} == {
        ("gate_up_proj", 96, 32),
        ("down_proj", 32, 48),
    }
    assert sites.experts[-1].disk_name == "model.layers.1.block_sparse_moe.experts.3.down_proj"
    assert sites.experts[0].tokens(9) == 5  # two of four experts for each token


def test_experts_are_included_and_excluded_by_name(pico: Callable[..., Path]) -> None:
    sites = find_sites(
        open_skeleton(pico("mixtral")), 0, include=r"experts\.[02]", exclude="gate_up"
    )

    assert [site.name for site in sites.experts] == [
        "mlp.experts.0.down_proj",
        "mlp.experts.2.down_proj",
    ]
    assert "model.layers.0.mlp.experts" not in sites.left


def test_experts_that_compute_something_else_are_left(
    pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = open_skeleton(pico("mixtral"))
    kind = type(skeleton.block(0).get_submodule("mlp.experts"))
    monkeypatch.setattr(kind, "_apply_gate", lambda self, rows: rows[..., ::2])

    sites = find_sites(skeleton, 0)

    assert sites.bank is None and not sites.experts
    assert sites.left["model.layers.0.mlp.experts"].startswith("a MixtralExperts, whose experts")


def test_a_router_that_is_a_plain_linear_is_left_too(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("mixtral"))
    mixture = skeleton.block(1).get_submodule("mlp")
    mixture.gate = nn.Linear(32, 4, bias=False, device="meta")

    assert find_sites(skeleton, 1).left["model.layers.1.mlp.gate"] == "a router"


def test_a_linear_in_a_router_of_its_own_is_left_too(pico: Callable[..., Path]) -> None:
    class NewRouter(nn.Module):
        pass

    skeleton = open_skeleton(pico("mixtral"))
    router = NewRouter()
    router.gate = nn.Linear(32, 4, bias=False, device="meta")
    skeleton.block(1).get_submodule("mlp").gate = router
    name = "model.layers.1.mlp.gate"
    skeleton.sources[f"{name}.gate.weight"] = skeleton.sources[f"{name}.weight"]

    assert find_sites(skeleton, 1).left[f"{name}.gate"] == "a router"


def test_a_projection_with_as_many_rows_as_experts_is_no_router(tmp_path: Path) -> None:
    folder = save_pico(tmp_path, "llama")
    edit_config(folder, num_local_experts=16)  # as many as k_proj has rows

    names = {linear.name for linear in find_sites(open_skeleton(folder), 0).eligible}

    assert names == EXPECTED["llama"]


def test_linears_are_included_and_excluded_by_name(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))

    linears = find_sites(skeleton, 0, include=r"mlp|q_proj", exclude=r"down")

    assert {linear.name for linear in linears.eligible} == {
        "self_attn.q_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    }
    assert linears.left == {
        "model.layers.0.self_attn.k_proj": "not included",
        "model.layers.0.self_attn.v_proj": "not included",
        "model.layers.0.self_attn.o_proj": "not included",
        "model.layers.0.mlp.down_proj": "excluded",
    }


def test_names_are_searched_within_the_whole_model(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))

    assert not find_sites(skeleton, 0, exclude=r"layers\.0\.").eligible
    assert len(find_sites(skeleton, 1, exclude=r"layers\.0\.").eligible) == 7


def test_a_matrix_of_integers_is_left(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    folder = save_edited(
        tmp_path,
        lambda tensors: tensors.update({f"{name}.weight": torch.ones(48, 32, dtype=torch.int8)}),
    )

    assert find_sites(open_skeleton(folder), 0).left == {name: "of dtype I8"}


def test_a_matrix_missing_on_disk_is_left(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    folder = save_edited(tmp_path, lambda tensors: tensors.pop(f"{name}.weight"))

    assert find_sites(open_skeleton(folder), 0).left == {name: "not one matrix on disk"}


def test_expert_names_on_disk_are_those_of_the_shards(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("mixtral"))

    names = {info.name for info in skeleton.block_tensors(0)}

    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    assert {f"{linear.disk_name}.weight" for linear in find_sites(skeleton, 0).linears} < names
