"""Types of models that differ in what they ask of streamcomp, each through everything it does.

All types are tried by ``benchmarks/families.py``; here is at least one of each difficulty.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import checks
from tests.families.apart import run_apart
from tests.families.checks import (
    OK,
    RECIPES,
    REFUSED,
    TRACEBACK,
    WRONG,
    Family,
    check_family,
    streamed_gradient,
)
from tests.families.tiny import NotBuiltError, causal_types, save_tiny, tiny_config, variants
from tests.jobs import expert_products, logits_of, products, stored_tensors
from tests.model.folders import streamed_logits

# Type -> what is difficult about it.
WORKS = {
    "bamba": "its config holds infinity; a state space in one block, attention in the other",
    "bart": "a decoder whose attention to an encoder never runs",
    "deepseek_v3": "latent attention; a dense block before those with experts",
    "doge": "linears of rank 1, whose factor is one number cut out of more",
    "falcon": "linears of a class of its own",
    "falcon_h1": "buffers that the model fills, not the module that holds them",
    "gemma3": "a tower for images next to the blocks",
    "gpt2": "linears that are stored transposed",
    "glm_moe_dsa": "blocks that return three things",
    "gemma3n_text": "four vectors a token, and keys and values that blocks share",
    "gemma4_text+shared": "inputs of each block that depend on the tokens; heads of two sizes",
    "gpt_oss": "experts that are stored transposed, with biases",
    "jamba": "a linear whose weight its block reads without calling it, and experts",
    "llama4": "a text model whose config is a part of the checkpoint's",
    "longcat_flash": "a block that counts as two layers",
    "mamba": "a linear whose weight its block reads without calling it",
    "modernbert-decoder": "a head that is named decoder",
    "roberta": "a bias of the head that is stored once and used twice",
}
# Type -> the reason.
REFUSES = {
    "deepseek_v4": "hands the state 'position_embeddings'",
    "inkling2_text": "its head is given the embeddings",
    "prophetnet": r"are not \(batch, tokens, hidden\)",
    "reformer": "cannot be run block by block",
    "zamba2": "is the same weight as",
}


# Older releases make no text model of a whole config, and lose how it was compressed.
PARTS = "get_text_config" in inspect.getsource(AutoModelForCausalLM.from_config)


def only_known(kinds: dict[str, str]) -> list[Any]:
    """``kinds`` as parameters; a type that an older transformers cannot build is skipped."""
    skip = pytest.mark.skip(reason="transformers is too old for it")
    known = [kind for kind in (*causal_types(), *variants()) if PARTS or kind != "llama4"]
    return [pytest.param(kind, marks=() if kind in known else skip) for kind in kinds]


@pytest.mark.parametrize("kind", only_known(WORKS))
def test_it_works(kind: str, tmp_path: Path) -> None:
    recipes = (
        RECIPES if kind in ("mamba", "bart", "falcon", "gpt2") else {"default": RECIPES["default"]}
    )
    family = check_family(kind, tmp_path, recipes=recipes)

    assert family.verdict == "works", family.reason
    assert family.steps[-1].name == f"evaluate, {list(recipes)[-1]}"
    assert family.share is not None and 0.05 < family.share <= 1


@pytest.mark.parametrize("kind", only_known(REFUSES))
def test_it_is_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    family = check_family(kind, tmp_path)

    assert family.verdict == REFUSED, family.reason
    assert family.reason is not None
    assert re.search(REFUSES[kind], family.reason.detail)


# -- the checks find faults --------------------------------------------------------------


def checked(kind: str, folder: Path, recipes: dict[str, Any], **patches: Any) -> Family:
    """A sound model with something in the checks, or in streamcomp, replaced."""
    with mock.patch.multiple(checks, **patches):
        return check_family(kind, folder, recipes=recipes)


def checked_llama(folder: Path, recipes: dict[str, Any], **patches: Any) -> Family:
    return checked("llama", folder, recipes, **patches)


def test_logits_that_are_not_the_whole_models_are_wrong(tmp_path: Path) -> None:
    def slightly_off(folder: Path, tokens: Tensor) -> Tensor:
        return streamed_logits(folder, tokens) * 1.0001

    family = checked_llama(tmp_path, {}, streamed_logits=slightly_off)

    assert family.verdict == WRONG and family.difference is not None and family.difference > 5e-5
    assert family.reason is not None and "streamed and whole logits" in family.reason.detail
    assert [step.outcome for step in family.steps] == [OK, OK, OK, WRONG]


def test_a_gradient_that_is_not_the_whole_models_is_wrong(tmp_path: Path) -> None:
    def slightly_off(folder: Path, tokens: Tensor) -> Tensor:
        return streamed_gradient(folder, tokens) * 1.001

    family = checked_llama(tmp_path, {}, streamed_gradient=slightly_off)

    assert [step.outcome for step in family.steps] == [OK, OK, OK, OK, WRONG, OK]
    assert family.reason is not None and family.reason.name == "differentiate"


@pytest.mark.parametrize("which", [0, 1])
def test_experts_one_by_one_that_are_not_the_blocks_are_wrong(which: int, tmp_path: Path) -> None:
    def slightly_off(*arguments: Any) -> list[Tensor]:
        both = list(run_apart(*arguments))
        both[which] = both[which] * 1.001
        return both

    family = checked("mixtral", tmp_path, {}, run_apart=slightly_off)

    assert [step.outcome for step in family.steps] == [OK, OK, OK, OK, OK, WRONG]
    assert family.reason is not None and "experts one by one" in family.reason.detail


def test_an_export_that_is_not_the_product_is_wrong(tmp_path: Path) -> None:
    def others(folder: Path) -> dict[str, Tensor]:
        found = products(folder)
        found["model.layers.1.mlp.up_proj"] = found["model.layers.1.mlp.up_proj"] * 1.001
        return found

    family = checked_llama(tmp_path, {"default": {}}, products=others)

    assert family.verdict == WRONG
    assert family.reason is not None
    assert family.reason.name == "reload, default"
    assert "model.layers.1.mlp.up_proj" in family.reason.detail


def test_exported_experts_that_are_not_the_product_are_wrong(tmp_path: Path) -> None:
    def others(*arguments: Any) -> Iterator[tuple[int, Tensor]]:
        return ((expert, product * 1.001) for expert, product in expert_products(*arguments))

    family = checked("mixtral", tmp_path, {"default": {}}, expert_products=others)

    assert family.reason is not None and family.verdict == WRONG
    assert family.reason.name == "reload, default"
    assert "experts.gate_up_proj" in family.reason.detail


@pytest.mark.parametrize(
    ("kind", "leaf", "keep", "told"),
    [
        ("llama", "norm.weight", True, "is not what it was"),
        ("mixtral", "experts.down_proj_pivots", False, "is missing, or should not be there"),
    ],
)
def test_other_tensors_than_factors_are_wrong(
    kind: str, leaf: str, keep: bool, told: str, tmp_path: Path
) -> None:
    def changed(folder: Path) -> dict[str, Tensor]:
        tensors = stored_tensors(folder)
        if folder.name != "source":
            name = next(name for name in tensors if name.endswith(leaf))
            tensor = tensors.pop(name)
            if keep:
                tensors[name] = tensor * 2
        return tensors

    family = checked(kind, tmp_path, {"default": {}}, stored_tensors=changed)

    assert family.reason is not None and family.verdict == WRONG
    assert family.reason.name == "compress, default"
    assert told in family.reason.detail


def test_an_exception_that_is_no_refusal_is_a_fault(tmp_path: Path) -> None:
    broken = mock.Mock(side_effect=KeyError("layers"))
    family = checked_llama(tmp_path, {}, _shares=broken)

    assert family.verdict == TRACEBACK
    assert family.reason is not None
    assert (family.reason.name, family.reason.detail) == ("inspect", "KeyError: 'layers'")


# -- the tiny models ---------------------------------------------------------------------


def test_tiny_models_are_the_same_every_time(tmp_path: Path) -> None:
    for kind in ("mamba", "mixtral"):
        one, other = (tmp_path / f"{kind}-{number}" for number in range(2))
        for folder in (one, other):
            save_tiny(kind, folder)

        before, after = stored_tensors(one), stored_tensors(other)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", only_known({"llama": "", "qwen3_next": "", "mamba": ""}))
def test_every_matrix_of_a_tiny_model_shows_in_its_logits(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(16, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    before = logits_of(model, tokens)

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        held = parameter.data.clone()
        parameter.data.mul_(-1)
        assert (logits_of(model, tokens) - before).abs().max() > 1e-3, name
        parameter.data.copy_(held)


def test_a_tiny_config_has_each_kind_of_block_that_the_default_has() -> None:
    gemma, deepseek = tiny_config("gemma3_text"), tiny_config("deepseek_v3")

    assert sorted(gemma.layer_types) == ["full_attention", "sliding_attention"]
    assert gemma.num_hidden_layers == 2
    assert deepseek.num_hidden_layers == 2
    assert (
        0 < deepseek.first_k_dense_replace < 2
        if hasattr(deepseek, "first_k_dense_replace")
        else (sorted(deepseek.mlp_layer_types) == ["dense", "sparse"])
    )


def test_what_a_default_config_leaves_out_a_tiny_one_leaves_out() -> None:
    assert tiny_config("mixtral").sliding_window is None
    assert tiny_config("mistral").sliding_window == 8
    llama = tiny_config("llama")
    assert llama.num_key_value_heads == llama.num_attention_heads == 4
    assert tiny_config("mistral").num_key_value_heads == 2


def test_a_type_that_transformers_cannot_build_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(NotBuiltError, match="MusicgenConfig"):
        save_tiny("musicgen", tmp_path)
